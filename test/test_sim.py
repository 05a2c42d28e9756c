"""The simulated robot, its demonstrations and its node."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

if importlib.util.find_spec('metaworld') is None:
    pytest.skip('the simulator (pip install metaworld==3.1.1 packaging) is missing',
                allow_module_level=True)

from meanflow_ros.ros.bag import BagWriter, TYPES, read_messages  # noqa: E402, I001
from meanflow_ros.sim import demonstrations  # noqa: E402
from meanflow_ros.sim import metaworld_robot as sim  # noqa: E402
from meanflow_ros.sim.scene import CAMERAS, project  # noqa: E402
from meanflow_ros.sim.tasks import (  # noqa: E402
    GROUPS, MT10, MULTIMODAL, TASKS, check_task, expand_tasks)

STILL = np.array([0.0, 0.0, 0.0, -1.0])
SIZE = 64


@pytest.fixture(scope='module')
def robot():
    try:
        robot = sim.MetaWorldRobot(image_width=SIZE, image_height=SIZE)
        robot.reset('faucet-open', 0)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield robot
    robot.close()


def state_of(robot):
    env = robot._scene.env
    data = env.data
    return [data.qpos, data.qvel, data.mocap_pos, data.mocap_quat, data.qacc_warmstart,
            data.ctrl, env.model.body_pos, env._prev_obs, robot._sensed,
            env.np_random.random(4), *robot.observe().images.values()]


@pytest.mark.parametrize('task', ['faucet-close', 'drawer-close', 'button-press-topdown'])
def test_reset_gives_the_same_bits_whatever_ran_before(robot, task):
    robot.reset(task, 7)
    first = [np.copy(values) for values in state_of(robot)]
    robot.reset(task, 8)
    for _ in range(30):
        robot.step(robot.expert_action())
    robot.reset('window-open', 7)
    robot.reset(task, 7)
    for before, after in zip(first, state_of(robot)):
        np.testing.assert_array_equal(before, after)


def test_a_fresh_robot_repeats_an_episode_of_a_used_one(robot):
    ends = []
    for each in (robot, sim.MetaWorldRobot(image_width=16, image_height=16)):
        each.reset('faucet-close', 11)
        for _ in range(10):
            each.step(each.expert_action())
        ends.append(each.observe(()).joint_positions)
    np.testing.assert_array_equal(*ends)


def test_both_faucet_tasks_begin_with_the_same_pictures(robot):
    for seed in range(3):
        pictures = []
        for task in ('faucet-open', 'faucet-close'):
            robot.reset(task, seed)
            pictures.append(robot.observe().images)
        for camera in CAMERAS:
            np.testing.assert_array_equal(pictures[0][camera], pictures[1][camera])


def test_no_goal_marker_changes_a_picture_of_a_task_that_shows_its_goal_otherwise(robot):
    robot.reset('drawer-open', 0)
    before = robot.observe().images
    robot._scene.env.data.site_xpos[:] = robot.observe(()).tool_position
    for camera, picture in robot.observe().images.items():
        np.testing.assert_array_equal(before[camera], picture)


@pytest.mark.parametrize('task', ['reach', 'push', 'pick-place'])
def test_a_goal_that_nothing_else_shows_is_seen_by_both_cameras(robot, task):
    robot.reset(task, 1)
    before = robot.observe().images
    robot._scene.env.data.site('goal').xpos[:] = 9.0
    for camera, picture in robot.observe().images.items():
        assert (before[camera] != picture).any()


def expert_episode(robot, task, seed, act=None):
    """Run an episode of the expert, or of `act`, and return its last StepResult."""
    robot.reset(task, seed)
    for _ in range(sim.MAX_STEPS):
        result = robot.step(robot.expert_action() if act is None else act(robot._scene.env))
        if result.success:
            break
    return result


@pytest.mark.parametrize('task', ['reach', 'push', 'pick-place', 'door-open', 'peg-insert-side'])
def test_the_expert_succeeds_through_commands_at_40_hz(robot, task):
    assert expert_episode(robot, task, sim.EVALUATION_SEED_START + 1).success


@pytest.mark.parametrize('task', MULTIMODAL)
def test_every_layout_is_shown_in_each_mode_and_the_picture_does_not_tell_which(robot, task):
    modes, shown = TASKS[task].modes, {}
    for seed in range(6, 6 + 2 * len(modes)):
        result = expert_episode(robot, task, seed)
        assert result.success and result.mode == robot.expert_mode
        robot.reset(task, seed)
        picture = robot.observe(['static']).images['static'].tobytes()
        shown.setdefault(picture, []).append(result.mode)
    assert [sorted(each) for each in shown.values()] == [sorted(modes)] * 2


def every_expert(env):
    """Return the commands of the experts of all modes (M, 4)."""
    return np.stack([env.expert_action(mode) for mode in env.modes]) * sim.ACTION_SPACE.upper


@pytest.mark.parametrize('task', MULTIMODAL)
@pytest.mark.parametrize('average', [np.mean, np.median])
def test_the_average_of_the_experts_fails(robot, task, average):
    for seed in (0, 4):
        assert not expert_episode(
            robot, task, seed, lambda env: average(every_expert(env), axis=0)).success


@pytest.mark.parametrize('task', MULTIMODAL)
def test_six_steps_of_the_average_cannot_be_mended(robot, task):
    for mode in range(len(TASKS[task].modes)):
        steps = iter(range(sim.MAX_STEPS))
        assert not expert_episode(robot, task, 0, lambda env: (
            every_expert(env)[mode] if next(steps) >= 6
            else np.median(every_expert(env), axis=0))).success


def test_groups_open_into_tasks_each_once():
    assert len(MT10) == 10 and set(MT10) <= set(TASKS)
    assert expand_tasks(['faucet-open', 'same-picture', 'multimodal']) == (
        'faucet-open', 'faucet-close', *MULTIMODAL)
    assert expand_tasks(['all']) == tuple(TASKS) and set(GROUPS['mt10']) <= set(TASKS)
    with pytest.raises(ValueError, match="unknown task 'mt11'"):
        expand_tasks(['mt11'])


def test_the_tool_moves_as_fast_as_commanded(robot):
    robot.reset('faucet-open', 0)
    command = np.array([0.12, 0.2, -0.04, -1.0])
    for _ in range(10):
        robot.step(command)
    start = robot.observe(()).tool_position
    for _ in range(20):
        robot.step(command)
    moved = robot.observe(()).tool_position - start
    np.testing.assert_allclose(moved / (20 * sim.PERIOD_S), command[:3], atol=0.01)


def test_a_command_beyond_the_limits_acts_as_the_limit(robot):
    ends = []
    for speed in (sim.MAX_SPEED, 50.0):
        robot.reset('faucet-open', 1)
        for _ in range(5):
            robot.step(np.array([speed, 0.0, 0.0, 1.0]))
        ends.append(robot.observe(()).tool_position)
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize('command', [[0.0, 0.0, 0.0], [np.nan, 0.0, 0.0, 0.0]])
def test_a_malformed_command_is_refused(robot, command):
    with pytest.raises(ValueError, match='4 finite numbers'):
        robot.step(command)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match='did you mean .drawer-open.*button-press-topdown'):
        check_task('drawer-opn')


def test_project_finds_the_tool_in_the_static_picture(robot):
    robot.reset('faucet-open', 0)
    tool = robot.observe(()).tool_position
    scene = robot._scene
    site = scene.env.model.site('endEffector').id
    x, y = project(tool[None], width=SIZE, height=SIZE)[0]
    scene._options.sitegroup[:] = 1
    before = scene.render('static').astype(int)
    scene.env.data.site_xpos[site] = tool
    scene.env.model.site_rgba[site] = (0.0, 1.0, 0.0, 1.0)
    scene.env.model.site_size[site] = 0.03
    after = scene.render('static').astype(int)
    scene._options.sitegroup[:] = 0
    rows, columns = np.nonzero((after[..., 1] - before[..., 1] > 60) & (after[..., 0] < 60))
    assert len(rows) > 3
    assert abs(columns.mean() - x) < 2 and abs(rows.mean() - y) < 2


def test_project_gives_nan_behind_the_camera():
    assert np.isnan(project([[3.0, -2.0, 3.0]], width=SIZE, height=SIZE)).all()


def test_a_recorded_demonstration_reads_back_with_every_topic_and_a_success(tmp_path):
    counts = demonstrations.record(tmp_path / 'bags', ['button-press-topdown'], episodes=1,
                                   first_seed=5, image_size=SIZE, noise=0.2)
    assert counts == {'button-press-topdown': (1, 1)}
    stamps, last, told = {}, {}, {'/action': [], '/executed': []}
    for topic, stamp_ns, message in read_messages(tmp_path / 'bags' / 'button-press-topdown_00'):
        stamps.setdefault(topic, []).append(stamp_ns)
        last[topic] = message
        if topic in told:
            told[topic].append(message.points[0].positions)
    assert set(stamps) == {
        '/camera/static/image_raw', '/camera/wrist/image_raw', '/joint_states', '/tool_pose',
        '/instruction', '/episode', '/action', '/executed'}
    assert np.unique(np.diff(stamps['/action'])).tolist() == [25_000_000]
    assert stamps['/action'] == stamps['/camera/wrist/image_raw'] == stamps['/joint_states']
    values = {pair.key: pair.value for pair in last['/episode'].values}
    assert last['/episode'].message == 'success'
    assert values['seed'] == '5' and int(values['steps']) == len(stamps['/action'])
    assert last['/instruction'].data == 'press the button'
    disturbed = np.abs(np.subtract(told['/executed'], told['/action'])).max(axis=1) > 0
    assert 0.2 < disturbed.mean() < 0.8 and (
        np.abs(told['/executed']) <= sim.ACTION_SPACE.upper + 1e-12).all()
    assert tuple(last['/action'].joint_names) == sim.ACTION_SPACE.dimensions
    assert last['/camera/static/image_raw'].data.size == SIZE * SIZE * 3


def test_failed_episodes_are_kept_and_made_up_for(tmp_path, monkeypatch):
    real, seeds = demonstrations._record_episode, []

    def first_fails(robot, writer, shard, task, number, stamp_ns):
        seeds.append(shard.first_seed + number)
        stamp_ns, success = real(robot, writer, shard, task, number, stamp_ns)
        return stamp_ns, success and number > 0

    monkeypatch.setattr(demonstrations, '_record_episode', first_fails)
    counts = demonstrations.record(tmp_path / 'bags', ['press-any'], episodes=2, image_size=16)
    assert counts == {'press-any': (2, 3)} and seeds == [0, 1, 2]
    ends = [{pair.key: pair.value for pair in message.values} for _, _, message in read_messages(
        tmp_path / 'bags' / 'press-any_00', ['episode']) if message.message == 'success']
    assert [end['seed'] for end in ends] == ['0', '1', '2']
    assert {end['mode'] for end in ends} == {'left', 'right', 'far'}


def test_recording_gives_up_after_three_attempts_for_each_success_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstrations, '_record_episode', lambda *a: (a[-1], False))
    counts = demonstrations.record(tmp_path / 'bags', ['reach'], episodes=2, image_size=16)
    assert counts == {'reach': (0, 6)}


def test_the_disturbance_is_held_switched_and_spares_the_gripper():
    stream = demonstrations.disturbances(0.3, seed=3)
    values = np.stack([next(stream) for _ in range(400)])
    assert (values[:, 3] == 0).all()
    assert 0.2 < (values[:, 0] == 0).mean() < 0.8
    changes = np.flatnonzero(np.diff(values[:, 0]))
    assert np.diff(changes).min() >= 3
    quiet = demonstrations.disturbances(0.3, seed=3, quiet_steps=4)
    assert not np.stack([next(quiet) for _ in range(4)]).any()
    np.testing.assert_array_equal(np.stack([next(quiet) for _ in range(400)]), values)


def test_a_snatch_closes_open_fingers_for_a_while_and_leaves_the_rest_alone():
    plain, stream = (demonstrations.disturbances(0.3, seed=3, snatch=share) for share in (0, 0.25))
    values = np.stack([next(stream) for _ in range(2000)])
    closes = values[:, 3] > 0
    assert 0.15 < closes.mean() < 0.35 and set(values[:, 3]) == {0.0, 2.0}
    runs = np.diff(np.flatnonzero(np.diff(closes)))
    assert runs.min() >= 3
    assert not np.stack([next(plain) for _ in range(400)])[:, 3].any()
    with pytest.raises(ValueError, match='snatch must be 0 to 1'):
        demonstrations.record('nowhere', ['reach'], 1, snatch=1.5)


def test_evaluation_seeds_are_not_recorded(tmp_path):
    with pytest.raises(ValueError, match='kept for evaluation'):
        demonstrations.record(tmp_path, ['faucet-open'], 2, first_seed=99_999)


def test_bag_errors_name_the_path(tmp_path):
    with pytest.raises(ValueError, match='no bag at .*missing'):
        list(read_messages(tmp_path / 'missing'))
    with pytest.raises(ValueError, match='not a rosbag2'):
        list(read_messages(tmp_path))
    with pytest.raises(ValueError, match='exists already'):
        BagWriter(tmp_path)
    text = TYPES.types['std_msgs/msg/String'](data='x' * 1000)
    with BagWriter(tmp_path / 'bag') as bag:
        bag.write('chatter', text, 3)
    data = tmp_path / 'bag' / 'bag.mcap'
    data.write_bytes(data.read_bytes()[:-60])
    with pytest.raises(ValueError, match='cannot be read as a rosbag2'):
        list(read_messages(tmp_path / 'bag'))


class Client:
    """Answers every picture of a running sim_node with the chunks of `answer`."""

    def __init__(self):
        import rclpy
        from diagnostic_msgs.msg import DiagnosticStatus
        from geometry_msgs.msg import PoseStamped
        from rclpy.executors import SingleThreadedExecutor
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import Image
        from std_srvs.srv import Trigger
        from trajectory_msgs.msg import JointTrajectory
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node('client', context=self.context)
        self.publisher = self.node.create_publisher(JointTrajectory, 'action_chunk', 10)
        self.subscriptions = [
            self.node.create_subscription(kind, topic, callback, 10) for kind, topic, callback in (
                (Image, 'camera/wrist/image_raw', self.on_image),
                (PoseStamped, 'tool_pose', self.on_tool),
                (DiagnosticStatus, 'episode', self.on_episode),
                (Clock, '/clock', self.on_clock))]
        self.service = self.node.create_client(Trigger, 'sim_robot/reset')
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.ended = threading.Event()
        self.clock_ns, self.tools, self.end = [], [], None
        self.thread = threading.Thread(target=self.executor.spin, daemon=True)
        self.thread.start()

    def on_clock(self, message):
        self.clock_ns.append(message.clock.sec * 10**9 + message.clock.nanosec)

    def on_tool(self, message):
        self.tools.append(message.pose.position)

    def on_episode(self, message):
        if message.message != 'start':
            self.end = message
            self.ended.set()

    def on_image(self, message):
        stamp = message.header.stamp
        for chunk in self.answer(stamp.sec * 10**9 + stamp.nanosec):
            self.publisher.publish(chunk)

    def chunk(self, stamp_ns, velocity, steps, names=sim.ACTION_SPACE.dimensions):
        from builtin_interfaces.msg import Duration
        from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint
        chunk = JointTrajectory(joint_names=names)
        chunk.header.stamp.sec, chunk.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        for step in range(steps):
            second, nanosecond = divmod(step * 25_000_000, 10**9)
            chunk.points.append(JointTrajectoryPoint(
                positions=[*velocity, -1.0],
                time_from_start=Duration(sec=second, nanosec=nanosecond)))
        return chunk

    def run_episode(self, answer):
        """Return the values of the episode's end and how far the tool moved (3,) in m."""
        from std_srvs.srv import Trigger
        self.answer = answer
        self.ended.clear()
        self.tools.clear()
        assert self.service.call(Trigger.Request()).success
        assert self.ended.wait(20), 'the episode did not end'
        ends = [np.array([p.x, p.y, p.z]) for p in (self.tools[0], self.tools[-1])]
        return {pair.key: pair.value for pair in self.end.values}, ends[1] - ends[0]

    def close(self):
        self.executor.shutdown()
        self.thread.join(5)
        self.node.destroy_node()
        self.context.shutdown()


@pytest.fixture
def running(monkeypatch):
    pytest.importorskip('rclpy', reason='ROS 2 is missing')
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    monkeypatch.setenv('ROS_DOMAIN_ID', str(40 + os.getpid() % 50))
    node = subprocess.Popen(
        [sys.executable, '-m', 'meanflow_ros.sim.sim_node', '--ros-args', '-p', 'max_steps:=40',
         '-p', f'image_width:={SIZE}', '-p', f'image_height:={SIZE}'],
        stderr=subprocess.PIPE, text=True)
    client = Client()
    try:
        deadline_s = time.monotonic() + 20
        while not (client.clock_ns and client.service.service_is_ready()
                   and client.publisher.get_subscription_count()):
            assert time.monotonic() < deadline_s and node.poll() is None, 'sim_node is not up'
            time.sleep(0.05)
        yield node, client
    finally:
        client.close()
        node.kill()
        node.wait()


def test_sim_node_in_lockstep_executes_due_steps_and_drops_late_chunks(running):
    node, client = running
    began_ns = client.clock_ns[-1]
    forward, sideways = [0.0, 0.2, 0.0], [0.8, 0.0, 0.0]

    def full(stamp_ns):
        long_ago = client.chunk(began_ns - 10**9, sideways, steps=400)
        stranger = client.chunk(stamp_ns, sideways, 4, names=['a', 'b', 'c', 'd'])
        not_finite = client.chunk(stamp_ns, [np.nan, 0.0, 0.0], 4)
        return [long_ago, stranger, not_finite, client.chunk(stamp_ns, forward, 4)]

    values, moved = client.run_episode(full)
    assert values['steps'] == '40' and values['starved_steps'] == '0'
    np.testing.assert_allclose(moved, np.array(forward) * 39 * sim.PERIOD_S, atol=0.02)

    values, moved = client.run_episode(lambda stamp_ns: [
        client.chunk(stamp_ns - 10**8, sideways, 4), client.chunk(stamp_ns, forward, 2)])
    assert values['starved_steps'] == '20' and values['episode'] == '1'
    np.testing.assert_allclose(moved, np.array(forward) * 20 * sim.PERIOD_S, atol=0.02)

    assert (np.diff(client.clock_ns) >= 0).all() and client.clock_ns[0] >= 10**9
    node.send_signal(signal.SIGINT)
    _, errors = node.communicate(timeout=10)
    assert node.returncode == 0 and 'Traceback' not in errors
    assert errors.count('action chunk ignored: trajectory is for') == 1
    assert errors.count('action chunk ignored: trajectory has positions that are not finite') == 1


def test_sim_node_refuses_an_unknown_task_with_the_known_ones():
    pytest.importorskip('rclpy', reason='ROS 2 is missing')
    result = subprocess.run(
        [sys.executable, '-m', 'meanflow_ros.sim.sim_node', '--ros-args', '-p', 'task:=dance'],
        capture_output=True, text=True, timeout=30)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert "unknown task 'dance'" in result.stderr and 'window-close' in result.stderr
