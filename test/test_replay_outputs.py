"""What a replay leaves beside report.html: replay.mcap, and comparisons of two."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from made_bags import MS, ROBOT, T0, simple_bag
from replay_rig import Fake, offsets, replay
from test_replay_command import micro_bag

from meanflow_ros.evaluation.evaluate import main as evaluate
from meanflow_ros.evaluation.replay.comparison import OVERALL, difference
from meanflow_ros.evaluation.replay.latency import Latency
from meanflow_ros.evaluation.replay.questions import drift
from meanflow_ros.evaluation.replay.replay_mcap import write_mcap
from meanflow_ros.evaluation.replay.running import Replayed
from meanflow_ros.evaluation.replay.settings import ReplaySettings
from meanflow_ros.evaluation.replay.verdict import judge
from meanflow_ros.ros.bag import deserialize
from meanflow_ros.ros.bag_files import Bag
from meanflow_ros.training.data_config import DataConfig


def read_with_mcap(path) -> list[tuple[str, str, int, object]]:
    """Return (topic, type, time, message) of a file, read by the mcap package."""
    reader = pytest.importorskip('mcap.reader', reason='mcap is missing: pip install mcap')
    with open(path, 'rb') as file:
        return [(channel.topic, schema.name, message.log_time,
                 deserialize(message.data, schema.name))
                for schema, channel, message in reader.make_reader(file).iter_messages()]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Return a bag, its replayed episodes, and what the mcap reader finds in replay.mcap."""
    folder = tmp_path_factory.mktemp('mcap')
    simple_bag(folder / 'bag', length_ns=400 * MS, camera_ns=40 * MS, delay_ns=0)
    _, episodes, _ = replay(folder / 'bag', Fake(error=offsets(0.01, 0.02, 0.03, 0.04, 0.05)),
                            latency_ms=35)

    settings = ReplaySettings(robot=ROBOT, data=DataConfig(), policy='recorded',
                              latency=Latency(values_s=(0.0,), source=''))
    write_mcap(folder / 'replay.mcap', folder / 'bag', settings, iter(episodes))
    return folder / 'bag', episodes, read_with_mcap(folder / 'replay.mcap')


def of(messages, topic: str):
    return [(time_ns, message) for name, _, time_ns, message in messages if name == topic]


def test_the_input_topics_are_there_message_for_message(written):
    bag, _, messages = written
    with Bag(bag) as opened:
        expected = {topic: [raw.stamp_ns for raw in opened.messages({topic})]
                    for topic in opened.topics}
    for topic, times in expected.items():
        assert [time_ns for time_ns, _ in of(messages, topic)] == times
    assert {kind for _, kind, _, _ in messages} >= {
        'sensor_msgs/msg/Image', 'trajectory_msgs/msg/JointTrajectory'}
    assert [time_ns for _, _, time_ns, _ in messages] == sorted(
        time_ns for _, _, time_ns, _ in messages)


def test_every_chunk_is_there_when_it_was_ready_with_its_due_times(written):
    _, episodes, messages = written
    chunks = of(messages, '/replay/action_chunk')
    assert len(chunks) == sum(len(each.stamp_ns) for each in episodes)
    time_ns, first = chunks[0]
    assert time_ns == T0 + 36 * MS
    assert first.header.stamp.sec * 10**9 + first.header.stamp.nanosec == T0
    np.testing.assert_array_equal([point.positions for point in first.points],
                                  episodes[0].actions[0])
    assert [point.time_from_start.nanosec for point in first.points] == [
        0, 20 * MS, 40 * MS, 60 * MS, 80 * MS]


def test_every_control_step_has_its_error_and_its_diagnostics(written):
    _, episodes, messages = written
    errors = of(messages, '/replay/error')
    assert errors and {round(message.position[0], 9) for _, message in errors} == {0.03, 0.04}
    assert errors[0][1].name == ['base', 'elbow', 'gripper']
    executed = dict((time_ns, message) for time_ns, message in of(messages, '/replay/executed'))
    recorded = dict((time_ns, message) for time_ns, message in of(messages, '/replay/recorded'))
    for time_ns, message in errors:
        np.testing.assert_allclose(message.position, executed[time_ns].position
                                   - recorded[time_ns].position, atol=1e-12)
    steps = [message.status[0] for _, message in of(messages, '/replay/diagnostics')
             if message.status[0].name == 'replay: step']
    assert len(steps) == sum(len(each.tick_ns) for each in episodes)
    ages = [float(pair.value) for status in steps for pair in status.values if pair.key == 'age_s']
    assert set(np.round(ages, 6)) == {0.04, 0.06}


# Comparisons


def replayed(bag, error) -> Replayed:
    document, episodes, _ = replay(bag, Fake(error=error))
    return Replayed(document, episodes, interrupted=False)


def per_episode(values):
    """Return an error of `base` that differs from episode to episode."""
    def error(observation, seed, steps):
        number = int(observation.instruction[-1])
        return np.array([values[number], 0.0, 0.0])
    return error


def test_the_difference_is_paired_so_that_hard_episodes_do_not_hide_it(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=8, length_ns=200 * MS, camera_ns=40 * MS, delay_ns=0)
    a = replayed(tmp_path / 'bag', per_episode([0.05, 0.50]))      # one in two is hard
    b = replayed(tmp_path / 'bag', per_episode([0.06, 0.51]))      # 0.01 worse on each
    found = difference(a, b, ['a', 'b'])
    assert found['pairs'] == 8
    base = found['differences']['base']
    for key in ('value', 'low', 'high'):        # every resampling of pairs gives 0.01
        assert base['difference'][key] == pytest.approx(0.01)
    assert base['unit'] == 'rad' and base['b'] - base['a'] == pytest.approx(0.01)
    assert found['differences']['elbow']['difference']['value'] == pytest.approx(0.0)
    assert 'A is nearer to the recordings than B' in found['verdict']['headline']
    rejected = found['shares']['rejected']
    assert rejected['a'] == rejected['b']
    assert rejected['difference'] == {'value': 0.0, 'low': 0.0, 'high': 0.0}


def test_shares_of_steps_and_chunks_are_compared_over_the_same_episodes(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=4, length_ns=200 * MS, camera_ns=40 * MS, delay_ns=0)
    # The recording leaves the limits in the last of four episodes; B in the second one too.
    found = difference(replayed(tmp_path / 'bag', per_episode([0.0, 0.0])),
                       replayed(tmp_path / 'bag', per_episode([0.0, 1e6])), ['a', 'b'])
    rejected = found['shares']['rejected']
    assert (rejected['a'], rejected['b']) == (6 / 22, 11 / 22)
    assert rejected['difference']['value'] == pytest.approx(5 / 22)
    assert rejected['difference']['low'] == 0.0 < 5 / 22 < rejected['difference']['high'] < 1
    assert found['shares']['missed']['difference']['value'] == 0.0


def test_what_differs_in_sign_from_episode_to_episode_is_not_told_apart(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=6, length_ns=200 * MS, camera_ns=40 * MS, delay_ns=0)
    found = difference(replayed(tmp_path / 'bag', per_episode([0.05, 0.05])),
                       replayed(tmp_path / 'bag', per_episode([0.01, 0.08])), ['a', 'b'])
    span = found['differences'][OVERALL]['difference']
    assert span['low'] < 0 < span['high']
    assert 'do not tell A and B apart' in found['verdict']['headline']


def test_two_settings_of_a_checkpoint_are_compared_from_the_command_line(
        micro_checkpoint, tmp_path, capsys):
    micro_bag(tmp_path / 'bags' / 'one')
    micro_bag(tmp_path / 'bags' / 'two', length_ms=700)
    arguments = ['replay', str(tmp_path / 'bags'), '--checkpoint', str(micro_checkpoint), '--out',
                 str(tmp_path / 'out'), '--latency', '20ms', '--probe-every', '0', '--no-mcap']
    assert evaluate([*arguments, '--compare', 'sampler_steps=1', 'sampler_steps=4,seed=3']) == 0
    document = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert document['pairs'] == 2 and document['a']['name'] == 'sampler_steps=1'
    own = json.loads((tmp_path / 'out' / 'b' / 'metrics.json').read_text())
    assert own['settings']['sampler_steps'] == 4 and own['settings']['seed'] == 3
    assert document['differences']['slide']['b'] == pytest.approx(own['first_step_mae']['slide'])
    assert (tmp_path / 'out' / 'report.html').is_file()
    assert 'written to' in capsys.readouterr().out
    assert evaluate([*arguments, '--compare', 'seed=1', 'seed=1', '--fail-if',
                     'differences.relative_error.difference.value > 0']) == 0
    assert evaluate([*arguments, '--compare', 'sampler_steps=x', 'seed=1']) == 1
    assert evaluate([*arguments, '--compare', 'stpes=2', 'seed=1']) == 1
    assert 'checkpoint directory or FIELD=VALUE' in capsys.readouterr().err


def test_an_instruction_that_training_has_not_heard_is_told(written):
    _, episodes, _ = replay(written[0], Fake())
    told = sorted({text for each in episodes for text in each.instructions})
    assert drift(episodes, ROBOT, None, None, (), [told[0], 'other'])['instructions'] == {
        'trained': 2, 'recorded': len(told), 'unheard': told[1:]}
    assert drift(episodes, ROBOT, None, None, (), told)['instructions']['unheard'] == []
    document, _, _ = replay(written[0], Fake())
    assert 'does not say' in document['drift']['instructions']['missing']
    document['drift']['instructions'] = {'trained': 1, 'recorded': 1, 'unheard': ['fold it']}
    (finding,) = [each for each in judge(document)['findings'] if 'never heard' in each['text']]
    assert finding['text'] == "Training has never heard 'fold it'."
    assert finding['rests_on'] == 'drift.instructions.unheard'


def test_replay_md_names_every_part_of_metrics_json(written):
    document, _, _ = replay(written[0], Fake())
    path = Path(__file__).parents[1] / 'docs' / 'replay.md'
    if not path.is_file():
        pytest.skip('there is no replay.md beside the tests')
    table = path.read_text().split('<!-- metrics -->')[1].split('<!-- /metrics -->')[0]
    named = [name for line in table.splitlines() if line.startswith('| `')
             for name in re.findall(r'`(\w+)`', line.split('|')[1])]
    assert sorted(named) == sorted(document)
    assert (document['schema'], document['version']) == ('meanflow_ros/replay', 1)
    assert f'`{document["schema"]}`, `version` 1' in path.read_text()
