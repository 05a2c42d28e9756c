"""A bag played to the node over DDS gives what the replay without ROS gives."""

from __future__ import annotations

import dataclasses
import json

import made_bags as made
import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

import yaml  # noqa: E402, I001
from made_bags import MS, T0, Scene, status, text  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402
from std_msgs.msg import Float64MultiArray, String  # noqa: E402
from trajectory_msgs.msg import JointTrajectory  # noqa: E402

from meanflow_ros.core.contract import ActionChunk, TimedActions  # noqa: E402
from meanflow_ros.core.policy import Policy  # noqa: E402
from meanflow_ros.evaluation.evaluate import main as evaluate  # noqa: E402
from meanflow_ros.evaluation.replay import live  # noqa: E402
from meanflow_ros.evaluation.replay.settings import ReplaySettings  # noqa: E402
from meanflow_ros.ros.parameters import DECLARATIONS  # noqa: E402
from micro_policy import HEIGHT, LOWER, UPPER, WIDTH, make_policy  # noqa: E402
from node_rig import Rig, until  # noqa: E402
from replay_rig import replay  # noqa: E402
from test_replay_command import micro_bag  # noqa: E402


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Do not wait for what cannot come."""
    monkeypatch.setattr(live, 'WAIT_S', 4.0)
    monkeypatch.setattr(live, 'SETTLE_S', 0.5)
    monkeypatch.setattr(live, 'AFTER_S', 0.5)


def episode_of(out):
    from meanflow_ros.evaluation.replay.episode import EpisodeReplay
    (path,) = (out / 'parts').glob('*/*.npz')
    return EpisodeReplay.load(path)


def test_live_and_offline_give_the_same_chunks_for_the_same_observations(
        micro_checkpoint, tmp_path):
    micro_bag(tmp_path / 'bag', length_ms=900)
    common = ['replay', str(tmp_path / 'bag'), '--checkpoint', str(micro_checkpoint),
              '--probe-every', '0']
    assert evaluate([*common, '--latency', '0', '--out', str(tmp_path / 'offline')]) == 0
    with Rig(micro_checkpoint, instruction=None, parameters={'use_sim_time': True}) as rig:
        rig.activate()
        assert evaluate([*common, '--live', '--namespace', rig.namespace, '--out',
                         str(tmp_path / 'live')]) == 0
    offline, heard = episode_of(tmp_path / 'offline'), episode_of(tmp_path / 'live')
    rows = {int(stamp): row for row, stamp in enumerate(offline.stamp_ns)}
    assert len(heard.stamp_ns) >= 5 and len(rows) == 18
    compared = 0
    for row, stamp in enumerate(heard.stamp_ns):
        expected = offline.actions[rows[int(stamp)]]
        late = int((heard.actions[row] == heard.actions[row][0]).all(1).argmin() or 1) - 1
        apart = np.abs(heard.actions[row][late:] - expected[late:]) / (UPPER - LOWER)
        assert apart.max() < 1e-6      # one by one there, in a batch here
        np.testing.assert_array_equal(heard.states[row], offline.states[rows[int(stamp)]])
        compared += len(expected) - late
    assert compared > 30
    document = json.loads((tmp_path / 'live' / 'metrics.json').read_text())
    assert document['latency_ms']['source'].startswith('live')
    assert 0 < document['latency_ms']['p50'] < 500
    assert document['recordings'][0]['node']['state'] == 'active'


def test_without_an_active_node_in_simulated_time_nothing_is_played(
        micro_checkpoint, tmp_path, capsys):
    micro_bag(tmp_path / 'bag')
    arguments = ['replay', str(tmp_path / 'bag'), '--checkpoint', str(micro_checkpoint), '--live',
                 '--out', str(tmp_path / 'out'), '--namespace']
    live.WAIT_S = 1.0
    assert evaluate([*arguments, 'nowhere']) == 1
    assert 'there is no /nowhere/meanflow_policy: start it' in capsys.readouterr().err
    live.WAIT_S = 4.0
    with Rig(micro_checkpoint) as rig:
        assert rig.transition('configure')
        assert evaluate([*arguments, rig.namespace]) == 1
        assert 'is inactive: activate it first' in capsys.readouterr().err
        assert rig.transition('activate')
        until(lambda: rig.values()['state'] == 'active', 'the state in /diagnostics')
        assert evaluate([*arguments, rig.namespace]) == 1
        assert 'does not use simulated time' in capsys.readouterr().err


def test_inputs_count_as_missing_when_they_do_to_the_node():
    node = {each.name: each.default for each in DECLARATIONS}
    for name in ('min_rate_hz', 'frozen_pictures', 'picture_size', 'execution'):
        assert getattr(ReplaySettings, name) == node[name]


def test_steps_that_a_node_has_not_published_are_not_taken_for_its_words():
    robot = make_policy().robot
    stamp_ns = 10**18 + 7
    due = robot.due_ns(stamp_ns)
    actions = np.arange(3 * robot.horizon).reshape(-1, 3) / 7.0
    chunk, known = live.whole_chunk(TimedActions(
        stamp_ns=stamp_ns, due_ns=due[3:], actions=actions[3:]), robot)
    assert known.tolist() == [False] * 3 + [True] * (robot.horizon - 3)
    np.testing.assert_array_equal(chunk.actions[3:], actions[3:])
    np.testing.assert_array_equal(chunk.actions[:3], [actions[3]] * 3)


MEASURED = ('a', 'b', 'pinch')      # the first two are states too
DESCRIPTION = ('<robot name="r">'
               '<joint name="a" type="prismatic"><limit lower="-9" upper="9" velocity="0.7"/>'
               '</joint><joint name="b" type="continuous"/></robot>')
DRIVEN = {
    'control_rate_hz': 50.0, 'deadline_s': 2.0, 'first_step': {'a': 0.1},
    'limits': {'velocity': {'a': 0.8, 'b': 20.0}},
    'remedies': {'first_step': 'clamp', 'velocity': 'slow'},
    'outputs': [{'type': 'joint_trajectory', 'topic': 'arm', 'dimensions': ['a', 'b']},
                {'type': 'forward_command', 'topic': 'grip', 'dimensions': ['pinch']}]}


def answer(stamp_ns: int, robot) -> ActionChunk:
    """Return a chunk that goes away slowly, and breaks a rule at some pictures."""
    number = (stamp_ns - T0) // (50 * MS)
    actions = np.tile([0.5, 0.5, 0.007], (robot.horizon, 1))
    actions[:, 0] += 0.12 * (robot.due_ns(stamp_ns) - T0) / 1e9
    if number % 8 == 1:
        actions[5, 1] = np.nan
    elif number % 8 == 3:
        actions[2, 0] = 9.0
    elif number % 8 == 5:
        actions[1::2, 0] += 0.1
    return ActionChunk(actions=actions, stamp_ns=stamp_ns, period_s=robot.period_s,
                       first_step=robot.first_step)


class Answered:
    """The chunks that a node has had, at the times at which it had them."""

    flow, seconds, chunks = False, 0.0, 0

    def __init__(self, robot, had):
        self.robot, self.had = robot, had

    def play(self, *_):
        return self.had, {}

    def infer(self, queue):
        for taken in queue:
            taken.chunk = answer(taken.stamp_ns, self.robot)

    def settle(self):
        pass


def test_the_running_node_and_the_replay_count_the_same_interventions_by_kind(tmp_path):
    policy = make_policy()
    robot = dataclasses.replace(policy.robot, action_space=dataclasses.replace(
        policy.robot.action_space, dimensions=MEASURED))
    Policy(dataclasses.replace(policy.config, robot=robot), policy.network).save(
        tmp_path / 'policy')
    motion = tmp_path / 'motion.yaml'
    motion.write_text(yaml.safe_dump(DRIVEN))
    scene = Scene()
    scene.add('robot_description', T0, text(DESCRIPTION))
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('push the lever'))
    for late in range(0, 3200, 10):
        scene.add('joint_states', T0 + late * MS, made.joint_state(
            T0 + late * MS, a=0.5 if late < 300 else 0.53, b=0.5, c=0.5))
    for late in range(0, 3000, 50):
        for camera in ('static', 'wrist'):
            scene.add(f'camera/{camera}/image_raw', T0 + late * MS, made.image(
                T0 + late * MS, np.full((HEIGHT, WIDTH, 3), late // 50, np.uint8)))
    for late in range(0, 3500, 100):
        scene.add('action', T0 + late * MS, made.trajectory(
            T0 + late * MS, MEASURED, [[0.5 + late / 1e4, 0.5, 0.007]]))
    scene.add('episode', T0 + 3500 * MS, status('success', 0))
    scene.write(tmp_path / 'bag')
    had, kept = {}, []

    def before(feeder):
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        kept.append(feeder.node.create_publisher(String, 'robot_description', latched))
        kept[0].publish(String(data=DESCRIPTION))
        feeder.node.create_subscription(JointTrajectory, 'arm', kept.append, 100)
        feeder.node.create_subscription(Float64MultiArray, 'grip', kept.append, 100)

    with Rig(tmp_path / 'policy', instruction=None, before_node=before, parameters={
            'use_sim_time': True, 'motion': str(motion)}) as rig:
        rig.activate()
        driven = rig.node._control.motion
        until(lambda: driven.guard.limits.velocity[0] == 0.7, 'the described limit')
        rig.act(lambda real, observation, **options: answer(observation.stamp_ns, robot))
        accept = driven.accept

        def noting(chunk, *, now_ns, **given):
            had[chunk.stamp_ns] = now_ns
            return accept(chunk, now_ns=now_ns, **given)
        driven.accept = noting
        assert evaluate(['replay', str(tmp_path / 'bag'), '--checkpoint',
                         str(tmp_path / 'policy'), '--live', '--namespace', rig.namespace,
                         '--out', str(tmp_path / 'live')]) in (0, 1)
        node = dict(driven.guard.interventions)
    (recording,) = json.loads((tmp_path / 'live' / 'metrics.json').read_text())['recordings']
    assert {kind: int(recording['node'][f'guard {kind}']) for kind in node} == node
    document, (episode,), _ = replay(
        tmp_path / 'bag', Answered(robot, had), policy='live', motion=str(motion), as_driven=True,
        checkpoint=str(tmp_path / 'policy'))
    assert len(episode.stamp_ns) == len(had) > 30 and len(kept) > 30
    assert document['guard']['interventions'] == node
    assert {'not_finite', 'position', 'velocity slowed', 'first_step clamped', 'seam clamped',
            'astray'} <= set(node)
    assert document['recordings'][0]['urdf'] == '/robot_description'
