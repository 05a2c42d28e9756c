"""Which chunks and commands may move a robot, and what happens to the others."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from meanflow_ros.core.contract import (
    ActionChunk, ActionSpace, CameraSpec, RobotSpec, SafeChunk, SafeCommand)
from meanflow_ros.core.guard import Guard, GuardSettings, Rejected
from meanflow_ros.core.limiter import Limiter
from meanflow_ros.core.limits import Limits

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
    (with_value(2, 1, 13.71), 'position', r"'grip' is 13.71 N at step 2, outside \[12.5, 13.7\]"),
    (with_value(0, 0, -0.3701), 'position', r'-0.3701 m at step 0, outside \[-0.37, 0.21\]'),
    (with_value(1, 0, 0.2101), 'position', "'x' is 0.2101 m at step 1"),
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
    assert caught.value.kind == 'position'


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


# Limits of change. One position and one rate, steps of 0.1 s, due from 0.1 s on.

FAST = RobotSpec(
    robot='arm', cameras=ROBOT.cameras, state_names=('q', 'w'), horizon=5, period_s=0.1,
    first_step=1, action_space=ActionSpace(
        name='mixed', dimensions=('q', 'v'), units=('rad', 'rad/s'), lower=[-2.0, -1.0],
        upper=[2.0, 1.0], max_velocity=[1.0, 5.0], max_acceleration=[8.0, 60.0],
        max_jerk=[200.0, np.inf], rates=('v',)))


def moving(q, v=(0.0,) * 5):
    return ActionChunk(actions=np.stack([q, v], axis=1), stamp_ns=0, period_s=0.1, first_step=1)


def guard(kind='', remedy='reject', **changes):
    return Guard(FAST, GuardSettings(remedies={kind: remedy} if kind else {}, **changes))


@pytest.mark.parametrize('q, v, kind, message', [
    ([0, 0.1, 0.2, 0.3, 0.41], [0] * 5, 'velocity', 'would reach 1.1 x its velocity limit of 1'),
    ([0, 0.09, 0.0, 0.09, 0.18], [0] * 5, 'acceleration', "'q' would reach 2.25 x"),
    ([0, 0.04, 0.0, 0.04, 0.08], [0] * 5, 'jerk', "'q' would reach 160 x"),
    ([0] * 5, [0, 0.51, 0.51, 0.51, 0.51], 'velocity', "'v' would reach 1.02 x"),
    ([0] * 5, [0, 0.4, 0.0, 0.0, 0.0], 'acceleration', "'v' would reach 1.33 x")])
def test_a_change_beyond_a_limit_rejects_the_chunk(q, v, kind, message):
    relaxed = {'velocity': {}, 'acceleration': {}, 'jerk': {'max_acceleration': [99.0, 60.0],
                                                             'max_jerk': [1.0, np.inf]}}[kind]
    robot = dataclasses.replace(FAST, action_space=dataclasses.replace(FAST.action_space,
                                                                        **relaxed))
    strict = Guard(robot)
    with pytest.raises(Rejected, match=message) as caught:
        strict.check(moving(q, v), now_ns=0)
    assert caught.value.kind == kind and strict.interventions == {kind: 1}


def test_a_slowed_chunk_keeps_its_path_and_its_first_due_time():
    slow = guard('velocity', 'slow')
    q = np.array([0.0, 0.15, 0.3, 0.45, 0.6])                       # 1.5 rad/s, 1 is allowed
    timed = slow.check(moving(q), now_ns=0).timed
    np.testing.assert_array_equal(timed.actions[:, 0], q)
    assert timed.due_ns[0] == 100_000_000
    np.testing.assert_allclose(np.diff(timed.due_ns), 150_000_000, rtol=1e-5)
    assert slow.interventions == {'velocity slowed': 1} and not slow.rejections


def test_a_slowed_rate_adds_up_to_the_same_path():
    slow = guard('velocity', 'slow')
    v = np.array([0.0, 0.8, 0.9, 0.8, 0.7])                          # 8 rad/s^2, 5 is allowed
    timed = slow.check(moving(np.zeros(5), v), now_ns=0).timed
    factor = np.diff(timed.due_ns)[0] / 1e8
    assert factor == pytest.approx(np.sqrt(8 / 5), rel=1e-4)
    np.testing.assert_allclose(timed.actions[:, 1] * factor, v, rtol=1e-6)
    steps = np.diff(timed.actions[:, 1]) / np.diff(timed.due_ns) * 1e9
    assert np.abs(steps).max() <= 5.0 * (1 + 1e-9)


def test_what_would_have_to_be_slowed_down_too_much_is_rejected():
    with pytest.raises(Rejected, match='would have to be 15 x slower'):
        guard('velocity', 'slow').check(moving(np.array([0, 1.5, 1.5, 1.5, 1.5])), now_ns=0)


def test_a_rate_that_cannot_be_0_is_not_slowed_out_of_its_limits():
    v = np.array([0.2, 0.8, 0.9, 0.8, 0.21])
    slow = guard('velocity', 'slow', workspace={'v': (0.2, 1.0)})
    with pytest.raises(Rejected, match="'v' would leave its limits, made 1.1 x slower") as caught:
        slow.check(moving(np.zeros(5), v), now_ns=0)
    assert caught.value.kind == 'position'


def test_a_clamped_chunk_may_begin_beyond_a_limit_by_rounding():
    clamp = guard('velocity', 'clamp')
    q = np.array([2.0 + 1e-9, 1.5, 1.5, 1.5, 1.5])
    timed = clamp.check(moving(q), now_ns=0).timed
    assert timed.actions[0, 0] == 2.0 and 1.5 < timed.actions[-1, 0] < 1.8
    low = guard().limits.lower[0]
    timed = clamp.check(moving(low - 1e-9 + np.array([0, 0.5, 0.5, 0.5, 0.5])), now_ns=0).timed
    assert timed.actions[0, 0] == low


@pytest.mark.parametrize('stamp_ns, period_s', [(2**63, 0.1), (-2**70, 0.1), (0, 1e300),
                                                (0, 1e308), (0, 1e-12)])
def test_times_that_cannot_be_are_a_value_error(stamp_ns, period_s):
    with pytest.raises(ValueError, match='due times|nanosecond apart'):
        guard().check(ActionChunk(actions=np.zeros((5, 2)), stamp_ns=stamp_ns, period_s=period_s),
                      now_ns=0)


def test_a_motion_that_is_no_number_is_not_continued():
    near = guard('first_step', 'clamp', first_step=np.array([0.05, np.inf]))
    for row in range(3):
        motion = np.zeros((3, 2))
        motion[row, 0] = np.nan
        with pytest.raises(Rejected):
            near.check(moving(np.full(5, 0.3)), now_ns=0, start=np.zeros(2), motion=motion)


def test_a_clamped_chunk_goes_the_same_way_within_the_limits_on_the_same_times():
    clamp = guard('velocity', 'clamp')
    timed = clamp.check(moving(np.array([0.0, 1.0, 1.0, 1.0, 1.0])), now_ns=0).timed
    q = timed.actions[:, 0]
    assert timed.due_ns.tolist() == [100_000_000 * step for step in range(1, 6)]
    assert q[0] == 0.0 and 0.2 < q[-1] <= 0.4 + 1e-9 and (np.diff(q) <= 0.1 + 1e-9).all()
    assert clamp.interventions == {'velocity clamped': 1}


@pytest.mark.parametrize('remedy', ['reject', 'clamp'])
def test_a_chunk_that_begins_away_from_the_robot(remedy):
    near = guard('first_step', remedy, first_step=np.array([0.05, np.inf]))
    far = moving(np.full(5, 0.3))
    near.check(far, now_ns=0, start=np.array([0.26, 0.9]))
    if remedy == 'reject':
        with pytest.raises(Rejected, match="'q' would begin at 0.3, the robot is at 0.2, at most "
                                           '0.05'):
            near.check(far, now_ns=0, start=np.array([0.2, 0.0]))
        return
    timed = near.check(far, now_ns=0, start=np.array([0.2, 0.0])).timed
    assert timed.actions[0, 0] == 0.2 and timed.actions[-1, 0] == pytest.approx(0.3, abs=0.01)
    assert near.interventions == {'first_step clamped': 1}


def test_a_clamped_first_step_continues_the_motion_that_is_under_way():
    near = guard('first_step', 'clamp', first_step=np.array([0.05, np.inf]))
    motion = np.array([[0.2, 0.0], [0.3, 0.0], [0.0, 0.0]])
    actions = near.check(moving(np.full(5, 1.5)), now_ns=60_000_000, start=np.array([0.15, 0.0]),
                         motion=motion).timed.actions
    # From 0.3 rad/s at 60 ms to 1 rad/s by 8 rad/s^2 at a jerk of 200 rad/s^3: at 100 ms still
    # on the way up, p + v s + j s^3 / 6, and no slower than the limit once it is reached.
    assert actions[0, 0] == pytest.approx(0.2 + 0.3 * 0.04 + 200 * 0.04**3 / 6)
    assert np.diff(actions[2:, 0]) == pytest.approx(0.1)
    late = near.check(moving(np.full(5, 1.5)), now_ns=100_000_000, start=np.array([0.15, 0.0]),
                      motion=motion).timed.actions
    assert late[0, 0] == pytest.approx(0.2, abs=1e-6)        # it is due now: where it is


def test_a_motion_that_is_under_way_until_later_is_continued_from_then_on():
    near = guard('first_step', 'clamp', first_step=np.array([0.05, np.inf]))
    motion = np.array([[0.2, 0.0], [0.3, 0.0], [0.0, 0.0]])
    when = {'motion': motion, 'motion_ns': np.array([170_000_000, 60_000_000])}
    actions = near.check(moving(np.full(5, 1.5)), now_ns=60_000_000, start=np.array([0.15, 0.0]),
                         **when).timed.actions
    # Until 170 ms at 0.3 rad/s, through 0.2 there; then as above, 30 ms at that jerk.
    assert actions[0, 0] == pytest.approx(0.2 - 0.3 * 0.07)
    assert actions[1, 0] == pytest.approx(0.2 + 0.3 * 0.03 + 200 * 0.03**3 / 6)
    assert np.diff(actions[3:, 0]) == pytest.approx(0.1)


def test_a_start_that_is_no_number_rejects_whatever_the_remedy():
    with pytest.raises(Rejected, match='first_step|would begin'):
        guard('first_step', 'clamp', first_step=np.array([0.05, 1.0])).check(
            moving(np.zeros(5)), now_ns=0, start=np.array([np.nan, 0.0]))


@pytest.mark.parametrize('remedy', ['reject', 'clamp'])
def test_a_workspace_is_a_box_inside_the_limits(remedy):
    boxed = guard('workspace', remedy, workspace={'q': (-0.1, 0.25)})
    path = moving(np.array([0.0, 0.1, 0.2, 0.26, 0.3]))
    if remedy == 'reject':
        with pytest.raises(Rejected, match=r"'q' is 0.26 rad at step 3, outside \[-0.1, 0.25\]"):
            boxed.check(path, now_ns=0)
        assert boxed.interventions == {'workspace': 1}
    else:
        assert boxed.check(path, now_ns=0).timed.actions[:, 0].tolist() == [
            0.0, 0.1, 0.2, 0.25, 0.25]
        assert boxed.interventions == {'workspace clamped': 1}
    with pytest.raises(ValueError, match="lower limit -3 of 'q' would loosen the present -2"):
        guard(workspace={'q': (-3.0, 0.0)})


def test_a_state_that_no_demonstration_came_near_rejects():
    familiar = guard(state_range=(np.array([-1.0, 0.0]), np.array([1.0, 4.0])), state_margin=0.5)
    familiar.check(moving(np.zeros(5)), now_ns=0, state=np.array([1.5, 5.0]))
    with pytest.raises(Rejected, match=r"'w' is at 5.01, the demonstrations were within \[0, 4\]"):
        familiar.check(moving(np.zeros(5)), now_ns=0, state=np.array([0.0, 5.01]))
    assert familiar.interventions == {'unfamiliar': 1}


@pytest.mark.parametrize('changes, message', [
    ({'remedies': {'position': 'slow'}}, r"'position' must be one of \('reject', 'clamp'"),
    ({'remedies': {'speed': 'slow'}}, "no remedy for 'speed'"),
    ({'remedies': {'jerk': 'ignore'}}, "got 'ignore'"), ({'max_slowdown': 0.5}, 'at least 1'),
    ({'state_margin': np.nan}, 'state_margin'), ({'first_step': np.ones(3)}, '2 numbers above 0')])
def test_senseless_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Guard(FAST, GuardSettings(**changes))


def test_parameters_cannot_loosen_what_the_checkpoint_says():
    loose = dataclasses.replace(Limits.of(FAST.action_space), upper=np.array([9.0, 9.0]),
                                velocity=np.array([0.5, 99.0]))
    limits = Guard(FAST, GuardSettings(limits=loose)).limits
    assert limits.upper.tolist() == [2.0, 1.0] and limits.velocity.tolist() == [0.5, 5.0]


# The stream of commands.

TICK_NS = 10_000_000
LIMITED = RobotSpec(
    robot='arm', cameras=ROBOT.cameras, state_names=(), horizon=1, period_s=0.1,
    action_space=ActionSpace(
        name='joints', dimensions=('a', 'b', 'c', 'd'), units=('rad',) * 4,
        lower=[-1.0, -0.3, 0.0, -2.0], upper=[1.0, 0.4, 0.05, 3.0],
        max_velocity=[1.0, 0.5, 0.1, np.inf], max_acceleration=[3.0, np.inf, 1.0, np.inf],
        max_jerk=[30.0, np.inf, np.inf, np.inf]))
START = np.array([0.1, 0.4, 0.0, -1.0])


def streamed(targets, ticks_ns=None):
    """Return the commands (N + 1, 4) that answer the targets, from START on."""
    stream = Guard(LIMITED)
    stream.stand(START)
    ticks_ns = ticks_ns or [TICK_NS * (1 + number) for number in range(len(targets))]
    return np.array([START, *(stream.command(target, now_ns=now, period_s=0.01).values
                              for target, now in zip(targets, ticks_ns))])


def require_within_limits(commands):
    space = LIMITED.action_space
    assert (commands >= space.lower - 1e-9).all() and (commands <= space.upper + 1e-9).all()
    values = np.concatenate([np.repeat(commands[:1], 3, axis=0), commands])
    for limit in (space.max_velocity, space.max_acceleration, space.max_jerk):
        values = np.diff(values, axis=0) / 0.01
        known = np.isfinite(limit)
        # Differences of numbers near 1 are exact to 1e-15; a third difference divides by 1e-6.
        assert (np.abs(values)[:, known] <= limit[known] * (1 + 1e-6) + 1e-6).all()


numbers = st.one_of(st.floats(), st.floats(-4, 4), st.sampled_from([-1e308, 1e308, 5e-324, 0.05]))
target = st.one_of(st.none(), arrays.arrays(np.float64, 4, elements=numbers),
                   arrays.arrays(np.float64, 3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(target, st.integers(1, 40)), min_size=1, max_size=8))
def test_no_targets_whatever_lead_the_stream_beyond_a_limit(runs):
    require_within_limits(streamed([value for value, count in runs for _ in range(count)]))


def test_the_stream_reaches_a_target_and_stays():
    commands = streamed([np.array([0.9, -0.2, 0.04, 2.5])] * 400)
    np.testing.assert_allclose(commands[-1], [0.9, -0.2, 0.04, 2.5], atol=1e-9)
    require_within_limits(commands)


@pytest.mark.parametrize('lower, upper', [(0.0021, 0.0133), (-3.07, -0.07), (-1.0, 1.0)])
@pytest.mark.parametrize('jerk', [np.inf, 20.0])
def test_the_stream_moves_wherever_its_range_lies(lower, upper, jerk):
    span = upper - lower
    limits = Limits(names=('g',), lower=[lower], upper=[upper], velocity=[span],
                    acceleration=[9 * span], jerk=[jerk * span])
    limiter = Limiter(limits, np.array([lower + 0.1 * span]))
    target = np.array([lower + 0.83 * span])
    commands = [limiter.step(target, 0.02) for _ in range(80)]
    np.testing.assert_allclose(commands[-1], target, atol=1e-6 * span)


@pytest.mark.parametrize('speed', [0.3, -0.11])
def test_a_target_that_moves_away_is_met_as_soon_as_possible_without_a_step_back(speed):
    acceleration, period_s = 3.0, 0.005
    limits = Limits(names=('g',), lower=[-9.0], upper=[9.0], velocity=[1.0],
                    acceleration=[acceleration], jerk=[np.inf])
    limiter, times = Limiter(limits, np.array([0.7])), period_s * np.arange(1, 80)
    path = 0.7 + speed * times
    commands = np.array([limiter.step(np.array([target]), period_s, np.array([speed]))[0]
                         for target in path])
    # Seen from the target: it falls behind until it is as fast, and comes back to it and stops.
    met = times > abs(speed) / acceleration * (1 + np.sqrt(2))
    assert 10 < met.sum() and np.abs(commands - path)[met].max() < 1e-9
    assert np.abs(commands - path)[~met][:-1].min() > 1e-6
    assert (np.diff(commands) * np.sign(speed) > 0).all()
    assert np.abs(np.diff(commands, 2)).max() <= acceleration * period_s**2 * (1 + 1e-9)


@pytest.mark.parametrize('acceleration', [1.6, -1.6])
def test_a_stop_stays_within_the_limits_however_long_it_is_followed(acceleration):
    limits = Limits(names=('g',), lower=[11.5], upper=[12.25], velocity=[np.inf],
                    acceleration=[1.6], jerk=[1200.0])
    limiter = Limiter(limits, np.array([12.2328318]))
    limiter.move(limiter.position, np.zeros(1), np.array([acceleration]))
    assert 11.5 <= limiter.step(None, 6.3e9)[0] <= 12.25       # 200 years


def test_a_dimension_without_limits_of_change_follows_at_once():
    assert streamed([np.array([0.0, 0.0, 0.0, 2.5])])[1, 3] == 2.5


def test_a_slow_path_is_followed_closely():
    seconds = np.arange(1, 200) * 0.01
    path = 0.1 + 0.4 * (1 - np.cos(seconds))
    commands = streamed([np.array([q, 0.4, 0.0, -1.0]) for q in path])[1:, 0]
    assert np.abs(commands[20:] - path[20:]).max() < 0.4 * 0.011      # about one period behind


def test_commands_that_come_early_late_or_twice_do_not_move_more():
    ticks = [10, 12, 12, 11, 40, 41, 300, 310, 315]
    commands = streamed([np.array([1.0, -0.3, 0.05, 3.0])] * len(ticks),
                        [1_000_000 * tick for tick in ticks])
    moved = np.abs(np.diff(commands[:, :3], axis=0))
    passed_s = np.maximum(np.diff([0, *ticks]), 0) / 1e3
    assert (moved <= LIMITED.action_space.max_velocity[:3] * passed_s[:, None] + 1e-9).all()
    assert (moved[[2, 3]] == 0).all() and moved[-1].max() > 0


def test_a_target_that_is_no_number_stops_and_counts():
    stream = Guard(LIMITED)
    stream.stand(START)
    fast = [stream.command(np.array([1.0, 0.4, 0.0, -1.0]), now_ns=TICK_NS * n, period_s=0.01)
            for n in range(1, 40)][-1].values[0]
    values = [stream.command(np.full(4, np.nan), now_ns=TICK_NS * n, period_s=0.01).values[0]
              for n in range(40, 140)]
    assert stream.interventions == {'not_finite': 100}
    assert fast < values[-1] < 1.0 and values[-1] == pytest.approx(values[-2], abs=1e-12)


def test_a_clamped_start_outside_the_limits_rejects():
    guard = Guard(LIMITED, GuardSettings(first_step=np.full(4, 0.01),
                                         remedies={'first_step': 'clamp'}))
    chunk = ActionChunk(actions=np.array([[0.0, 0.0, 0.01, 0.0]]), stamp_ns=0, period_s=0.1)
    guard.check(chunk, now_ns=0, start=np.array([0.5, 0.401, 0.0, 0.0]))
    with pytest.raises(Rejected, match="'a' is at 1.5, outside its limits"):
        guard.check(chunk, now_ns=0, start=np.array([1.5, 0.0, 0.0, 0.0]))


def test_after_a_gap_a_rate_begins_at_nothing():
    rates = dataclasses.replace(LIMITED, action_space=dataclasses.replace(
        LIMITED.action_space, rates=('b',)))
    stream, target = Guard(rates), np.array([0.1, 0.3, 0.0, 0.0])
    stream.stand(np.array([0.1, 0.0, 0.0, 0.0]))
    for tick in range(1, 100):
        before = stream.command(target, now_ns=tick * TICK_NS, period_s=0.01).values
    after = stream.command(target, now_ns=106 * TICK_NS, period_s=0.01).values
    assert before[1] == pytest.approx(0.3) and after[1] <= 0.005 + 1e-9


def test_after_the_last_command_of_a_stream_none_needs_to_come():
    rates = dataclasses.replace(LIMITED, action_space=dataclasses.replace(
        LIMITED.action_space, rates=('b',)))
    stream = Guard(rates)
    stream.stand(np.array([0.1, 0.0, 0.0, 0.0]))
    for tick in range(1, 40):
        moving = stream.command(np.array([0.9, 0.3, 0.04, 1.0]), now_ns=tick * TICK_NS,
                                period_s=0.01).values
    last = stream.last_command(now_ns=40 * TICK_NS, period_s=0.01).values
    assert moving[1] > 0.1 and last[1] == 0.0
    assert moving[0] < last[0] <= moving[0] + 0.01 and last[3] == 1.0


def test_a_stream_begins_where_the_robot_stands_and_not_outside_its_limits():
    stream = Guard(LIMITED)
    with pytest.raises(RuntimeError, match='stand'):
        stream.command(START, now_ns=0, period_s=0.01)
    stream.stand(np.array([1.019, 0.0, 0.0, 0.0]))
    command = stream.command(None, now_ns=TICK_NS, period_s=0.01)
    assert isinstance(command, SafeCommand) and command.values[0] == 1.0
    for bad in (1.03, np.nan, -np.inf):
        with pytest.raises(Rejected, match="'a' is at .*, outside its limits"):
            stream.stand(np.array([bad, 0.0, 0.0, 0.0]))


def test_only_the_guard_makes_a_command():
    with pytest.raises(TypeError, match='only the guard'):
        SafeCommand(values=START, stamp_ns=0, space=LIMITED.action_space)
