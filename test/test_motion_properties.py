"""Whatever happens to a Motion, and in whatever order, its commands stay within the limits.

The commands are checked by differences and by a controller that follows the trajectories' cubics:
nothing here is the guard's.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

from controllers import JointTrajectoryController, nanoseconds  # noqa: E402, I001
from test_motion import MS, Driven, robot  # noqa: E402

from meanflow_ros.core.contract import ActionChunk  # noqa: E402
from meanflow_ros.core.guard import Rejected  # noqa: E402
from meanflow_ros.ros.motion_config import (  # noqa: E402
    ForwardCommandOutput, GripperOutput, JointTrajectoryOutput, MotionConfig, read_mode)

NAMES = ('arm', 'elbow', 'grip', 'turn')   # a trajectory; streamed: measured, unmeasured, a rate
TRAJECTORY, STREAM = '/trajectory', ('/elbow', '/grip', '/turn')
LOWER, UPPER = np.array([-1.3, -0.4, 0.01, -0.9]), np.array([1.1, 2.1, 0.09, 0.9])
VELOCITY, ACCELERATION = np.array([1.1, 1.7, 0.2, 4.0]), np.array([7.0, 9.0, 3.0, 50.0])
PERIOD_S, STEP_S, STANDING = 0.02, 0.05, 5
ROUNDING = 1e-5

SPEC = dataclasses.replace(
    robot(NAMES, ['arm', 'elbow'], rates=['turn'], gripper=['grip']), horizon=8)
SPEC = dataclasses.replace(SPEC, action_space=dataclasses.replace(
    SPEC.action_space, lower=LOWER, upper=UPPER, max_velocity=VELOCITY,
    max_acceleration=ACCELERATION))
NEUTRAL = dict(zip(NAMES, (0.1, 0.2, 0.05, 0.0)))
extremes = st.one_of(st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e300, 5e-324, 1e-9,
                                      *LOWER, *UPPER, *(UPPER + 1e-8)]), st.floats())
shares = st.tuples(*[st.floats(0, 1)] * 4).map(lambda share: LOWER + share * (UPPER - LOWER))


class Hostilities(RuleBasedStateMachine):
    """A robot whose stream is followed at once, and a controller of trajectories."""

    @initialize(remedy=st.sampled_from(['reject', 'clamp', 'slow']),
                first=st.sampled_from(['reject', 'clamp']),
                box=st.sampled_from(['reject', 'clamp']),
                action=st.sampled_from(['hold', 'decelerate', 'neutral']))
    def begin(self, remedy, first, box, action):
        config = MotionConfig(
            outputs=(JointTrajectoryOutput(topic=TRAJECTORY, dimensions=('arm',)),
                     ForwardCommandOutput(topic='/elbow', dimensions=('elbow',)),
                     GripperOutput(topic='/grip', dimension='grip'),
                     ForwardCommandOutput(topic='/turn', dimensions=('turn',))),
            control_rate_hz=1 / PERIOD_S, safe_action=action, neutral=NEUTRAL, stop_s=0.2,
            deadline_s=0.3, first_step={'arm': 0.1, 'elbow': 0.1},
            remedies={'velocity': remedy, 'acceleration': remedy, 'position': box,
                      'first_step': first})
        self.driven = Driven(SPEC, config)
        self.motion, self.wire = self.driven.motion, self.driven.wire
        self.position = np.array([0.2, 0.5, 0.05, 0.0])       # of the robot
        self.renew_controller()
        self.seen = 0                  # messages that were checked
        self.felt = np.full(2, np.nan)
        self.lied, self.trusted_ns = True, None
        self.before = None             # stamp, values, their change, and the length of its period
        stand = self.motion.guard.stand
        self.stood = None

        def stands(position):
            stand(position)
            self.stood = np.clip(position, LOWER, UPPER)
            elbow, grip, turn = position[1:]
            assert turn == 0 and (np.isnan(self.felt[1]) or elbow == self.felt[1])
            assert self.before is None or grip == self.before[1][1]
        self.motion.guard.stand = stands

    def renew_controller(self):
        self.arm = JointTrajectoryController(['arm'], self.position[:1])
        self.arm._before = self.wire.now_ns / 1e9, self.position[:1], np.zeros(1)
        self.arm._times = np.array([self.wire.now_ns / 1e9])
        self.trusted_ns = None         # from when on it follows what it was sent

    @rule(goal=shares, speed=st.sampled_from([0.0, 0.2, 0.9, 5.0]), late=st.integers(0, 120))
    def chunk(self, goal, speed, late):
        self.chunk_towards(goal, speed, late)

    def chunk_towards(self, goal, speed, late):
        """Accept a chunk towards a place, from where the robot is, or at once."""
        here = np.append(self.position[:3], 0.0)
        way = np.arange(1, 9)[:, None] * STEP_S * speed * VELOCITY
        actions = here + np.clip(goal - here, -way, way) if speed else np.tile(goal, (8, 1))
        self.accept(actions, self.wire.now_ns - late * MS)

    @rule(goal=shares, speed=st.sampled_from([0.0, 0.3, 0.9]), count=st.integers(2, 12),
          delay=st.sampled_from([0, 0, 60]), swing=st.booleans())
    def follow(self, goal, speed, count, delay, swing):
        """Chunk after chunk, as a policy sends them; with a swing they contradict each other."""
        for number in range(count):
            self.feel()
            self.chunk_towards(goal if not swing or number % 3 else LOWER + UPPER - goal,
                               speed, delay)
            self.pass_ticks(3)

    @rule(goal=shares, bad=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3), extremes),
                                      min_size=1, max_size=4),
          stamp=st.sampled_from([0, -10**18, 10**10, 2**62, 2**63, -2**70]))
    def hostile_chunk(self, goal, bad, stamp):
        actions = np.tile(goal, (8, 1))
        for step, dimension, value in bad:
            actions[step, dimension] = value
        self.accept(actions, self.wire.now_ns + stamp)

    @rule(shape=st.sampled_from([(0, 4), (1, 4), (8, 3), (9, 4), (8, 0)]))
    def misshapen_chunk(self, shape):
        with pytest.raises(Rejected):
            self.motion.accept(ActionChunk(actions=np.full(shape, 0.05), period_s=STEP_S,
                                           stamp_ns=self.wire.now_ns, first_step=1),
                               now_ns=self.wire.now_ns)
            raise Rejected('shape', 'it was discarded')      # just silenced

    def accept(self, actions, stamp_ns):
        try:
            self.motion.accept(ActionChunk(actions=actions, stamp_ns=stamp_ns, period_s=STEP_S,
                                           first_step=1), now_ns=self.wire.now_ns)
        except ValueError:
            pass                       # Rejected, or times that cannot be
        self.look()

    @rule()
    def feel(self):
        self.felt, self.lied = self.position[:2].copy(), False
        self.motion.feel(self.felt)

    @rule(values=st.tuples(extremes, extremes))
    def feel_what_is_wrong(self, values):
        self.felt, self.lied = np.array(values), True
        self.motion.feel(self.felt)

    @rule(ticks=st.integers(1, 25), late=st.sampled_from([0] * 6 + [1, 19, 90, 200, 700]),
          feels=st.booleans())
    def pass_time(self, ticks, late, feels):
        self.wire.now_ns += late * MS
        self.pass_ticks(ticks, feels)

    def pass_ticks(self, ticks, feels=False):
        for _ in range(ticks):
            self.wire.now_ns += round(PERIOD_S * 1e9)
            self.position[:1] = self.arm.state(self.wire.now_ns)[0]
            if feels:
                self.feel()
            self.motion.tick(self.wire.now_ns)
            self.look()

    @rule(what=st.sampled_from(['tick', 'hold', 'halt', 'silence', 'silence', 'gone', 'clock']),
          reason=st.sampled_from(['instruction', 'reset', 'disabled']),
          ms=st.sampled_from([0, 7]), ticks=st.sampled_from([0, 3, 12, 40]),
          jump_ms=st.sampled_from([-10**9, -3000, -20, 1100, 10**7]))
    def disturb(self, what, reason, ms, ticks, jump_ms):
        """Tick early, hold, halt, silence, lose the controllers for a while, or the clock."""
        self.wire.now_ns += ms * MS
        self.position[:1] = self.arm.state(self.wire.now_ns)[0]
        if what == 'tick':
            self.motion.tick(self.wire.now_ns)
        elif what == 'hold':
            self.motion.hold()
        elif what == 'halt':
            self.motion.halt(reason, self.wire.now_ns)
        elif what == 'silence':
            self.motion.silence('emergency stop', self.wire.now_ns)
        elif what == 'gone':
            self.wire.connected = False
            self.renew_controller()
            self.pass_ticks(ticks)
            self.wire.connected = True
        else:
            self.wire.now_ns += jump_ms * MS
            self.renew_controller()
            self.motion.clock_jumped(self.wire.now_ns)
        self.look(last=what in ('silence', 'clock'))

    @rule(text=st.sampled_from(['open_loop', 'receding_horizon', 'receding_horizon:3',
                                'ensemble:0.1', 'ensemble:0.5:newest_first', 'real_time:2']))
    def execution(self, text):
        self.motion.timeline.mode = read_mode(text)

    # What has been published since the last look.

    def look(self, last=False):
        messages, self.seen = self.wire.sent[self.seen:], len(self.wire.sent)
        stream = {topic: message.data for topic, _, message in messages if topic in STREAM}
        if stream:
            assert len(messages) - sum(topic == TRAJECTORY for topic, _, _ in messages) == 3
            self.command(np.concatenate([stream[topic] for topic in STREAM]), last)
        for topic, _, message in messages:
            if topic == TRAJECTORY:
                self.trajectory(message)

    def command(self, values, last):
        """Check a command of elbow, grip and turn against the one before."""
        low, high, now_ns = LOWER[1:], UPPER[1:], self.wire.now_ns
        assert (values >= low - 1e-9).all() and (values <= high + 1e-9).all()
        passed_s, nothing = PERIOD_S, np.zeros(3)
        if self.stood is not None:     # a stream begins: where it is measured, or where it ended
            held, self.stood = self.stood[1:], None
            change_before, period_before = nothing, 0.0
        else:
            stamp_ns, held, change_before, period_before = self.before
            passed_s = (now_ns - stamp_ns) / 1e9
            if passed_s > STANDING * PERIOD_S:
                held, change_before, period_before = held * [1, 1, 0], nothing, 0.0
        moved = values - held
        if last:                       # rates are 0 at once
            assert values[2] == 0
            moved[2], change_before = 0.0, change_before * [1, 1, 0]
        if passed_s <= 0:
            assert np.abs(moved).max() == 0
            self.before = self.before[0], values, change_before, period_before
            return
        period_s = min(passed_s, PERIOD_S)
        change = moved / period_s
        assert (np.abs(change) <= VELOCITY[1:] * (1 + ROUNDING)).all()
        # From a stand, a stop or another mean velocity, in the middles of two periods.
        between_s = (period_s + period_before) / 2
        assert (np.abs(change - change_before)
                <= ACCELERATION[1:] * between_s * (1 + ROUNDING) + 1e-7).all()
        self.before = now_ns, values, change, period_s
        self.position[1:] = values

    def trajectory(self, message):
        """Check the points and what the controller does that follows them."""
        now_ns, low, high = self.wire.now_ns, LOWER[:1], UPPER[:1]
        positions = np.array([point.positions for point in message.points])
        assert np.isfinite(positions).all()
        slack = 1.1e-6 * (high - low)
        assert (positions >= low - slack).all() and (positions <= high + slack).all()
        starts = [nanoseconds(point.time_from_start) for point in message.points]
        assert nanoseconds(message.header.stamp) == now_ns and starts[0] > 0
        trusted = (not self.lied and self.trusted_ns is not None and now_ns >= self.trusted_ns)
        if not trusted:
            self.trusted_ns = now_ns + starts[0]
        if not self.wire.connected:    # nobody receives it
            self.trusted_ns = None
            return
        self.arm.receive(message, now_ns)
        assert self.arm.rejected == []
        begin = 0 if trusted else starts[0]
        for at in np.unique(np.linspace(begin, starts[-1], 97).astype(np.int64)):
            position, velocity = self.arm.state(now_ns + int(at))
            assert (position >= low - 1e-5).all() and (position <= high + 1e-5).all()
            assert (np.abs(velocity) <= VELOCITY[:1] * (1 + 1e-4)).all(), (velocity, at, starts)


TestHostilities = Hostilities.TestCase
TestHostilities.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck))
