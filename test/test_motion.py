"""From chunks to controllers: the three example robots against controllers' documented rules."""

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

from controllers import (  # noqa: E402, I001
    ForwardCommandController, JointTrajectoryController, Servo, nanoseconds)
from std_msgs.msg import Header  # noqa: E402

from meanflow_ros.core.contract import (  # noqa: E402
    ActionChunk, ActionSpace, CameraSpec, RobotSpec)
from meanflow_ros.core.guard import Guard, Rejected  # noqa: E402
from meanflow_ros.core.timeline import OpenLoop, RecedingHorizon  # noqa: E402
from meanflow_ros.ros.motion import Motion  # noqa: E402
from meanflow_ros.ros.motion_config import (  # noqa: E402
    ForwardCommandOutput, GripperOutput, JointJogOutput, JointTrajectoryOutput, MotionConfig,
    TwistOutput, read_mode, read_motion)
from meanflow_ros.ros.outputs import ends_at_rest, make_output, with_velocities  # noqa: E402

CONFIG = Path(__file__).parents[1] / 'config'
MS = 1_000_000
START_NS = 1_700_000_000_000_000_000


def robot(dimensions, states, *, rates=(), gripper=(), low=-2.5, high=2.5, **limits):
    size = len(dimensions)
    return RobotSpec(
        robot='arm', cameras=(CameraSpec(name='wrist', width=4, height=3),),
        state_names=tuple(states), horizon=16, period_s=0.05, first_step=1,
        action_space=ActionSpace(name='space', dimensions=tuple(dimensions), units=('1',) * size,
                                 lower=[low] * size, upper=[high] * size, rates=tuple(rates),
                                 gripper=tuple(gripper), **limits))


PANDA = [f'panda_joint{number}' for number in range(1, 8)]
FRANKA = robot([*PANDA, 'gripper'], PANDA, gripper=['gripper'])
AXES = ['vx', 'vy', 'vz', 'wx', 'wy', 'wz']
UR = robot([*AXES, 'gripper'], ['j'], rates=AXES, gripper=['gripper'], low=-1.0, high=1.0)
ARM = ['waist', 'shoulder', 'elbow', 'forearm_roll', 'wrist_angle', 'wrist_rotate']
LEFT, RIGHT = ([f'{side}_{joint}' for joint in ARM] for side in ('left', 'right'))
ALOHA = robot([*LEFT, 'left_gripper', *RIGHT, 'right_gripper'], [*LEFT, *RIGHT],
              gripper=['left_gripper', 'right_gripper'])


class Wire:
    """Stands for DDS: what an output publishes goes to a receiver at once."""

    def __init__(self):
        self.receivers, self.sent, self.now_ns, self.connected = {}, [], START_NS, True
        self.gid = 1                   # of the subscription of a node `controller`

    def get_subscriptions_info_by_topic(self, topic):
        return [types.SimpleNamespace(endpoint_gid=[self.gid], node_namespace='/',
                                      node_name='controller')] * self.connected

    def create_publisher(self, kind, topic, depth):
        wire = self

        class Publisher:
            def publish(self, message):
                assert isinstance(message, kind)
                wire.sent.append((topic, wire.now_ns, message))
                if topic in wire.receivers:
                    wire.receivers[topic].receive(message, wire.now_ns)

            def get_subscription_count(self):
                return int(wire.connected)

        Publisher.topic_name = topic
        return Publisher()


class Driven:
    """A Motion on a fake clock, with its wire."""

    def __init__(self, spec, config, mode=None, **receivers):
        if isinstance(config, str):
            config = read_motion(CONFIG / config)
        self.wire, self.spec, self.config = Wire(), spec, config
        self.wire.receivers = receivers
        outputs = [make_output(self.wire, output, spec.action_space) for output in config.outputs]
        self.motion = Motion(spec, config, Guard(spec, config.guard_settings(spec)),
                             mode or RecedingHorizon(), outputs)

    @property
    def now_ns(self):
        return self.wire.now_ns

    def chunk(self, values):
        """Accept a chunk that answers a picture of now; values: (T, A) or a function of s."""
        if callable(values):
            due_s = (np.arange(16) + 1) * 0.05 + (self.now_ns - START_NS) / 1e9
            values = np.stack([values(second) for second in due_s])
        return self.motion.accept(
            ActionChunk(actions=values, stamp_ns=self.now_ns, period_s=0.05, first_step=1),
            now_ns=self.now_ns)

    def run(self, seconds, each=lambda: None):
        """Tick at the control rate."""
        period_ns = round(1e9 * self.config.period_s)
        for _ in range(round(seconds * 1e9 / period_ns)):
            self.wire.now_ns += period_ns
            self.motion.tick(self.now_ns)
            each()


def wave(amplitude, size, rate=1.0):
    """Return a function of time in s: a slow start into a cosine, the same for all joints."""
    return lambda s: np.full(size, amplitude * (1 - np.cos(rate * s)))


def test_a_franka_follows_chunks_through_its_trajectory_controller_without_a_jump():
    arm = JointTrajectoryController(PANDA, np.zeros(7))
    gripper = ForwardCommandController(1)
    driven = Driven(FRANKA, 'motion_franka.yaml',
                    **{'/joint_trajectory_controller/joint_trajectory': arm,
                       '/gripper_controller/commands': gripper})
    driven.motion.feel(np.zeros(7))
    path = wave(0.2, 8)
    driven.chunk(path)
    states = []
    for _ in range(12):
        driven.run(0.2, lambda: states.append(arm.state(driven.now_ns)[0][0]))
        driven.motion.feel(arm.state(driven.now_ns)[0])
        driven.chunk(path)
    assert arm.rejected == [] and driven.motion.guard.interventions == {}
    times = 0.02 * np.arange(1, len(states) + 1)
    np.testing.assert_allclose(states, 0.2 * (1 - np.cos(times)), atol=0.003)
    assert np.abs(np.diff(states, 2)).max() < 0.0006           # no jump where chunks meet
    assert gripper.values[0] == pytest.approx(path(2.4)[0], abs=0.02) and gripper.rejected == 0


class Late:
    """A controller that gets its trajectories some time after they were sent."""

    def __init__(self, controller, late_ns):
        self.controller, self._late_ns, self._on_their_way = controller, late_ns, []

    def receive(self, message, now_ns):
        self._on_their_way.append((now_ns + self._late_ns, message))

    def state(self, now_ns):
        while self._on_their_way and self._on_their_way[0][0] <= now_ns:
            at_ns, message = self._on_their_way.pop(0)
            self.controller.receive(message, at_ns)
        return self.controller.state(now_ns)


def to_and_fro(late_ms, lead_s, every_ms=33, acceleration=7.0, seconds=3):
    """Return the set-point and its velocity every ms: chunks call a joint to and fro.

    The states that they answer are those of the controller.
    """
    arm = Late(JointTrajectoryController(['q'], [0.0]), late_ms * MS)
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',), lead_s=lead_s), arm, 1.1,
                     acceleration)
    course = []
    for now_ms in range(1000 * seconds):
        driven.wire.now_ns += MS
        course.append([value[0] for value in arm.state(driven.now_ns)])
        if now_ms % every_ms == 0:
            driven.motion.feel(np.array(course[-1][:1]))
            driven.chunk(np.full((16, 1), 1.5 if now_ms // 500 % 2 == 0 else -1.5))
        if now_ms % 20 == 0:
            driven.motion.tick(driven.now_ns)
    assert arm.controller.rejected == []
    return np.array(course).T


@pytest.mark.parametrize('lead_s, late_ms', [
    (0.05, 10), (0.05, 25), (0.05, 48), (0.1, 20), (0.1, 50)])
def test_when_within_its_lead_a_trajectory_reaches_the_controller_does_not_matter(lead_s, late_ms):
    in_time = to_and_fro(0, lead_s)
    late = to_and_fro(late_ms, lead_s)
    for positions, velocities in (in_time[:, 300:], late[:, 300:]):
        assert np.abs(velocities).max() <= 1.1 * (1 + 1e-6)
        assert np.ptp(positions) > 0.3
        # Cubics exceed the acceleration between points 50 ms apart, but nothing jumps.
        assert np.abs(np.diff(velocities)).max() <= 4 * 7.0 * 0.001
    # The first one begins at once, and is made up for: from then on the courses are one.
    np.testing.assert_allclose(late[0, 300:], in_time[0, 300:], atol=0.004)


@pytest.mark.parametrize('every_ms', [15, 33, 100])
@pytest.mark.parametrize('lead_s, acceleration', [(0.05, 7.0), (0.2, 7.0), (0.2, 0.7)])
def test_a_robot_whose_chunks_come_faster_than_the_lead_begins_to_move(
        every_ms, lead_s, acceleration):
    positions, velocities = to_and_fro(0, lead_s, every_ms, acceleration, seconds=1)
    # From rest to 0.05 within the limits, and the lead.
    assert positions[round(1000 * (lead_s + np.sqrt(2 * 0.05 / acceleration) + 0.15))] > 0.05
    assert np.abs(velocities).max() <= 1.1 * (1 + 1e-6)


def test_a_trajectory_ends_at_rest_ahead_of_now_with_every_joint():
    driven = Driven(FRANKA, 'motion_franka.yaml')
    driven.wire.now_ns += 3
    driven.chunk(wave(0.2, 8))
    message = driven.wire.sent[0][2]
    assert message.joint_names == PANDA
    starts = [point.time_from_start.sec * 10**9 + point.time_from_start.nanosec
              for point in message.points]
    assert starts[0] == 50 * MS and len(starts) == 16
    assert list(message.points[-1].velocities) == [0.0] * 7
    assert message.points[7].velocities[0] == pytest.approx(0.2 * np.sin(0.4), rel=0.01)


def test_a_trajectory_may_end_in_motion_where_the_controller_allows_it():
    config = read_motion(CONFIG / 'motion_franka.yaml')
    free = dataclasses.replace(config, outputs=(
        dataclasses.replace(config.outputs[0], end_velocity='any'),))
    strict, lenient = (JointTrajectoryController(PANDA, np.zeros(7), nonzero_end_velocity=allowed)
                       for allowed in (False, True))
    for receiver in (strict, lenient):
        Driven(FRANKA, free, **{'/joint_trajectory_controller/joint_trajectory': receiver}).chunk(
            wave(0.2, 8))
    assert strict.rejected == ['ends in motion'] and lenient.rejected == []


@pytest.mark.parametrize('distribution, declared, at_rest', [
    ('humble', 'auto', False), ('iron', 'auto', True), ('kilted', 'auto', True),
    (None, 'auto', True), ('jazzy', 'any', False), ('humble', 'zero', True)])
def test_how_a_trajectory_ends_goes_by_the_distribution_or_by_what_is_declared(
        monkeypatch, distribution, declared, at_rest):
    monkeypatch.delenv('ROS_DISTRO', raising=False)
    if distribution:
        monkeypatch.setenv('ROS_DISTRO', distribution)
    assert ends_at_rest(declared) is at_rest


points = st.lists(st.tuples(*[st.floats(-1, 1)] * 2), min_size=2, max_size=9)


@given(points, st.lists(st.integers(1, 300), min_size=8, max_size=8), st.booleans())
def test_between_points_no_cubic_leaves_their_range_or_a_velocity_limit(points, gaps, to_rest):
    positions, limit = np.array(points), np.array([0.7, 3.0])
    due_ns = np.cumsum([5, *gaps[:len(points) - 1]]) * MS
    slowest = np.abs(np.diff(positions, axis=0) / np.diff(due_ns)[:, None] * 1e9) / limit
    stretched_ns, velocities = with_velocities(due_ns, positions, limit, to_rest=to_rest)
    assert stretched_ns[0] == due_ns[0] and (np.diff(stretched_ns) >= np.diff(due_ns) - 1).all()
    assert (stretched_ns[-1] - due_ns[0] <= (1 + max(1, slowest.max()) * (
        due_ns[-1] - due_ns[0]) * 2.25 + len(gaps)))
    follower = JointTrajectoryController(['a', 'b'], positions[0], nonzero_end_velocity=True)
    follower._times = stretched_ns / 1e9
    follower._points = list(zip(positions, velocities))
    for first, (start, end) in enumerate(zip(stretched_ns, stretched_ns[1:])):
        low, high = np.sort(positions[first:first + 2], axis=0)
        for now_ns in np.linspace(start, end, 9)[:-1].round().astype(int):
            position, velocity = follower.state(int(now_ns))
            assert (position >= low - 1e-6).all() and (position <= high + 1e-6).all()
            assert (np.abs(velocity) <= limit * (1 + 1e-4)).all()


def test_a_steady_path_keeps_its_times_but_for_the_last_one_and_its_velocity():
    positions = np.array([[0.1], [0.2], [0.3], [0.4]])
    due_ns = 100 * MS * np.arange(1, 5)
    times_ns, velocities = with_velocities(due_ns, positions, np.array([1.1]), to_rest=True)
    np.testing.assert_allclose(times_ns, [100 * MS, 200 * MS, 300 * MS, 450 * MS], atol=1)
    np.testing.assert_allclose(velocities[:, 0], [1.0, 1.0, 0.8, 0.0])
    times_ns, velocities = with_velocities(due_ns, positions, np.array([0.5]), to_rest=False)
    np.testing.assert_allclose(times_ns, 100 * MS + 200 * MS * np.arange(4), atol=1)
    np.testing.assert_allclose(velocities[:, 0], 0.5)


def test_a_robot_of_joint_rates_jogs_through_servo(monkeypatch):
    class JointJog:
        def __init__(self, joint_names, velocities):
            self.header = Header()
            self.joint_names, self.velocities = joint_names, velocities

    monkeypatch.setitem(sys.modules, 'control_msgs.msg', types.SimpleNamespace(JointJog=JointJog))
    config = MotionConfig(outputs=(JointJogOutput(
        topic='/servo_node/delta_joint_cmds', dimensions=('wz', 'vx'), joints=('j6', 'j1'),
        frame_id='base'),))
    driven = Driven(UR, config)
    driven.chunk(steady(TWIST))
    driven.run(0.1)
    topic, at_ns, message = driven.wire.sent[-1]
    assert topic == '/servo_node/delta_joint_cmds' and message.joint_names == ['j6', 'j1']
    assert message.velocities == [-0.4, 0.1] and message.header.frame_id == 'base'
    assert nanoseconds(message.header.stamp) == at_ns == driven.now_ns


def test_an_output_whose_messages_are_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'control_msgs.msg', None)
    with pytest.raises(ValueError, match='install ros-.ROS_DISTRO-control-msgs'):
        make_output(Wire(), JointJogOutput(topic='t', dimensions=('vx',)), UR.action_space)


def test_without_a_chunk_the_arm_decelerates_on_its_path_and_rests():
    arm = JointTrajectoryController(PANDA, np.zeros(7))
    driven = Driven(FRANKA, 'motion_franka.yaml',
                    **{'/joint_trajectory_controller/joint_trajectory': arm})
    driven.chunk(wave(0.2, 8))
    driven.run(0.5)
    assert driven.motion.stopped is None
    states = []
    driven.run(1.5, lambda: states.append(arm.state(driven.now_ns)[0][0]))
    assert driven.motion.stopped == 'no chunk' and driven.motion.stops == {'no chunk': 1}
    assert arm.rejected == []
    velocity = np.diff(states) / 0.02
    assert (velocity > -1e-9).all() and velocity[-30:].max() < 1e-9
    # At 0.52 s, beyond the deadline, the stop is sent; its lead later it begins, and goes on for
    # half of stop_s of the path, which would have gone on to 0.8 s.
    assert states[-1] == pytest.approx(0.2 * (1 - np.cos(0.57 + 0.2)), abs=2e-4)


def servo():
    receiver = Servo()
    driven = Driven(UR, 'motion_ur_servo.yaml', **{'/servo_node/delta_twist_cmds': receiver})
    return receiver, driven


def steady(values):
    return np.tile(values, (16, 1))


TWIST = np.array([0.1, -0.05, 0.2, 0.3, 0.0, -0.4, 0.9])


def test_a_ur_moves_through_servo_with_fresh_stamps_and_bounded_acceleration():
    receiver, driven = servo()
    velocities = []
    for _ in range(5):
        driven.chunk(steady(TWIST))
        driven.run(0.2, lambda: velocities.append(receiver.velocity(driven.now_ns)))
    velocities = np.array(velocities)
    np.testing.assert_allclose(velocities[-1], TWIST[:6], atol=1e-6)
    assert receiver.stale == 0
    acceleration = np.diff(velocities, axis=0, prepend=0) / 0.01
    assert (np.abs(acceleration) <= np.array([1.5] * 3 + [3.0] * 3) * (1 + 1e-6)).all()


def test_a_ur_without_chunks_comes_to_rest_and_the_stream_ends():
    receiver, driven = servo()
    for _ in range(3):
        driven.chunk(steady(TWIST))
        driven.run(0.2)
    driven.run(0.4)
    assert driven.motion.stopped == 'no chunk'
    driven.run(0.8)
    np.testing.assert_allclose(receiver.velocity(driven.now_ns), 0.0, atol=1e-9)
    driven.run(1.5)
    count = len(driven.wire.sent)
    driven.run(0.5)
    assert len(driven.wire.sent) == count


def test_a_binary_gripper_changes_with_hysteresis():
    _, driven = servo()
    said = []
    for value in (0.9, 0.5, 0.25, 0.5, 0.65, 0.75):
        driven.chunk(steady(np.array([0.0] * 6 + [value])))
        driven.run(0.3)
        said.append([message.data for topic, _, message in driven.wire.sent
                     if topic == '/gripper/closed'][-1])
    assert said == [False, False, True, True, True, False]


def test_a_binary_gripper_is_told_nothing_before_a_threshold_has_been_crossed():
    _, driven = servo()
    said = []
    for value in (0.5, 0.6, 0.25, 0.5):       # a node that starts while something is held
        driven.chunk(steady(np.array([0.0] * 6 + [value])))
        driven.run(0.3)
        said.append({message.data for topic, _, message in driven.wire.sent
                     if topic == '/gripper/closed'})
    assert said == [set(), set(), {True}, {True}]
    assert {topic for topic, _, _ in driven.wire.sent} == {'/servo_node/delta_twist_cmds',
                                                           '/gripper/closed'}


def test_an_aloha_is_split_over_four_controllers_in_their_own_order():
    receivers = {'/left_arm_controller/commands': ForwardCommandController(6),
                 '/left_gripper_controller/commands': ForwardCommandController(1),
                 '/right_arm_controller/commands': ForwardCommandController(6),
                 '/right_gripper_controller/commands': ForwardCommandController(1)}
    driven = Driven(ALOHA, 'motion_aloha.yaml', **receivers)
    driven.motion.feel(np.zeros(12))
    goal = np.arange(14) / 100
    for _ in range(4):
        driven.chunk(steady(goal))
        driven.run(0.3)
    parts = [receiver.values for receiver in receivers.values()]
    np.testing.assert_allclose(parts[0], goal[:6], atol=1e-9)
    np.testing.assert_allclose(parts[1], goal[6:7])
    np.testing.assert_allclose(parts[2], goal[7:13], atol=1e-9)
    np.testing.assert_allclose(parts[3], goal[13:])
    assert sum(receiver.rejected for receiver in receivers.values()) == 0


def test_a_stream_begins_where_the_robot_is_and_not_where_the_policy_wants_it():
    arm = ForwardCommandController(6)
    driven = Driven(ALOHA, 'motion_aloha.yaml', **{'/left_arm_controller/commands': arm})
    driven.motion.feel(np.full(12, 0.5))
    driven.chunk(steady(np.full(14, -0.5)))
    driven.run(0.02)
    assert (np.abs(arm.values - 0.5) <= 2.0 * 0.02).all()      # not a jump of one radian
    driven.run(0.3)
    assert (arm.values < 0.4).all()


def test_an_aloha_that_is_asked_for_what_lies_beyond_its_grippers_opens_them_within_their_limits():
    gripper = ForwardCommandController(1)
    driven = Driven(ALOHA, 'motion_aloha.yaml', **{'/left_gripper_controller/commands': gripper})
    driven.motion.feel(np.zeros(12))
    seen = []
    for value in (-0.4, 1.7, 1.7):             # beyond closed and beyond open
        driven.chunk(steady(np.append(np.zeros(13), 0.5)
                            + value * (np.arange(14) == ALOHA.action_space.dimensions.index(
                                'left_gripper'))))
        driven.run(0.4, lambda: seen.append(gripper.values[0]))
    assert driven.motion.guard.interventions['position clamped'] == 3
    assert min(seen) >= 0 and max(seen) <= 1 and seen[-1] == pytest.approx(1.0)
    assert np.abs(np.diff(seen)).max() <= 4.0 * 0.02 * (1 + 1e-6)


def test_the_neutral_pose_of_an_aloha_is_complete_and_within_its_limits():
    config = dataclasses.replace(read_motion(CONFIG / 'motion_aloha.yaml'), safe_action='neutral')
    config.check(ALOHA)
    limits = config.guard_settings(ALOHA).limits
    neutral = config.neutral_command(ALOHA)
    assert (neutral >= limits.lower).all() and (neutral <= limits.upper).all()


def test_nothing_is_sent_before_the_first_chunk():
    for name, spec in (('motion_franka.yaml', FRANKA), ('motion_ur_servo.yaml', UR)):
        driven = Driven(spec, name)
        driven.run(1.0)
        assert driven.wire.sent == []


def test_an_instruction_halts_and_voids_what_was_inferred_for_the_old_one():
    receiver, driven = servo()
    for _ in range(3):
        driven.chunk(steady(TWIST))
        driven.run(0.2)
    epoch = driven.motion.timeline.epoch
    driven.motion.halt('instruction', driven.now_ns)
    late = ActionChunk(actions=steady(TWIST), stamp_ns=driven.now_ns, period_s=0.05, first_step=1)
    assert driven.motion.accept(late, now_ns=driven.now_ns, epoch=epoch) is None
    driven.run(0.5)
    np.testing.assert_allclose(receiver.velocity(driven.now_ns), 0.0, atol=1e-9)
    assert driven.motion.timeline.discarded == {'instruction': 1}
    driven.chunk(steady(TWIST))
    driven.run(0.4)
    assert receiver.velocity(driven.now_ns)[0] == pytest.approx(0.1, abs=1e-6)


def test_a_slow_model_is_not_voided_by_its_own_deadline():
    receiver, driven = servo()
    epoch = driven.motion.timeline.epoch
    driven.chunk(steady(TWIST))
    driven.run(0.6)
    assert driven.motion.stopped == 'no chunk'
    chunk = ActionChunk(actions=steady(TWIST), stamp_ns=driven.now_ns, period_s=0.05, first_step=1)
    assert driven.motion.accept(chunk, now_ns=driven.now_ns, epoch=epoch) is not None
    assert driven.motion.stopped is None


def test_silence_is_one_last_command_and_then_none():
    receiver, driven = servo()
    driven.chunk(steady(TWIST))
    driven.run(0.3)
    count = len(driven.wire.sent)
    driven.motion.silence('emergency stop', driven.now_ns)
    assert len(driven.wire.sent) == count + 2                   # one for each output
    driven.run(0.5)
    assert len(driven.wire.sent) == count + 2
    np.testing.assert_array_equal(receiver.velocity(driven.now_ns), np.zeros(6))


@pytest.mark.parametrize('execution, late_ms', [
    ('receding_horizon', 0), ('receding_horizon', 70), ('ensemble', 40)])
def test_chunks_replaced_at_every_picture_reach_a_far_target_as_soon_as_the_limits_permit(
        execution, late_ms):
    arm, speed, acceleration, goal = ForwardCommandController(1), 1.1, 7.0, 1.5
    driven = clamped(ForwardCommandOutput(topic='t', dimensions=('q',)), arm, speed, acceleration,
                     mode=read_mode(execution))
    course = np.array([0.0, *replaced(driven, lambda: 0.0 if arm.values is None else
                                      arm.values[0], goal, late_ms)])
    reached_s = 0.02 * np.argmax(course > goal - 1e-3)
    # The first chunk begins to be followed within two periods of 50 ms, and 20 ms is one command.
    assert 0 <= reached_s - (goal / speed + speed / acceleration) <= 0.15
    # Between steps of 50 ms the target goes on a line: past the goal by less than one of them.
    assert course[-1] == pytest.approx(goal, abs=1e-6)
    assert course.max() <= goal + acceleration * 0.05**2 / 2
    velocity = np.diff(course) / 0.02
    assert np.abs(velocity).max() <= speed * (1 + 1e-6)
    assert np.abs(np.diff(velocity)).max() <= acceleration * 0.02 * (1 + 1e-6)


@pytest.mark.parametrize('late_ms', [0, 70])
def test_a_trajectory_replaced_at_every_picture_reaches_a_far_target_too(late_ms):
    arm, speed, acceleration, goal = JointTrajectoryController(['q'], [0.0]), 1.1, 7.0, 1.5
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',)), arm, speed, acceleration)
    course = np.array(replaced(driven, lambda: arm.state(driven.now_ns)[0][0], goal, late_ms))
    reached_s = 0.02 * np.argmax(course > goal - 1e-3)
    assert abs(reached_s - (goal / speed + speed / acceleration)) <= 0.2
    assert course[-1] == pytest.approx(goal, abs=1e-6)
    assert course.max() <= goal + acceleration * 0.05**2 / 2
    assert np.abs(np.diff(course) / 0.02).max() <= speed * (1 + 1e-6) and arm.rejected == []


def clamped(output, receiver, speed, acceleration, mode=None, first_step='clamp'):
    """Return a joint `q` at 0 whose chunks may begin anywhere."""
    config = MotionConfig(outputs=(output,), control_rate_hz=50.0, first_step={'q': 0.05}, limits={
        'velocity': {'q': speed}, 'acceleration': {'q': acceleration}}, remedies={
            'velocity': 'clamp', 'acceleration': 'clamp', 'first_step': first_step})
    return Driven(robot(['q'], ['q']), config, mode=mode, t=receiver)


def replaced(driven, position, goal, late_ms, seconds=2.2):
    """Send a chunk for the goal every 33 ms; return the positions every 20 ms."""
    course = []
    for now_ms in range(round(1000 * seconds)):
        driven.wire.now_ns += MS
        if now_ms % 33 == 0:
            driven.motion.feel(np.array([position()]))
            driven.motion.accept(ActionChunk(
                actions=np.full((16, 1), goal), stamp_ns=driven.now_ns - late_ms * MS,
                period_s=0.05, first_step=1), now_ns=driven.now_ns)
        if now_ms % 20 == 0:
            driven.motion.tick(driven.now_ns)
            course.append(position())
    return course


def test_a_stream_whose_joint_is_astray_continues_from_where_it_is_measured():
    arm = ForwardCommandController(1)
    driven = clamped(ForwardCommandOutput(topic='t', dimensions=('q',)), arm, 1.1, 7.0)
    replaced(driven, lambda: 0.0 if arm.values is None else arm.values[0], 1.5, 40)
    for felt, begins in ((1.3, 1.5), (1.1, 1.1)):   # 0.05 and 0.2 s at 1.1 rad/s are 0.27 rad
        driven.motion.feel(np.array([felt]))
        safe = driven.chunk(np.full((16, 1), -1.0))
        fallen = 7.0 * 0.05**2 / 2
        assert safe.timed.actions[0, 0] == pytest.approx(begins - fallen, abs=1e-6)


def test_a_trajectory_begins_within_the_limits_from_where_the_controller_is():
    arm = JointTrajectoryController(PANDA, np.zeros(7))
    driven = Driven(FRANKA, 'motion_franka.yaml',
                    **{'/joint_trajectory_controller/joint_trajectory': arm})
    driven.motion.feel(np.zeros(7))
    velocities, limit = [], driven.motion.guard.limits.velocity[:7]
    for number in range(30):                 # chunks that contradict each other, states 0.1 s old
        felt = arm.state(driven.now_ns)[0]
        driven.run(0.1, lambda: velocities.append(arm.state(driven.now_ns)[1]))
        driven.motion.feel(felt)
        sign = 1 if number % 2 else -1
        driven.chunk(lambda s: np.append(felt + sign * 0.1 * np.sin(9 * s - 0.45), 0.1))
    assert arm.rejected == [] and np.abs(velocities).max() > 0.2
    assert (np.abs(velocities) <= limit * (1 + 1e-6)).all()


def test_a_joint_that_is_not_where_it_was_sent_stops_the_robot_until_it_stays_there():
    arm = JointTrajectoryController(PANDA, np.zeros(7))
    driven = Driven(FRANKA, 'motion_franka.yaml',
                    **{'/joint_trajectory_controller/joint_trajectory': arm})
    driven.motion.feel(np.zeros(7))
    driven.chunk(steady(np.zeros(8)))
    moved = np.array([0.0, 0.0, 0.0, 0.61, 0.0, 0.0, 0.0])
    driven.motion.feel(moved)
    goal = steady(np.append(moved, 0.0))
    for _ in range(19):
        with pytest.raises(Rejected, match="'panda_joint4' is 0.61 away from where it was sent"):
            driven.chunk(goal)
        driven.run(0.1)
    assert driven.motion.stopped == 'no chunk'
    driven.run(0.3)
    driven.chunk(goal)
    assert driven.wire.sent[-1][2].points[0].positions[3] == pytest.approx(0.61)


@pytest.mark.parametrize('felt', [1e300, -2.6])
@pytest.mark.parametrize('first_step', ['reject', 'clamp'])
def test_a_joint_that_is_measured_outside_its_limits_is_never_believed_to_be_there(
        felt, first_step):
    arm, sent = JointTrajectoryController(['q'], [0.0]), []
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',)), arm, 1.1, 7.0,
                     first_step=first_step)
    for begins in (0.0, 0.03):
        driven.motion.feel(np.array([begins]))
        driven.chunk(lambda s: np.array([0.03]))
        driven.run(0.3)
    for _ in range(30):                      # 3 s: what is astray is believed after 2 s
        driven.motion.feel(np.array([felt]))
        with pytest.raises(Rejected, match='outside its limits: move the robot inside'):
            driven.chunk(lambda s: np.array([felt / abs(felt) * 2.5]))
        driven.run(0.1, lambda: sent.append(arm.state(driven.now_ns)))
    assert driven.motion.stopped == 'no chunk' and driven.motion.guard.rejections['astray'] == 0
    assert np.abs(np.array(sent)[:, 0] - 0.03).max() < 1e-3


@pytest.mark.parametrize('felt', [1e300, 2.0])
def test_the_stop_of_a_trajectory_follows_it_and_not_a_state_that_has_long_been_astray(felt):
    arm, course = JointTrajectoryController(['q'], [0.0]), []
    driven = Driven(dataclasses.replace(robot(['q'], ['q']), period_s=0.2), MotionConfig(
        outputs=(JointTrajectoryOutput(topic='t', dimensions=('q',)),), deadline_s=5.0, limits={
            'velocity': {'q': 1.1}, 'acceleration': {'q': 7.0}}), t=arm)

    def chunk():
        driven.motion.accept(ActionChunk(
            actions=0.1 * (np.arange(16.0)[:, None] + 1), stamp_ns=driven.now_ns, period_s=0.2,
            first_step=1), now_ns=driven.now_ns)

    driven.motion.feel(np.zeros(1))
    chunk()
    driven.run(0.5)
    driven.motion.feel(np.array([felt]))
    with pytest.raises(Rejected):
        chunk()
    driven.run(2.1)
    position, velocity = (value[0] for value in arm.state(driven.now_ns))
    driven.motion.halt('disabled', driven.now_ns)
    driven.run(1.0, lambda: course.append(arm.state(driven.now_ns)))
    assert velocity == pytest.approx(0.5) and course[-1][1] == 0.0
    assert np.abs(np.array(course)[:, 1]).max() <= 1.1
    assert position < course[-1][0][0] < position + 0.5 * driven.config.stop_s


@pytest.mark.parametrize('restarted', [False, True])
def test_a_controller_that_starts_late_gets_no_trajectory_ahead_of_where_it_stands(restarted):
    arm, position = JointTrajectoryController(['q'], [0.0]), 0.0
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',)), arm, 1.1, 7.0)
    if restarted:                            # on its way, and the stop reaches nobody
        replaced(driven, lambda: arm.state(driven.now_ns)[0][0], 1.5, 0, seconds=0.8)
        position, driven.wire.connected = arm.state(driven.now_ns)[0][0], False
        del driven.wire.receivers['t']
        driven.run(1.0)
        driven.wire.connected = True
        driven.run(0.2)
    late = [JointTrajectoryController(['q'], [position])]
    driven.wire.receivers['t'] = waiting = Waiting()
    replaced(driven, lambda: position, 1.5, 0, seconds=0.35)
    for message in waiting.messages:         # all at once
        late[0].receive(message, driven.now_ns)
    driven.wire.receivers['t'] = late[0]
    course = replaced(driven, lambda: late[0].state(driven.now_ns)[0][0], 1.5, 0)
    assert np.abs(np.diff([position, *course]) / 0.02).max() <= 1.1 * (1 + 1e-6)
    assert course[-1] == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize('gone_s', [0.05, 0.3])
def test_a_controller_that_is_started_again_unnoticed_is_not_sent_on_a_way_it_does_not_know(
        gone_s):
    arm = JointTrajectoryController(['q'], [0.0])
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',)), arm, 1.1, 7.0)
    before = replaced(driven, lambda: arm.state(driven.now_ns)[0][0], 1.5, 0, seconds=0.8)
    position = arm.state(driven.now_ns)[0]
    del driven.wire.receivers['t']
    driven.motion.feel(position)
    driven.run(gone_s)
    driven.wire.gid += 1                     # there was a subscriber all the time
    driven.wire.receivers['t'] = arm = JointTrajectoryController(['q'], position)
    course, refused = [], 0
    for _ in range(150):
        driven.motion.feel(arm.state(driven.now_ns)[0])
        try:
            driven.chunk(np.full((16, 1), 1.5))
        except Rejected as error:
            assert 'started again' in str(error)
            refused += 1
        driven.run(0.02, lambda: course.append(arm.state(driven.now_ns)[0][0]))
    assert refused > 5 and np.abs(np.diff([position[0], *course]) / 0.02).max() <= 1.1
    assert before[-1] < 1.0 and course[-1] == pytest.approx(1.5, abs=1e-6)


def test_a_node_that_subscribes_besides_the_controller_changes_nothing():
    arm = JointTrajectoryController(['q'], [0.0])
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',)), arm, 1.1, 7.0)
    alone = driven.wire.get_subscriptions_info_by_topic

    def two(topic):
        echo = types.SimpleNamespace(endpoint_gid=[99], node_namespace='/', node_name='echo')
        return alone(topic) + [echo] * (driven.now_ns - START_NS > 400 * MS)

    driven.wire.get_subscriptions_info_by_topic = two
    course = replaced(driven, lambda: arm.state(driven.now_ns)[0][0], 1.5, 0)
    assert course[-1] == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize('stops', [True, False])
def test_a_first_trajectory_whose_motion_has_not_been_measured_yet_is_continued(stops):
    arm, course = JointTrajectoryController(['q'], [0.0]), [0.0]
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',)), arm, 1.1, 7.0)
    driven.motion.feel(np.zeros(1))
    driven.chunk(lambda s: np.array([1.5]))
    driven.run(0.3, lambda: course.append(arm.state(driven.now_ns)[0][0]))
    if stops:
        driven.motion.halt('disabled', driven.now_ns)
    else:                                    # it answers a picture from before the motion
        driven.chunk(lambda s: np.array([1.5]))
    driven.run(0.4, lambda: course.append(arm.state(driven.now_ns)[0][0]))
    velocity = np.diff(course) / 0.02
    assert velocity.max() <= 1.1 * (1 + 1e-6) and velocity.min() >= -1e-9
    assert course[15] > 0.1 and course[-1] > course[15]


def test_after_the_clock_has_jumped_ahead_a_trajectory_begins_where_the_robot_is_measured():
    arm, course = JointTrajectoryController(['q'], [0.0]), []
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',)), arm, 1.1, 7.0)
    replaced(driven, lambda: arm.state(driven.now_ns)[0][0], 0.2, 0, seconds=0.2)
    position = arm.state(driven.now_ns)[0]
    sent = len(driven.wire.sent)
    driven.wire.now_ns += 10_000 * MS         # the controller has a clock of its own
    driven.motion.clock_jumped(driven.now_ns)
    assert len(driven.wire.sent) == sent
    driven.wire.receivers['t'] = arm = JointTrajectoryController(['q'], position)
    course = replaced(driven, lambda: arm.state(driven.now_ns)[0][0], 0.2, 0)
    assert np.abs(np.diff([position[0], *course]) / 0.02).max() <= 1.1 * (1 + 1e-6)


@pytest.mark.parametrize('ticked_s, stepped_s, begins', [
    (0.1, 0.0, 0.2),         # its last trajectory has just ended
    (0.3, 0.0, 0.23),        # it has stood there
    (0.0, 10.0, 0.2)])       # a step of the clock within it, and a state from before: so it seems
def test_a_robot_that_was_seen_to_stand_begins_where_it_is_measured(ticked_s, stepped_s, begins):
    arm = JointTrajectoryController(['q'], [0.0])
    driven = clamped(JointTrajectoryOutput(topic='t', dimensions=('q',)), arm, 1.1, 7.0)
    replaced(driven, lambda: arm.state(driven.now_ns)[0][0], 0.2, 0)
    while not stepped_s and driven.now_ns <= driven.motion.outputs[0].end_ns:
        driven.run(0.02)
    driven.run(ticked_s)
    driven.wire.now_ns += round(stepped_s * 1000) * MS
    driven.motion.feel(np.array([0.23]))
    driven.chunk(np.full((16, 1), 0.2))
    first = driven.wire.sent[-1][2].points[0]
    assert first.positions[0] == pytest.approx(begins, abs=1e-6) and first.velocities[0] == 0.0


class Waiting:
    """A controller that is subscribed, and receives nothing yet."""

    def __init__(self):
        self.messages = []

    def receive(self, message, now_ns):
        self.messages.append(message)


def test_after_silence_a_stream_waits_until_the_robot_stands_and_goes_on_from_there():
    gripper = ForwardCommandController(1)
    driven = Driven(ALOHA, 'motion_aloha.yaml', **{'/left_gripper_controller/commands': gripper})
    driven.motion.feel(np.zeros(12))
    driven.chunk(steady(np.full(14, 0.4)))      # grippers are not measured
    driven.run(0.3)
    held = gripper.values.copy()
    driven.motion.silence('emergency stop', driven.now_ns)
    assert driven.chunk(steady(np.full(14, -0.4))) is None
    assert driven.motion.timeline.discarded['silenced'] == 1
    driven.run(0.2)
    driven.chunk(steady(np.full(14, -0.4)))
    count = len(driven.wire.sent)
    driven.run(driven.config.period_s)
    assert len(driven.wire.sent) > count
    assert np.abs(gripper.values - held).max() < 0.2       # not the jump of 0.8 to the new chunk


@pytest.mark.parametrize('output, receiver', [
    (ForwardCommandOutput, ForwardCommandController(1)),
    (JointTrajectoryOutput, JointTrajectoryController(['q'], [0.0]))])
def test_while_it_is_silenced_again_and_again_a_robot_does_not_begin_to_move(output, receiver):
    driven = clamped(output(topic='t', dimensions=('q',)), receiver, 1.1, 7.0)

    def chunk():
        driven.motion.feel(np.atleast_1d(receiver.values if output.streams else
                                         receiver.state(driven.now_ns)[0]))
        return driven.chunk(np.full((16, 1), 1.5))

    driven.motion.feel(np.zeros(1))
    driven.chunk(np.full((16, 1), 1.5))
    driven.run(0.3)
    driven.motion.silence('robot_description', driven.now_ns)
    count = len(driven.wire.sent)
    for _ in range(30):
        driven.run(0.04)
        assert chunk() is None
        driven.motion.silence('robot_description', driven.now_ns)
    assert len(driven.wire.sent) == count and not driven.motion.moving
    driven.run(0.12)
    assert chunk() is not None and driven.motion.moving


def test_the_last_command_of_a_velocity_that_is_held_is_zero():
    config = MotionConfig(outputs=(ForwardCommandOutput(topic='v', dimensions=('vx',)),),
                          limits={'acceleration': {'vx': 0.5}})
    velocity = ForwardCommandController(1)
    driven = Driven(UR, config, v=velocity)
    for _ in range(4):
        driven.chunk(steady(TWIST))
        driven.run(0.2)
    assert velocity.values > 0.08
    driven.motion.silence('emergency stop', driven.now_ns)
    assert velocity.values == 0.0


@pytest.mark.parametrize('action', ['decelerate', 'hold'])
def test_a_stream_that_lags_far_behind_its_chunk_stops_where_it_is_and_not_at_its_end(action):
    arm, speed, acceleration, stop_s = ForwardCommandController(1), 1.1, 7.0, 0.3
    config = MotionConfig(
        outputs=(ForwardCommandOutput(topic='t', dimensions=('q',)),), control_rate_hz=50.0,
        stop_s=stop_s, safe_action=action, limits={'velocity': {'q': speed},
                                                   'acceleration': {'q': acceleration}})
    driven = Driven(robot(['q'], ['q']), config, t=arm)
    driven.motion.feel(np.zeros(1))
    course = []
    for _ in range(15):
        driven.chunk(np.full((16, 1), 2.4))
        driven.run(0.04, lambda: course.append(arm.values[0]))
    driven.motion.halt('disabled', driven.now_ns)
    begun = len(course)
    driven.run(0.5, lambda: course.append(arm.values[0]))
    assert driven.motion.rests
    way = speed * stop_s / 2 if action == 'decelerate' else 0.0
    assert course[-1] - course[begun - 1] == pytest.approx(way, abs=0.05 * speed + 0.03)
    velocity = np.diff(course) / 0.02
    assert velocity[begun - 2] == pytest.approx(speed) and velocity[-1] == 0.0
    assert np.abs(np.diff(velocity)).max() <= acceleration * 0.02 * (1 + 1e-6)


def test_a_stream_that_is_far_from_neutral_can_be_held_where_it_is_within_the_limits():
    arm, speed, acceleration = ForwardCommandController(1), 1.1, 7.0
    driven = clamped(ForwardCommandOutput(topic='t', dimensions=('q',)), arm, speed, acceleration)
    driven.motion.config = dataclasses.replace(driven.config, safe_action='neutral',
                                               neutral={'q': -2.0})
    course = replaced(driven, lambda: 0.0 if arm.values is None else arm.values[0], 1.5, 40)
    driven.motion.halt('deactivated', driven.now_ns)
    driven.run(1.0, lambda: course.append(arm.values[0]))
    assert not driven.motion.rests and course[-1] < 1.0
    driven.motion.hold()
    driven.run(0.4, lambda: course.append(arm.values[0]))     # v / a (1 + sqrt 2) = 0.38 s
    assert driven.motion.rests and course[-1] > -0.5
    changes = np.diff(course, 2) / 0.02**2
    assert np.abs(changes).max() <= acceleration * (1 + 1e-6)


def test_a_controller_that_is_gone_stops_the_robot_until_it_is_back():
    receiver, driven = servo()
    driven.chunk(steady(TWIST))
    driven.run(0.2)
    driven.wire.connected = False
    driven.run(0.11)
    assert driven.motion.stopped == 'no subscriber'
    driven.wire.connected = True
    driven.chunk(steady(TWIST))
    driven.run(0.2)
    assert driven.motion.stopped is None and receiver.velocity(driven.now_ns)[0] > 0.05


def test_chunks_that_go_on_without_a_controller_move_nothing_and_count_one_stop():
    receiver, driven = servo()
    driven.wire.connected = False
    for _ in range(8):
        assert driven.chunk(steady(TWIST)) is not None      # it has passed the guard
        driven.run(0.1)
    assert driven.wire.sent == [] and driven.motion.stops == {'no subscriber': 1}
    assert driven.motion.unheard == ['/servo_node/delta_twist_cmds', '/gripper/closed']
    driven.wire.connected = True
    driven.chunk(steady(TWIST))
    driven.run(0.3)
    driven.wire.connected = False
    velocities = []
    for _ in range(8):
        driven.chunk(steady(TWIST))
        driven.run(0.1, lambda: velocities.append(np.abs(receiver.velocity(driven.now_ns))))
    speeds = np.array(velocities)[12:, 2]                   # a tenth of a second to notice
    assert (np.diff(speeds) <= 1e-3).all() and speeds[0] > 0.1 and speeds[-1] < 1e-9


@pytest.mark.parametrize('action, end', [('hold', 0.0), ('neutral', 0.02), ('decelerate', 0.0)])
def test_each_safe_action_ends_where_it_says(action, end):
    neutral = {name: 0.02 for name in [*AXES, 'gripper']}
    config = dataclasses.replace(read_motion(CONFIG / 'motion_ur_servo.yaml'), safe_action=action,
                                 neutral=neutral)
    receiver = Servo()
    driven = Driven(UR, config, **{'/servo_node/delta_twist_cmds': receiver})
    for _ in range(2):
        driven.chunk(steady(TWIST))
        driven.run(0.2)
    driven.motion.halt('joint_states', driven.now_ns)
    driven.run(0.9)
    np.testing.assert_allclose(receiver.velocity(driven.now_ns), end, atol=1e-9)


def test_a_rejected_chunk_changes_nothing():
    driven = Driven(FRANKA, 'motion_franka.yaml')
    driven.motion.feel(np.zeros(7))
    with pytest.raises(Rejected, match="'panda_joint1' would begin at 0.4, the robot is at 0"):
        driven.chunk(steady(np.full(8, 0.4)))
    driven.run(0.2)
    assert driven.wire.sent == [] and driven.motion.guard.interventions == {'first_step': 1}


def test_after_the_clock_has_jumped_back_no_old_path_is_followed():
    arm = JointTrajectoryController(PANDA, np.zeros(7))
    driven = Driven(FRANKA, 'motion_franka.yaml',
                    **{'/joint_trajectory_controller/joint_trajectory': arm})
    driven.chunk(wave(0.2, 8))
    driven.run(0.4)
    here = arm.state(driven.now_ns)[0]
    count = len(driven.wire.sent)
    driven.wire.now_ns -= 10**12
    driven.motion.silence('clock jump', driven.now_ns)
    driven.run(0.2)
    after = [message for topic, _, message in driven.wire.sent[count:] if 'trajectory' in topic]
    assert len(after) == 1
    for point in after[0].points:
        np.testing.assert_allclose(point.positions, here, atol=0.005)


def test_alone_a_trajectory_controller_ends_its_trajectory_after_a_long_jump_back_and_goes_on():
    config = read_motion(CONFIG / 'motion_franka.yaml')
    driven = Driven(FRANKA, dataclasses.replace(config, outputs=config.outputs[:1]))
    driven.motion.feel(np.zeros(7))
    driven.chunk(wave(0.2, 8))
    driven.run(0.3)
    driven.wire.now_ns -= 10**10
    driven.motion.clock_jumped(driven.now_ns)
    driven.run(0.2)
    assert len(driven.wire.sent) == 1 and driven.motion.stopped == 'clock jump'
    driven.chunk(steady(np.zeros(8)))
    assert len(driven.wire.sent) == 2 and driven.motion.stopped is None


def test_open_loop_finishes_a_chunk_before_the_next():
    driven = Driven(UR, 'motion_ur_servo.yaml', mode=OpenLoop())
    driven.chunk(steady(0.5 * TWIST))
    driven.run(0.2)
    driven.chunk(steady(TWIST))
    driven.run(0.3)
    assert driven.motion.timeline.at(driven.now_ns)[0] == pytest.approx(0.05)


def test_an_open_loop_longer_than_the_deadline_goes_on_while_there_are_observations():
    driven = Driven(UR, 'motion_ur_servo.yaml', mode=OpenLoop())
    motion, wanted = driven.motion, []
    driven.chunk(steady(0.5 * TWIST))                 # 0.8 s; the deadline is 0.4 s
    driven.run(0.7, lambda: wanted.append(motion.wants_chunk(driven.now_ns, 200 * MS)))
    assert motion.stopped is None and not any(wanted[10:60]) and wanted[-1]
    driven.run(0.4)
    assert motion.stopped == 'no chunk'               # the one that was wanted has not come
    driven.chunk(steady(0.5 * TWIST))
    driven.run(0.5)
    assert motion.stopped == 'no chunk'               # and here there was no observation


@pytest.mark.parametrize('text, mode', [
    ('open_loop', 'OpenLoop()'), ('receding_horizon', 'RecedingHorizon(steps=0)'),
    ('receding_horizon:4', 'RecedingHorizon(steps=4)'), ('real_time:3', 'RealTime(delay_steps=3)'),
    ('ensemble', 'TemporalEnsemble(decay=0.01, newest_first=False)'),
    ('ensemble:0.5:newest_first', 'TemporalEnsemble(decay=0.5, newest_first=True)')])
def test_a_mode_is_named_by_a_word(text, mode):
    assert repr(read_mode(text)) == mode


@pytest.mark.parametrize('text', ['', 'open_loop:1', 'ensemble:x', 'ensemble:-1', 'real_time',
                                  'receding_horizon:1.5', 'ensemble:0.1:oldest', 'rtc:4'])
def test_a_mode_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match='execution'):
        read_mode(text)


@pytest.mark.parametrize('text, message', [
    ('speed: 3', "unknown field 'speed'"), ('outputs: {}', 'outputs must be a list'),
    ('outputs: [{type: twist2}]', "outputs.0..type is 'twist2' .did you mean 'twist'"),
    ('outputs: [{type: twist, topic: a, frame_id: b, axes: {linear.q: vx}}]', 'linear.q'),
    ('outputs: [{type: gripper, topic: "a b", dimension: g}]', "'a b' is no name for a topic"),
    ('outputs: [{type: gripper, topic: a, dimension: g, binary: true}]', 'close_below'),
    ('outputs: [{type: gripper, topic: a, dimension: g}, {type: gripper, topic: a, dimension: h}]',
     'two outputs have one topic'),
    ('limits: {velocity: {a: fast}}', "limits.velocity.a must be a number, got 'fast'"),
    ('limits: {speed: {a: 1}}', "unknown field 'speed'"),
    ('workspace: {a: 3}', r'workspace.a must be \[lowest, highest\]'),
    ('control_rate_hz: 0', 'control_rate_hz must be 1 to 1000'),
    ('safe_action: pray', 'safe_action must be one of'), ('deadline_s: .nan', 'deadline_s'),
    ('outputs: [{type: joint_trajectory, topic: a, dimensions: []}]', 'carries no dimension'),
    ('outputs: [{type: joint_trajectory, topic: a, dimensions: [g], end_velocity: some}]',
     'end_velocity must be auto, zero or any'),
    ('a: !!python/object/apply:os.system [ls]', 'constructor'), ('- 1', 'mapping')])
def test_a_bad_motion_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / 'motion.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_motion(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize('spec, changes, message', [
    (FRANKA, {'first_step': {'gripper': 0.1}}, "unknown name 'gripper'"),
    (UR, {'outputs': (TwistOutput(topic='t', axes={'linear.x': 'v'}, frame_id='')
                      ,)}, "unknown name 'v'"),
    (FRANKA, {'outputs': (TwistOutput(topic='t', axes={'linear.x': PANDA[0]}, frame_id=''),)},
     'not among the rates'),
    (FRANKA, {'outputs': (GripperOutput(topic='t', dimension=PANDA[0]),)},
     "does not say that 'panda_joint1' is a gripper, only .'gripper'."),
    (UR, {'safe_action': 'neutral', 'neutral': {'vx': 0.0}}, "neutral gives no value for 'vy'"),
    (UR, {'safe_action': 'neutral', 'neutral': {name: 9.0 for name in [*AXES, 'gripper']}},
     'outside the limits')])
def test_a_motion_file_for_another_robot_is_refused(spec, changes, message):
    with pytest.raises(ValueError, match=message):
        MotionConfig(**changes).check(spec)


def test_limits_of_a_motion_file_cannot_loosen_the_checkpoint():
    with pytest.raises(ValueError, match="velocity limit 9 of 'vx' would loosen"):
        MotionConfig(limits={'velocity': {'vx': 9.0}}).guard_settings(dataclasses.replace(
            UR, action_space=dataclasses.replace(UR.action_space, max_velocity=[1.0] * 7)))
