"""Which steps are still due, and which chunks may become commands."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from meanflow_ros.core.contract import (
    ActionChunk, ActionSpace, CameraSpec, RobotSpec, SafeChunk, TimedActions)
from meanflow_ros.core.guard import Guard, Rejected
from meanflow_ros.core.timeline import Timeline, due_or_still, steps_still_due

LOWER, UPPER = np.array([-0.37, 12.5]), np.array([0.21, 13.7])
ROBOT = RobotSpec(
    robot='arm', cameras=(CameraSpec(name='wrist', width=4, height=3),), state_names=(),
    action_space=ActionSpace(name='eef', dimensions=('x', 'grip'), units=('m', 'N'),
                             lower=LOWER, upper=UPPER),
    horizon=3, period_s=0.0333, first_step=3)
STAMP_NS = 1_700_000_000_123_456_789
DUE_NS = [STAMP_NS + 99_900_000, STAMP_NS + 133_200_000, STAMP_NS + 166_500_000]
GOOD = np.array([[0.2, 12.6], [-0.3, 13.1], [0.0, 13.69]])


def chunk(actions=GOOD, **changes):
    return ActionChunk(**{'actions': actions, 'stamp_ns': STAMP_NS, 'period_s': 0.0333,
                          'first_step': 3, **changes})


@pytest.mark.parametrize('now_ns, dropped', [
    (0, 0), (DUE_NS[0], 0), (DUE_NS[0] + 1, 1), (DUE_NS[1], 1), (DUE_NS[1] + 1, 2),
    (DUE_NS[2], 2)])
def test_a_step_is_dropped_one_nanosecond_after_its_due_time(now_ns, dropped):
    timed = steps_still_due(chunk(), now_ns=now_ns)
    assert timed.stamp_ns == STAMP_NS
    assert timed.due_ns.tolist() == DUE_NS[dropped:]
    np.testing.assert_array_equal(timed.actions, GOOD[dropped:])


def test_nothing_is_left_after_the_last_due_time():
    assert steps_still_due(chunk(), now_ns=DUE_NS[2] + 1) is None


def timed(stamp_ns, values, first_due_ns=None):
    """One-dimensional actions, 10 ns apart from first_due_ns on."""
    start = stamp_ns if first_due_ns is None else first_due_ns
    return TimedActions(stamp_ns=stamp_ns, due_ns=start + 10 * np.arange(len(values)),
                        actions=np.array(values)[:, None])


def played(timeline, times):
    return [None if (action := timeline.at(now)) is None else action.item() for now in times]


def test_each_action_holds_for_its_period_and_there_is_none_before_and_after():
    timeline = Timeline(period_ns=10)
    assert timeline.at(100) is None
    timeline.add(timed(100, [1.1, 1.2, 1.3]))
    assert played(timeline, [99, 100, 109, 110, 120, 129, 130]) == [
        None, 1.1, 1.1, 1.2, 1.3, 1.3, None]


@pytest.mark.parametrize('order', list(itertools.permutations(range(3))))
def test_the_newest_chunk_wins_where_it_has_steps_and_an_older_one_serves_the_rest(order):
    chunks = [timed(100, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]),
              timed(110, [2.1, 2.2], first_due_ns=120),
              timed(115, [3.3], first_due_ns=131)]
    timeline = Timeline(period_ns=10)
    for index in order:
        timeline.add(chunks[index])
    assert played(timeline, [100, 119, 120, 130, 131, 140, 141, 150, 159, 160]) == [
        1.0, 1.1, 2.1, 2.2, 3.3, 3.3, 1.4, 1.5, 1.5, None]


def test_a_gap_wider_than_a_period_has_no_action():
    timeline = Timeline(period_ns=10)
    timeline.add(TimedActions(stamp_ns=0, due_ns=[0, 35], actions=[[1.0], [2.0]]))
    assert played(timeline, [9, 10, 34, 35]) == [1.0, None, None, 2.0]


def test_without_a_due_action_the_robot_stands_still_and_keeps_its_grip():
    last, due = np.array([0.31, -0.07, 0.83]), np.array([0.11, 0.0, -0.4])
    np.testing.assert_array_equal(due_or_still(None, last), [0.0, 0.0, 0.83])
    np.testing.assert_array_equal(due_or_still(due, last), due)
    assert last.tolist() == [0.31, -0.07, 0.83]


def test_clear_forgets_every_chunk():
    timeline = Timeline(period_ns=10)
    timeline.add(timed(100, [1.0]))
    timeline.clear()
    assert timeline.at(100) is None


def test_a_period_below_a_nanosecond_is_refused():
    with pytest.raises(ValueError, match='period_ns must be at least 1, got 0'):
        Timeline(period_ns=0)


def test_the_guard_passes_the_exact_limits_and_trims_what_is_past():
    actions = np.stack([LOWER, UPPER, GOOD[2]])
    safe = Guard(ROBOT).check(chunk(actions), now_ns=DUE_NS[1])
    assert isinstance(safe, SafeChunk)
    np.testing.assert_array_equal(safe.timed.actions, actions[1:])
    assert safe.timed.due_ns.tolist() == DUE_NS[1:]
    assert safe.space is ROBOT.action_space


def with_value(step, dimension, value):
    actions = GOOD.copy()
    actions[step, dimension] = value
    return actions


@pytest.mark.parametrize('actions, kind, message', [
    (GOOD[:2], 'shape', r'shape \(2, 2\), the checkpoint promises \(3, 2\)'),
    (GOOD[:, :1], 'shape', r'shape \(3, 1\)'),
    (np.zeros((0, 2)), 'shape', r'shape \(0, 2\)'),
    (GOOD.T, 'shape', r'shape \(2, 3\)'),
    (with_value(1, 1, np.nan), 'not_finite', "'grip' is not finite at step 1"),
    (with_value(2, 0, np.inf), 'not_finite', "'x' is not finite at step 2"),
    (with_value(0, 0, -np.inf), 'not_finite', "'x' is not finite at step 0"),
    (with_value(2, 1, 13.71), 'limits', r"'grip' is 13.71 N at step 2, outside \[12.5, 13.7\]"),
    (with_value(0, 0, -0.3701), 'limits', r"'x' is -0.3701 m at step 0, outside \[-0.37, 0.21\]"),
    (with_value(1, 0, 0.2101), 'limits', "'x' is 0.2101 m at step 1"),
])
def test_the_guard_names_what_it_rejects_and_counts_it(actions, kind, message):
    guard = Guard(ROBOT)
    for _ in range(2):
        with pytest.raises(Rejected, match=message) as caught:
            guard.check(chunk(actions), now_ns=DUE_NS[0])
    assert caught.value.kind == kind
    assert dict(guard.rejections) == {kind: 2}


def test_the_guard_rejects_a_chunk_that_is_wholly_past():
    guard = Guard(ROBOT)
    guard.check(chunk(), now_ns=DUE_NS[2])
    assert not guard.rejections
    with pytest.raises(Rejected, match=r'the last 0.250 s ago') as caught:
        guard.check(chunk(), now_ns=DUE_NS[2] + 250_000_000)
    assert caught.value.kind == 'expired'
    assert dict(guard.rejections) == {'expired': 1}


def test_an_action_outside_the_limits_rejects_the_chunk_even_if_its_step_is_past():
    with pytest.raises(Rejected) as caught:
        Guard(ROBOT).check(chunk(with_value(0, 0, 5.0)), now_ns=DUE_NS[1])
    assert caught.value.kind == 'limits'


@settings(max_examples=400, deadline=None)
@given(actions=st.one_of(
    arrays.arrays(np.float64, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    arrays.arrays(np.float64, (3, 2), elements=st.one_of(
        st.floats(), st.sampled_from([*LOWER, *UPPER, 0.2100009, 12.4999, -0.3700006])))))
@example(actions=GOOD)
@example(actions=with_value(1, 0, 0.21 + 0.57e-6))
@example(actions=with_value(1, 0, 0.21 + 0.59e-6))
@example(actions=with_value(0, 1, 1e308))
def test_no_array_whatever_becomes_an_unsafe_safe_chunk(actions):
    try:
        safe = Guard(ROBOT).check(chunk(actions), now_ns=DUE_NS[0])
    except ValueError:   # of the ActionChunk (not two-dimensional) or of the guard
        in_shape = actions.shape == (3, 2)
        assert not (in_shape and ((LOWER <= actions) & (actions <= UPPER)).all())
        return
    passed = safe.timed.actions
    assert passed.shape == (3, 2) and np.isfinite(passed).all()
    slack = 1e-6 * (UPPER - LOWER) * (1 + 1e-6)
    assert (passed >= LOWER - slack).all() and (passed <= UPPER + slack).all()
    np.testing.assert_array_equal(passed, actions)


@settings(max_examples=200, deadline=None)
@given(lower=st.floats(allow_nan=False, allow_infinity=False),
       upper=st.floats(allow_nan=False, allow_infinity=False), value=st.floats())
@example(lower=-1e308, upper=1.7e308, value=1.75e308)
def test_no_limits_whatever_let_a_value_beyond_them_pass(lower, upper, value):
    try:
        robot = RobotSpec(
            robot='arm', cameras=ROBOT.cameras, state_names=(), horizon=1, period_s=0.1,
            action_space=ActionSpace(name='eef', dimensions=('x',), units=('m',),
                                     lower=[lower], upper=[upper]))
        safe = Guard(robot).check(chunk([[value]]), now_ns=STAMP_NS)
    except ValueError:
        return
    slack = 1.1e-6 * (upper - lower)
    assert lower - slack <= safe.timed.actions.item() <= upper + slack
