"""A bag played to the node over DDS gives what the replay without ROS gives."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

from meanflow_ros.core.contract import TimedActions  # noqa: E402, I001
from meanflow_ros.evaluation.evaluate import main as evaluate  # noqa: E402
from meanflow_ros.evaluation.replay import live  # noqa: E402
from meanflow_ros.evaluation.replay.settings import ReplaySettings  # noqa: E402
from meanflow_ros.ros.parameters import DECLARATIONS  # noqa: E402
from micro_policy import LOWER, UPPER, make_policy  # noqa: E402
from node_rig import Rig, until  # noqa: E402
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
