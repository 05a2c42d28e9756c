"""The node drives a controller over DDS: streams, emergency stop, enable, limits, heartbeat."""

import threading
import time
from collections import deque

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

import yaml  # noqa: E402, I001
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402
from std_msgs.msg import Float64MultiArray, Header, String  # noqa: E402
from std_srvs.srv import SetBool  # noqa: E402

from meanflow_ros.core.contract import ActionChunk, TimedActions  # noqa: E402
from meanflow_ros.ros import ingest  # noqa: E402
from meanflow_ros.ros.motion_control import SETTLE_S  # noqa: E402
from micro_policy import DIMENSIONS, FIRST_STEP, HORIZON, LOWER, PERIOD_S, UPPER  # noqa: E402
from node_rig import Rig, until  # noqa: E402

MIDDLE = (LOWER + UPPER) / 2
STOP_S, SPEED, ACCELERATION = 0.3, 0.5, 4.0     # of `slide`, m/s and m/s^2


class Controller:
    """What arrives on the topics of the controllers, with the time of its arrival."""

    def __init__(self, feeder):
        self.commands: deque = deque()
        self.beats: deque = deque()
        feeder.node.create_subscription(
            Float64MultiArray, 'arm/commands',
            lambda message: self.commands.append((time.monotonic(), np.array(message.data))), 100)
        feeder.node.create_subscription(
            Header, 'meanflow_policy/heartbeat', lambda message: self.beats.append(
                message.frame_id), 100)


def constant(value):
    """Return an `act` that always asks for `value`, (A,)."""
    def act(real, observation, **options):
        return ActionChunk(actions=np.tile(value, (HORIZON, 1)), stamp_ns=observation.stamp_ns,
                           period_s=PERIOD_S, first_step=FIRST_STEP)
    return act


@pytest.fixture(scope='module')
def shared(micro_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp('motion') / 'motion.yaml'
    path.write_text(yaml.safe_dump({
        'control_rate_hz': 50.0, 'deadline_s': 0.3, 'stop_s': STOP_S,
        'limits': {'velocity': {'slide': SPEED}, 'acceleration': {'slide': ACCELERATION}},
        'outputs': [{'type': 'forward_command', 'topic': 'arm/commands',
                     'dimensions': ['swivel', 'slide']}]}))
    made = {}
    with Rig(micro_checkpoint, parameters={'motion': str(path), 'seed': 3},
             before_node=lambda feeder: made.update(controller=Controller(feeder))) as rig:
        rig.controller = made['controller']
        yield rig.activate()


@pytest.fixture
def rig(shared):
    shared.act(constant(MIDDLE))
    for name in ('estop', 'enable'):
        call(shared, name, name == 'enable')
    if shared.state == 'inactive':
        shared.transition('activate')
    shared.controller.commands.clear()
    yield shared
    shared.act()


def call(rig, service, value):
    return rig.call(SetBool, service, SetBool.Request(data=value))


def moving(rig):
    """Feed until commands stream."""
    before = len(rig.controller.commands)
    until(lambda: len(rig.controller.commands) > before + 10, 'a stream of commands',
          each=rig.feeder.steadily())


def quiet(rig, seconds=0.3, **feed):
    """Return the commands that arrive while pictures go on."""
    rig.controller.commands.clear()
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end, 'time', each=rig.feeder.steadily(**feed))
    return list(rig.controller.commands)


def test_the_stream_carries_its_dimensions_and_comes_to_what_the_policy_asks(rig):
    until(lambda: rig.controller.commands and np.allclose(
        rig.controller.commands[-1][1], MIDDLE[[1, 0]], atol=1e-6), 'the middle',
        each=rig.feeder.steadily())


def test_the_stream_keeps_the_tightened_limits(rig):
    targets = iter(np.tile([LOWER, UPPER], (10**4, 1)))
    rig.act(lambda real, observation, **options: constant(next(targets))(real, observation))
    commands = quiet(rig, 1.0)
    slide = np.array([values[1] for _, values in commands])
    assert len(slide) > 25 and np.ptp(slide) > 0.001
    assert np.abs(np.diff(slide)).max() <= 0.5 * 0.02 * 1.001
    assert (slide >= LOWER[0] - 1e-6).all() and (slide <= UPPER[0] + 1e-6).all()


def test_the_emergency_stop_ends_commands_at_once_and_is_latched(rig):
    moving(rig)
    assert call(rig, 'estop', True).success
    assert quiet(rig) == []
    rig.diagnosed('emergency stop', each=rig.feeder.steadily())
    until(lambda: rig.controller.beats and rig.controller.beats[-1].startswith('emergency stop'),
          'a heartbeat that says so')
    assert rig.transition('deactivate') and rig.transition('cleanup')
    assert rig.transition('configure') and rig.transition('activate')
    rig.act(constant(MIDDLE))
    rig.connected()
    assert quiet(rig) == []
    call(rig, 'enable', True)                              # not a release
    assert quiet(rig) == [] and rig.values()['estop'] == 'True'
    call(rig, 'estop', False)
    moving(rig)


def test_a_disabled_node_sends_nothing_until_it_is_enabled(rig):
    moving(rig)
    call(rig, 'enable', False)
    until(lambda: not rig.node._control.motion._streaming, 'the end of the stream',
          each=rig.feeder.steadily())
    quiet(rig, 0.05)                                       # what was still on its way
    assert quiet(rig) == []
    call(rig, 'enable', True)
    moving(rig)


def at_full_speed(rig):
    """Have `slide` move at full speed; return the list that takes its (stamp_ns, position)."""
    moving(rig)
    motion, sent = rig.node._control.motion, []
    publish = motion._publish

    def record(command):
        sent.append((command.stamp_ns, command.values[0]))
        publish(command)

    motion._publish = record
    rig.act(constant(LOWER if motion.last_command[0] > MIDDLE[0] else UPPER))
    until(lambda: len(sent) > 2 and motion.guard.motion(
        now_ns=sent[-1][0], period_s=0.02)[1, 0] ** 2 > (0.99 * SPEED) ** 2, 'full speed',
        each=rig.feeder.steadily())
    return sent


def require_gentle(sent):
    """From full speed to rest, and nowhere beyond the limits; a late command moves no more."""
    stamps_ns, positions = (np.array(each) for each in zip(*sent))
    periods_s = np.minimum(np.diff(stamps_ns) / 1e9, 0.02)
    speeds = np.diff(positions) / periods_s
    changes = 2 * np.diff(speeds) / (periods_s[1:] + periods_s[:-1])
    changes[(np.diff(stamps_ns) > 80e6)[1:]] = 0.0     # after a gap the robot counts as standing
    assert np.abs(speeds).max() > 0.98 * SPEED and abs(speeds[-1]) < 1e-6
    assert np.abs(speeds).max() <= SPEED * (1 + 1e-6)
    assert np.abs(changes).max() <= ACCELERATION * (1 + 1e-6)


def test_a_disabled_robot_slows_down_within_its_limits_and_falls_silent_at_rest(rig):
    sent = at_full_speed(rig)
    call(rig, 'enable', False)
    until(lambda: not rig.node._control.motion._streaming, 'the end of the stream',
          each=rig.feeder.steadily())
    require_gentle(sent)


@pytest.mark.parametrize('then', [(), ('cleanup', 'configure')])
def test_deactivation_returns_when_the_robot_has_slowed_down_within_its_limits(rig, then):
    sent = at_full_speed(rig)
    began_s = time.monotonic()
    assert rig.transition('deactivate')
    assert SPEED / ACCELERATION < time.monotonic() - began_s < STOP_S + SETTLE_S + 0.5
    count = len(sent)
    require_gentle(sent)
    assert all(rig.transition(name) for name in then) and len(sent) == count


def test_cleaning_up_a_node_that_is_interrupted_slows_the_robot_down_too(rig):
    sent = at_full_speed(rig)
    with rig.node._inputs:                    # as at Ctrl-C: no transition comes before
        rig.node._active = False
    control = rig.node._control
    control._node.executor.create_task(control.leave, 'released')
    until(lambda: not control.motion._streaming, 'the end of the stream')
    require_gentle(sent)
    assert rig.transition('deactivate')


def test_the_emergency_stop_is_heard_while_the_node_is_being_deactivated(rig):
    sent = at_full_speed(rig)
    deactivation = threading.Thread(target=rig.transition, args=('deactivate',))
    deactivation.start()
    until(lambda: rig.node._control.motion.stopped == 'deactivated', 'a stop')
    assert call(rig, 'estop', True).success
    count, speed = len(sent), np.diff([position for _, position in sent[-3:-1]])[0] / 0.02
    deactivation.join()
    assert len(sent) == count and abs(speed) > 0.1 * SPEED


def test_when_pictures_end_the_stream_comes_to_rest_and_ends(rig):
    moving(rig)
    until(lambda: rig.node._control.motion.stopped == 'no chunk', 'the deadline')
    until(lambda: not rig.node._control.motion._streaming, 'the end of the stream')
    last = [values for _, values in list(rig.controller.commands)[-10:]]
    assert np.ptp(last, axis=0).max() < 1e-9
    moving(rig)


def test_a_clock_that_stands_ends_the_commands(rig):
    moving(rig)
    control = rig.node._control
    real, stands_ns = control._now_ns, rig.node.get_clock().now().nanoseconds
    control._now_ns = lambda: stands_ns
    try:
        until(lambda: control.motion.stopped == 'the clock stands', 'a stop')
        quiet(rig, without=('joints', 'static', 'wrist'))     # what was still on its way
        assert quiet(rig, without=('joints', 'static', 'wrist')) == []
    finally:
        control._now_ns = real
    moving(rig)


def test_a_jump_of_the_clock_ends_the_stream_by_its_name_and_the_next_chunk_begins_one(rig):
    moving(rig)
    with rig.node._inputs:
        rig.node._ingest._now_ns += 10 * 10**9
    until(lambda: rig.controller.beats[-1] == 'clock jump', 'a heartbeat')
    rig.diagnosed('no chunk: clock: it jumped back by 9.9')
    assert not rig.node._control.motion._streaming
    moving(rig)


def test_a_model_that_hangs_stops_the_robot_and_goes_on_by_itself(rig):
    moving(rig)
    hang = [True]

    def act(real, observation, **options):
        while hang[0]:
            time.sleep(0.01)
        return constant(MIDDLE)(real, observation)

    rig.act(act)
    until(lambda: rig.node._control.motion.stopped == 'no chunk', 'the deadline',
          each=rig.feeder.steadily())
    assert float(rig.values()['inferring_for_s']) > 0.2
    rig.logged('the robot stops (decelerate): no chunk: inference has been running for 0.')
    hang[0] = False
    until(lambda: rig.node._control.motion.stopped is None, 'motion again',
          each=rig.feeder.steadily())


@pytest.mark.parametrize('where', ['observe', 'ask', 'publish'])
def test_an_error_that_nobody_foresaw_stops_the_robot_by_its_name_and_the_node_goes_on(
        rig, monkeypatch, where):
    moving(rig)

    def fails(*_, **__):
        raise MemoryError('no room')

    owner = {'observe': rig.node._ingest, 'ask': rig.node._control, 'publish': rig.node._chunks}
    what = 'inference failed' if where == 'publish' else 'observation failed'
    with monkeypatch.context() as patch:
        patch.setattr(owner[where], where, fails)
        rig.diagnosed(f'no chunk: {what}: MemoryError: no room', each=rig.feeder.steadily())
        assert rig.node._control.motion.stopped == what
        until(lambda: rig.controller.beats[-1] == what, 'a heartbeat',
              each=rig.feeder.steadily())
        until(lambda: rig.node._control.motion.rests, 'rest', each=rig.feeder.steadily())
    moving(rig)
    rig.logged(f'producing chunks again (was: {what}: MemoryError')


@pytest.mark.parametrize('failing, stream', [
    ('JointState', 'joint_states'), ('Image', 'camera/')])
def test_a_message_that_raises_what_nobody_foresaw_stops_the_robot_and_the_node_goes_on(
        rig, monkeypatch, failing, stream):
    moving(rig)

    def deserialize(data, type_name):
        if type_name.endswith(failing):
            raise MemoryError('no room')
        return ingest.bag_deserialize(data, type_name)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, 'bag_deserialize', ingest.deserialize, raising=False)
        patch.setattr(ingest, 'deserialize', deserialize)
        rig.diagnosed(f'no chunk: {stream}', 'MemoryError: no room', each=rig.feeder.steadily())
        assert rig.node._control.motion.stopped == 'input failed'
        until(lambda: rig.node._control.motion.rests, 'rest', each=rig.feeder.steadily())
        assert rig.node._control.motion.stopped == 'input failed'
    moving(rig)


def test_where_even_the_stop_fails_nothing_more_is_sent(rig, monkeypatch):
    moving(rig)
    with monkeypatch.context() as patch:
        patch.setattr(rig.node._control.motion, 'halt', None)
        patch.setattr(rig.node._ingest, 'observe', None)
        rig.diagnosed('control loop: TypeError', each=rig.feeder.steadily())
    assert quiet(rig) == [] and rig.node._thread.is_alive()
    assert rig.transition('deactivate') and rig.transition('cleanup')
    assert rig.transition('configure') and rig.transition('activate')


@pytest.mark.parametrize('stop', ['instruction', 'reset', 'clock', 'estop'])
def test_a_message_whose_stop_fails_does_not_end_the_node(rig, monkeypatch, stop):
    moving(rig)
    control = rig.node._control

    def fails(*_, **__):
        raise RuntimeError('no way to stop')

    with monkeypatch.context() as patch:
        for name in ('halt', 'silence', 'clock_jumped'):
            patch.setattr(control.motion, name, fails)
        if stop == 'instruction':
            rig.say('pull the lever')
        elif stop == 'reset':
            rig.reset()
        elif stop == 'clock':
            with rig.node._inputs:
                rig.node._ingest.clock(time.time_ns() + 10**12)
        else:
            call(rig, 'estop', True)
            call(rig, 'estop', False)
        rig.diagnosed('control loop: RuntimeError: no way to stop', each=rig.feeder.steadily())
    assert quiet(rig) == [] and rig._node_side.error is None
    assert rig.transition('deactivate') and rig.transition('cleanup')
    assert rig.transition('configure') and rig.transition('activate')
    rig.act(constant(MIDDLE))
    rig.connected()
    if stop == 'instruction':
        rig.say('push the lever')
    moving(rig)


def test_execution_changes_while_the_robot_moves_and_a_bad_one_is_refused(rig):
    moving(rig)
    assert rig.set_parameter('execution', 'ensemble:0.1:newest_first').successful
    until(lambda: rig.values()['execution'] == 'ensemble:0.1:newest_first', 'the mode',
          each=rig.feeder.steadily())
    refused = rig.set_parameter('execution', 'real_time:4')
    assert not refused.successful and 'prefix of at most 0 steps' in refused.reason
    assert not rig.set_parameter('execution', 'sometimes').successful
    assert rig.set_parameter('execution', 'receding_horizon').successful
    moving(rig)


def test_an_open_loop_is_left_at_once_and_not_at_the_end_of_its_chunk(micro_checkpoint, tmp_path):
    path = tmp_path / 'motion.yaml'
    path.write_text('deadline_s: 60.0')
    with Rig(micro_checkpoint, parameters={'motion': str(path),
                                           'execution': 'open_loop'}) as rig:
        rig.activate().recovers()
        rig.settle()
        timeline, now_ns = rig.node._control.motion.timeline, rig.feeder.now_ns()
        with rig.node._inputs:
            timeline.clear()
            timeline.add(TimedActions(stamp_ns=now_ns, actions=np.tile(MIDDLE, (600, 1)),
                                      due_ns=now_ns + 10**8 * np.arange(600)))
            timeline.at(now_ns)
        count = len(rig.feeder.chunks)
        for _ in range(3):
            rig.diagnosed('', each=rig.feeder.steadily())
        assert len(rig.feeder.chunks) == count and rig.values()['execution'] == 'open_loop'
        assert rig.set_parameter('execution', 'receding_horizon').successful
        until(lambda: rig.values()['execution'] == 'receding_horizon', 'the mode, without inputs')
        rig.recovers()


def test_an_instruction_that_is_repeated_stops_nothing_and_a_new_one_does(rig):
    moving(rig)
    for text, stops in (('push the lever', 0), ('pull the lever', 1), ('push the lever', 1)):
        motion = rig.node._control.motion
        before, epoch = motion.stops['instruction'], motion.timeline.epoch
        if stops:
            rig.say(text)
        else:
            for _ in range(5):
                rig.feeder.instruction.publish(String(data=f' {text} '))
            moving(rig)
        moving(rig)
        assert motion.stops['instruction'] - before == stops
        assert motion.timeline.epoch - epoch == stops


def test_the_log_says_why_the_robot_stops_and_that_it_moves_again(rig):
    moving(rig)
    rig.feeder.logs.clear()
    until(lambda: 'the robot stops (decelerate): no chunk: camera/wrist: ' in rig.log(),
          'the reason', each=rig.feeder.steadily(without=('wrist',)))
    until(lambda: rig.controller.beats[-1].startswith('no chunk: camera/wrist: '), 'a heartbeat',
          each=rig.feeder.steadily(without=('wrist',)))
    until(lambda: 'the robot follows chunks' in rig.log(), 'the recovery',
          each=rig.feeder.steadily())


def test_deactivation_ends_the_commands(rig):
    moving(rig)
    assert rig.transition('deactivate')
    assert quiet(rig) == []


def test_a_broken_control_loop_says_so_and_sends_nothing(rig):
    moving(rig)
    rig.node._control.motion.tick = None
    rig.diagnosed('control loop: TypeError', each=rig.feeder.steadily())
    assert quiet(rig) == []
    assert rig.transition('deactivate') and rig.transition('cleanup')
    assert rig.transition('configure') and rig.transition('activate')
    rig.act(constant(MIDDLE))
    rig.connected()
    moving(rig)


@pytest.mark.parametrize('text, reason', [
    ('outputs: [{type: forward_command, topic: t, dimensions: [slid]}]', "did you mean 'slide'"),
    ('limits: {upper: {slide: 5.0}}', 'would loosen'),
    ('outputs: [{type: joint_jog, topic: t, dimensions: [slide]}]', 'not among the rates')])
def test_a_motion_file_that_does_not_fit_keeps_the_node_unconfigured(
        micro_checkpoint, tmp_path, text, reason):
    path = tmp_path / 'motion.yaml'
    path.write_text(text)
    with Rig(micro_checkpoint, parameters={'motion': str(path)}) as rig:
        assert not rig.transition('configure')
        rig.logged(reason)


URDF = '<robot name="r"><joint name="a" type="revolute"><limit lower="-1" upper="1" ' \
       'velocity="{}"/></joint></robot>'


def test_a_robot_description_tightens_the_limits_and_a_bad_one_stops(tmp_path):
    import dataclasses

    from meanflow_ros.core.policy import Policy
    from micro_policy import make_policy
    policy = make_policy()
    space = dataclasses.replace(policy.robot.action_space, dimensions=('a', *DIMENSIONS[1:]))
    config = dataclasses.replace(policy.config, robot=dataclasses.replace(
        policy.robot, action_space=space))
    Policy(config, policy.network).save(tmp_path / 'policy')
    made = {}

    def before(feeder):
        made['publisher'] = feeder.node.create_publisher(String, 'robot_description', QoSProfile(
            depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL))
        made['publisher'].publish(String(data=URDF.format(2.5)))

    with Rig(tmp_path / 'policy', before_node=before) as rig:
        rig.activate()
        until(lambda: rig.node._control.motion.guard.limits.velocity[0] == 2.5, 'its limit')
        made['publisher'].publish(String(data=URDF.format('fast')))
        rig.diagnosed("velocity of joint 'a'", each=rig.feeder.steadily())
        made['publisher'].publish(String(data=URDF.format(0.5)))
        until(lambda: rig.node._control.motion.guard.limits.velocity[0] == 0.5, 'the new limit')
