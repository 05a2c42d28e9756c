"""The types that flow are validated when they are made."""

import dataclasses

import numpy as np
import pytest

from meanflow_ros.core.contract import (
    ActionChunk, ActionSpace, CameraSpec, Observation, RobotSpec, SafeChunk, TimedActions,
    clean_instruction)
from meanflow_ros.core.guard import Guard


def a_space(**changes):
    return ActionSpace(**{'name': 'eef', 'dimensions': ('x', 'grip'), 'units': ('m', '1'),
                          'lower': [-0.37, 0.0], 'upper': [0.21, 1.0], **changes})


def a_robot(**changes):
    return RobotSpec(**{
        'robot': 'arm', 'cameras': (CameraSpec(name='wrist', width=4, height=3),),
        'state_names': ('j1', 'j0'), 'action_space': a_space(), 'horizon': 3,
        'period_s': 0.0333, 'first_step': 3, **changes})


def an_observation(**changes):
    return Observation(**{'stamp_ns': 7, 'images': {'wrist': np.zeros((3, 4, 3), np.uint8)},
                          'instruction': 'open it', 'state': [0.1, 0.2], **changes})


@pytest.mark.parametrize('changes, message', [
    ({'dimensions': ('x', 'x')}, "dimensions of action space 'eef' must be unique"),
    ({'dimensions': ('x', '')}, 'must be non-empty strings'),
    ({'dimensions': ('x', 5)}, 'must be non-empty strings'),
    ({'dimensions': (), 'units': (), 'lower': [], 'upper': []}, 'at least one dimension'),
    ({'units': ('m',)}, '2 dimensions but 1 units'),
    ({'lower': [-0.37]}, 'lower limits .* must be 2 finite numbers'),
    ({'upper': [0.21, np.nan]}, 'upper limits .* must be 2 finite numbers'),
    ({'upper': [0.21, np.inf]}, 'upper limits .* must be 2 finite numbers'),
    ({'lower': [[-0.37, 0.0]]}, r'lower limits must have 1 dimension\(s\)'),
    ({'upper': [0.21, 0.0]}, "limits of 'grip' must have lower < upper"),
    ({'lower': [-1e308, 0.0], 'upper': [1.7e308, 1.0]}, "limits of 'x' must have .* finite range"),
])
def test_a_bad_action_space_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_space(**changes)


@pytest.mark.parametrize('width, height', [(0, 3), (4, 0), (-1, 3)])
def test_a_camera_without_pixels_is_refused(width, height):
    with pytest.raises(ValueError, match=f"camera 'wrist' .* got {width}x{height}"):
        CameraSpec(name='wrist', width=width, height=height)


def cameras(*names):
    return tuple(CameraSpec(name=name, width=4, height=3) for name in names)


@pytest.mark.parametrize('changes, message', [
    ({'cameras': ()}, 'cameras must be 1 to 4, got 0'),
    ({'cameras': cameras('a', 'b', 'c', 'd', 'e')}, 'cameras must be 1 to 4, got 5'),
    ({'cameras': cameras('a', 'a')}, 'cameras must be unique'),
    ({'cameras': cameras('')}, 'cameras must be non-empty'),
    ({'state_names': ('j', 'j')}, 'state_names must be unique'),
    ({'horizon': 0}, 'horizon must be at least 1, got 0'),
    ({'period_s': 0.0}, 'period_s must be finite and above 0'),
    ({'period_s': float('nan')}, 'period_s must be finite and above 0'),
    ({'period_s': float('inf')}, 'period_s must be finite and above 0'),
    ({'first_step': -1}, 'first_step must be at least 0, got -1'),
])
def test_a_bad_robot_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        a_robot(**changes)


def test_a_robot_has_up_to_four_cameras_in_order_and_may_have_no_state():
    robot = a_robot(cameras=cameras('d', 'b', 'a', 'c'), state_names=())
    assert robot.camera_names == ('d', 'b', 'a', 'c')
    assert robot.action_space.size == 2


@pytest.mark.parametrize('changes, message', [
    ({'images': {'wrist': np.zeros((3, 4, 3), np.float32)}}, "camera 'wrist' must be .* uint8"),
    ({'images': {'wrist': np.zeros((3, 4), np.uint8)}}, "camera 'wrist' must be"),
    ({'images': {'wrist': np.zeros((3, 4, 4), np.uint8)}}, "camera 'wrist' must be"),
    ({'images': {'wrist': np.zeros((0, 4, 3), np.uint8)}}, "camera 'wrist' is empty"),
    ({'instruction': ' \n\t'}, 'instruction is empty'),
    ({'instruction': 'x' * 4097}, 'at most 4096 bytes, got 4097'),
    ({'instruction': '\ud800'}, 'not valid UTF-8'),
    ({'state': [0.1, np.nan]}, 'state must be finite'),
    ({'state': [[0.1]]}, r'state must have 1 dimension\(s\)'),
])
def test_a_bad_observation_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        an_observation(**changes)


def test_an_instruction_is_stripped_and_counted_in_bytes():
    assert clean_instruction('  打开水龙头 🚰\n') == '打开水龙头 🚰'
    assert clean_instruction('水' * 1365) == '水' * 1365
    with pytest.raises(ValueError, match='got 4098'):
        clean_instruction('水' * 1366)
    assert an_observation(instruction=' push ').instruction == 'push'


@pytest.mark.parametrize('changes, message', [
    ({'actions': np.zeros(3)}, r'actions must have 2 dimension\(s\), got shape \(3,\)'),
    ({'actions': np.zeros((1, 2, 3))}, 'actions must have 2'),
    ({'period_s': 0}, 'period_s must be finite and above 0'),
    ({'period_s': float('nan')}, 'period_s must be finite and above 0'),
])
def test_a_bad_chunk_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ActionChunk(**{'actions': np.zeros((3, 2)), 'stamp_ns': 0, 'period_s': 0.1, **changes})


def test_step_i_is_due_at_the_stamp_plus_i_plus_k_periods():
    chunk = ActionChunk(actions=np.zeros((3, 2)), stamp_ns=1_700_000_000_123_456_789,
                        period_s=0.0333, first_step=3)
    assert [chunk.due_ns(step) - 1_700_000_000_123_456_789 for step in range(3)] == [
        99_900_000, 133_200_000, 166_500_000]
    thirds = ActionChunk(actions=np.zeros((3, 2)), stamp_ns=11, period_s=1 / 30)
    assert [thirds.due_ns(step) for step in range(3)] == [11, 33_333_344, 66_666_678]


@pytest.mark.parametrize('due_ns, actions, message', [
    ([1, 2], np.zeros((3, 2)), '3 actions need as many due times, at least 1, got 2'),
    ([], np.zeros((0, 2)), 'at least 1, got 0'),
    ([1, 1], np.zeros((2, 2)), 'due times must increase'),
    ([2, 1], np.zeros((2, 2)), 'due times must increase'),
    ([[1]], np.zeros((1, 2)), 'due_ns must have 1'),
    ([1], np.zeros(2), 'actions must have 2'),
])
def test_bad_timed_actions_are_refused(due_ns, actions, message):
    with pytest.raises(ValueError, match=message):
        TimedActions(stamp_ns=0, due_ns=due_ns, actions=actions)


def make_chunk():
    return ActionChunk(actions=np.full((3, 2), 0.05), stamp_ns=0, period_s=0.1)


@pytest.mark.parametrize('make, field', [
    (a_space, 'lower'), (a_space, 'upper'), (an_observation, 'state'), (make_chunk, 'actions'),
    (lambda: TimedActions(stamp_ns=0, due_ns=[3], actions=[[0.1]]), 'due_ns'),
    (lambda: TimedActions(stamp_ns=0, due_ns=[3], actions=[[0.1]]), 'actions'),
])
def test_arrays_are_read_only_and_fields_are_frozen(make, field):
    value = make()
    with pytest.raises(ValueError, match='read-only'):
        getattr(value, field)[...] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)


def test_arrays_are_copies():
    actions, lower, state = np.full((3, 2), 0.05), np.array([-0.37, 0.0]), np.array([0.1, 0.2])
    chunk = ActionChunk(actions=actions, stamp_ns=0, period_s=0.1)
    space, seen = a_space(lower=lower), an_observation(state=state)
    for array in (actions, lower, state):
        array[...] = 99
    assert chunk.actions.max() == 0.05
    assert space.lower.tolist() == [-0.37, 0.0]
    assert seen.state.tolist() == [0.1, 0.2]


def test_only_the_guard_makes_a_safe_chunk():
    unsafe = TimedActions(stamp_ns=0, due_ns=[3], actions=[[99.0, 99.0]])
    for seal in ({}, {'seal': None}, {'seal': object()}):
        with pytest.raises(TypeError, match='only the guard'):
            SafeChunk(timed=unsafe, space=a_space(), **seal)


def test_a_safe_chunk_does_not_help_to_make_another():
    safe = Guard(a_robot()).check(make_chunk(), now_ns=0)
    unsafe = TimedActions(stamp_ns=0, due_ns=[3], actions=[[99.0, 99.0]])
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(safe, timed=unsafe)
    with pytest.raises(TypeError, match='only the guard'):
        SafeChunk(timed=unsafe, space=safe.space, seal=getattr(safe, 'seal', None))
    with pytest.raises(dataclasses.FrozenInstanceError):
        safe.timed = unsafe
    assert safe.timed.actions.max() == 0.05


def test_steps_are_due_at_the_nearest_nanosecond_however_large_the_stamp():
    stamp_ns = 2**60 + 1     # which float64 does not hold
    chunk = ActionChunk(actions=np.zeros((5, 2)), stamp_ns=stamp_ns, period_s=1 / 30, first_step=1)
    due_ns = chunk.timed().due_ns.tolist()
    assert due_ns == [chunk.due_ns(step) for step in range(5)]
    assert [due - stamp_ns for due in due_ns] == [
        33_333_333, 66_666_667, 100_000_000, 133_333_333, 166_666_667]
