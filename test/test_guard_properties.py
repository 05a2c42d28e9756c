"""Whatever a chunk, a state, a time or a plan is, what the guard lets pass is within the limits.

The limits are checked by divided differences of what has passed: nothing here is the guard's.
"""

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from meanflow_ros.core.contract import (
    ActionChunk, ActionSpace, CameraSpec, RobotSpec, SafeChunk, TimedActions)
from meanflow_ros.core.guard import REMEDIES, Guard, GuardSettings, Rejected
from meanflow_ros.core.timeline import StopAlongPath

PERIOD_S, HORIZON = 0.07, 6
STAMP_NS = 1_700_000_000_123_456_789
STATE_RANGE = np.array([-1.1, 0.3]), np.array([0.9, 2.7])
SLACK, ROUNDING = 1e-6, 2e-6      # share of the range that the guard allows; of a limit
LOWER, UPPER = np.array([-2.1, -0.7, 11.5]), np.array([1.9, 1.3, 12.25])
SPAN = UPPER - LOWER


def robot(velocity, acceleration, jerk):
    """Return a joint, a rate and a gripper; the limits are of the joint, the others' follow."""
    scale = np.array([1.0, 3.0, 0.4])
    return RobotSpec(
        robot='arm', cameras=(CameraSpec(name='wrist', width=4, height=3),),
        state_names=('q', 'w'), horizon=HORIZON, period_s=PERIOD_S, first_step=1,
        action_space=ActionSpace(
            name='mixed', dimensions=('q', 'v', 'g'), units=('rad', 'rad/s', 'm'), lower=LOWER,
            upper=UPPER, max_velocity=velocity * scale, max_acceleration=acceleration * scale,
            max_jerk=jerk * scale, rates=('v',)))


def require_within(timed, space, low=LOWER, high=UPPER):
    """Require that steps keep the limits, those of change between one another."""
    actions, times = timed.actions, (timed.due_ns - timed.due_ns[0]) / 1e9
    assert np.isfinite(actions).all() and (np.diff(times) > 0).all()
    slack = SLACK * (high - low) * (1 + 1e-6)
    assert (actions >= low - slack).all() and (actions <= high + slack).all()
    values = actions
    for limit in (space.max_velocity, space.max_acceleration, space.max_jerk):
        if len(values) < 2:
            return
        values = np.diff(values, axis=0) / np.diff(times)[:, None]
        times = (times[1:] + times[:-1]) / 2
        assert (np.abs(values) <= limit * (1 + ROUNDING) + 1e-6).all()


EXTREMES = [np.nan, np.inf, -np.inf, 1e300, -1e300, 1.7e308, 5e-324, -5e-324, 0.0, -0.0,
            *LOWER, *UPPER, *(LOWER - 0.9e-6 * SPAN), *(UPPER + 0.9e-6 * SPAN),
            *(UPPER + 1.1e-6 * SPAN), *(LOWER - 0.009 * SPAN)]
hostile = st.one_of(st.sampled_from(EXTREMES), st.floats())
vectors = arrays.arrays(np.float64, 3, elements=hostile)
shares = st.floats(-0.2, 1.2)
inside = st.tuples(shares, shares, shares).map(lambda share: LOWER + np.array(share) * SPAN)
anything = st.one_of(vectors, inside)


@st.composite
def paths(draw, size=HORIZON):
    """Draw actions (size, 3): a path that bends, by a little or by much, with a few bad values."""
    rows = np.arange(size)[:, None]
    share = np.array(draw(st.tuples(shares, shares, shares)))
    slope, bend = (draw(st.sampled_from([0.0, 1e-4, 0.003, -0.02, 0.05, -0.4]))
                   for _ in range(2))
    actions = LOWER + SPAN * (share + slope * rows + bend * rows ** 2)
    if draw(st.booleans()):
        actions = np.clip(actions, LOWER, UPPER)
    for step, dimension, value in draw(st.lists(st.tuples(
            st.integers(0, size - 1), st.integers(0, 2), hostile), max_size=2)):
        actions[step, dimension] = value
    return actions


robots = st.builds(robot, st.sampled_from([0.6, 3.0, np.inf]),
                   st.sampled_from([4.0, 40.0, np.inf]),
                   st.sampled_from([60.0, 3000.0, np.inf]))
remedies = st.fixed_dictionaries({kind: st.sampled_from(known)
                                  for kind, known in REMEDIES.items()})
workspaces = st.sampled_from([{}, {'q': (-1.0, 0.9)}, {'v': (0.1, 1.2)}, {'g': (11.7, 12.0)}])
DUE_NS = [STAMP_NS + 70_000_000 * (step + 1) for step in range(HORIZON)]
times_ns = st.one_of(
    st.sampled_from([*DUE_NS, STAMP_NS, 0, -1, 2**62, -2**62, 2**63 - 1, -2**63, 2**64, -2**70]),
    st.integers(STAMP_NS - 10**10, STAMP_NS + 10**9))


@settings(max_examples=500, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(spec=robots, remedies=remedies, workspace=workspaces, now_ns=times_ns, data=st.data(),
       actions=st.one_of(paths(), arrays.arrays(np.float64, (HORIZON, 3), elements=hostile)))
def test_what_passes_is_within_all_limits_whatever_the_remedies(
        spec, remedies, workspace, now_ns, data, actions):
    first_step = data.draw(st.none() | st.just(np.array([0.05, np.inf, 0.2])), 'first_step')
    start, state = data.draw(st.none() | anything, 'start'), data.draw(
        st.none() | arrays.arrays(np.float64, 2, elements=hostile), 'state')
    motion = data.draw(st.none() | st.tuples(
        anything, st.just(np.zeros(3)) | vectors, st.just(np.zeros(3)) | vectors).map(np.array),
        'motion')
    guard = Guard(spec, GuardSettings(
        remedies=remedies, workspace=workspace, first_step=first_step, state_range=STATE_RANGE,
        state_margin=data.draw(st.sampled_from([0.5, np.inf]), 'state_margin')))
    low, high = LOWER.copy(), UPPER.copy()
    for name, box in workspace.items():
        index = spec.action_space.dimensions.index(name)
        low[index], high[index] = box
    chunk = ActionChunk(actions=actions, stamp_ns=STAMP_NS, period_s=PERIOD_S, first_step=1)
    try:
        safe = guard.check(chunk, now_ns=now_ns, start=start, state=state, motion=motion)
    except Rejected as error:
        assert guard.rejections == {error.kind: 1}
        return
    assert isinstance(safe, SafeChunk) and not guard.rejections
    require_within(safe.timed, spec.action_space, low, high)
    assert safe.timed.due_ns[0] >= now_ns


@st.composite
def plans(draw):
    """Draw what a timeline may hand out: gaps of any length, seams, values that are not safe."""
    size = draw(st.integers(1, HORIZON))
    gaps = draw(st.lists(st.sampled_from([1_000_000, 20_000_000, 70_000_000, 900_000_000]),
                         min_size=size, max_size=size))
    return TimedActions(stamp_ns=STAMP_NS, due_ns=STAMP_NS + np.cumsum(gaps),
                        actions=draw(paths(size)))


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(spec=robots, plan=plans(), lead_ns=st.sampled_from([1_000_000, 30_000_000, 10**9]),
       begin=st.none() | st.tuples(inside, arrays.arrays(np.float64, 3, elements=st.floats(
           -50, 50) | st.sampled_from([0.0, np.nan, 5e-324]))))
@example(spec=robot(0.6, 4.0, 60.0), lead_ns=10**6, begin=None, plan=TimedActions(
    stamp_ns=0, due_ns=[1], actions=[[np.nan, 0.0, 12.0]]))
def test_a_plan_that_passes_is_within_the_limits_of_position_and_velocity(
        spec, plan, lead_ns, begin):
    guard = Guard(spec)
    start = begin and (int(plan.due_ns[0]) - lead_ns, *begin)
    try:
        timed = guard.check_plan(plan, start).timed
    except Rejected as error:
        assert guard.rejections == {error.kind: 1}
        return
    np.testing.assert_array_equal(timed.due_ns, plan.due_ns)
    require_slow_enough(timed, spec)


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(spec=robots, plan=plans(), now_ns=st.integers(STAMP_NS - 10**9, STAMP_NS + 10**9),
       motion=st.tuples(inside, inside, inside).map(np.array), stop_s=st.floats(0.001, 3),
       later=st.lists(st.integers(-10**9, 5 * 10**9), max_size=4))
def test_what_follows_a_path_and_stops_along_it_is_within_the_limits(
        spec, plan, now_ns, motion, stop_s, later):
    guard = Guard(spec)
    try:
        safe = guard.check_plan(plan).timed
    except Rejected:
        return
    followed = guard.follow(safe, now_ns=now_ns, motion=motion)
    require_slow_enough(followed, spec)
    stop = StopAlongPath(followed, start_ns=now_ns, stop_s=stop_s, is_rate=np.array([0, 1, 0]) > 0)
    rest = None
    for at_ns in [*(now_ns + shift for shift in later), now_ns + 10**10, 2**62]:
        command = stop.at(at_ns)
        assert (command >= LOWER - SLACK * SPAN).all() and (command <= UPPER + SLACK * SPAN).all()
        rest, before = command, rest
    assert rest[1] == 0.0
    np.testing.assert_array_equal(rest, before)


def require_slow_enough(timed, spec):
    """Require positions within the limits, and mean velocities between the steps."""
    slack = SLACK * SPAN * (1 + 1e-6)
    assert np.isfinite(timed.actions).all()
    assert (timed.actions >= LOWER - slack).all() and (timed.actions <= UPPER + slack).all()
    speed = np.abs(np.diff(timed.actions, axis=0)) / np.diff(timed.due_ns)[:, None] * 1e9
    assert (speed <= spec.action_space.max_velocity * (1 + ROUNDING) + 1e-6).all()


@given(actions=st.lists(hostile, min_size=3, max_size=3),
       stamp_ns=st.one_of(st.integers(), st.sampled_from([2**62, 2**63, -2**63])),
       period_s=st.floats(), now_ns=times_ns)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_time_whatever_raises_more_than_a_value_error(actions, stamp_ns, period_s, now_ns):
    try:
        Guard(robot(np.inf, np.inf, np.inf)).check(ActionChunk(
            actions=[actions] * HORIZON, stamp_ns=stamp_ns, period_s=period_s), now_ns=now_ns)
    except ValueError:
        return
