"""`evaluate replay` as its user runs it: bad input, gates, interruptions, many bags."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import made_bags as made
import numpy as np
import pytest
import yaml
from made_bags import MS, ROBOT, T0, Scene, simple_bag, status, text
from micro_policy import DIMENSIONS, HEIGHT, JOINTS, LOWER, UPPER, WIDTH
from replay_rig import troubled_work

from meanflow_ros.core.loading import choose_device, choose_dtype
from meanflow_ros.core.runtime import RuntimeOptions
from meanflow_ros.core.schema import to_plain
from meanflow_ros.evaluation.evaluate import main as evaluate
from meanflow_ros.evaluation.replay import command, jobs, latency
from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.ros.bag_files import METADATA

REAL = Path(os.environ.get('MEANFLOW_TEST_DATA',
                           Path(__file__).parents[2] / 'shared' / 'data')) / 'bridge_v2_octo_debug'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """Return the training configuration of the robot of made_bags."""
    path = tmp_path_factory.mktemp('config') / 'robot.yaml'
    path.write_text(yaml.safe_dump({'robot': to_plain(ROBOT)}))
    return path


@pytest.fixture
def run(config, tmp_path, capsys):
    """Return a function that replays recorded commands: (*arguments) -> code, metrics, text."""
    def call(*arguments, policy=('--policy', 'recorded')):
        out = tmp_path / 'out'
        code = evaluate(['replay', *map(str, arguments), '--config', str(config), *policy,
                         '--out', str(out)])
        shown = capsys.readouterr()
        metrics = out / 'metrics.json'
        return (code, json.loads(metrics.read_text()) if metrics.is_file() else None,
                shown.out + shown.err)
    return call


@pytest.fixture
def bag(tmp_path):
    """Return a bag of two episodes."""
    simple_bag(tmp_path / 'bag')
    return tmp_path / 'bag'


def storage_file(bag):
    (file,) = [each for each in bag.iterdir() if each.name != METADATA]
    return file


def micro_bag(path, length_ms: int = 600, told: str = 'push the lever') -> None:
    """Write a bag of one episode for the robot of micro_policy."""
    scene, random = Scene(), np.random.default_rng(5)
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text(told))
    for late in range(0, length_ms, 10):
        scene.add('joint_states', T0 + late * MS,
                  made.joint_state(T0 + late * MS, **{name: 0.5 for name in JOINTS}))
    for late in range(0, length_ms, 50):
        for camera in ('static', 'wrist'):
            scene.add(f'camera/{camera}/image_raw', T0 + late * MS, made.image(
                T0 + late * MS, random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)))
    for late in range(0, length_ms, 100):
        share = 0.2 + 0.6 * (late / length_ms)
        scene.add('action', T0 + late * MS, made.trajectory(
            T0 + late * MS, DIMENSIONS, [LOWER + share * (UPPER - LOWER)]))
    scene.add('episode', T0 + length_ms * MS, status('success', 0))
    scene.write(path)


def test_a_real_recording_replayed_as_its_own_policy_has_no_error(tmp_path, capsys):
    if not REAL.is_dir():
        pytest.skip(f'there is no recording at {REAL}: set MEANFLOW_TEST_DATA to a folder with '
                    f'bridge_v2_octo_debug')
    cameras = ('shoulder', 'left', 'right')
    names = ('dx', 'dy', 'dz', 'droll', 'dpitch', 'dyaw')
    (tmp_path / 'widowx.yaml').write_text(yaml.safe_dump({
        'robot': {'robot': 'widowx', 'state_names': [], 'horizon': 4, 'period_s': 0.2,
                  'cameras': [{'name': name, 'width': 64, 'height': 64} for name in cameras],
                  'action_space': {'name': 'delta', 'dimensions': [*names, 'gripper'],
                                   'units': ['m'] * 3 + ['rad'] * 3 + ['1'], 'rates': [*names],
                                   'gripper': ['gripper'], 'lower': [-1.6] * 7,
                                   'upper': [1.6] * 7}},
        'data': {'action_topic': 'recorded_action', 'episode_topic': 'episode_index',
                 'camera_topics': {name: f'camera{number}/image_raw/compressed' for name, number
                                   in zip(cameras, ('', '_1', '_2'))}}}))
    code = evaluate(['replay', str(REAL), '--config', str(tmp_path / 'widowx.yaml'), '--policy',
                     'recorded', '--out', str(tmp_path / 'out'),
                     '--fail-if', 'max(executed.max) > 0', '--fail-if', 'max(horizon.p99) > 0'])
    document = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert code == 0 and 'off by 0.00 times' in capsys.readouterr().out
    assert document['counts']['episodes'] == 25 and document['counts']['compared_steps'] == 250
    assert len({text for each in document['episodes'] for text in each['instructions']}) == 4
    assert document['relative_error']['value'] == 0.0
    assert document['baselines']['mean_action']['relative_error']['value'] > 0.5


def test_a_checkpoint_is_replayed_and_a_second_run_computes_nothing_anew(
        micro_checkpoint, tmp_path, monkeypatch):
    micro_bag(tmp_path / 'bag')
    arguments = ['replay', str(tmp_path / 'bag'), '--checkpoint', str(micro_checkpoint), '--out',
                 str(tmp_path / 'out'), '--latency', '20ms', '--probe-every', '0.2']
    assert evaluate(arguments) == 0
    first = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert first['counts']['observations'] > 8 and first['probes']['blanked wrist']['moved'] > 0
    assert first['latency_ms']['p50'] == 20.0
    monkeypatch.setattr(jobs, 'replay_bag', None)     # would be called again
    assert evaluate(arguments) == 0
    assert json.loads((tmp_path / 'out' / 'metrics.json').read_text()) == first


def test_threads_and_batches_change_no_result(micro_checkpoint, tmp_path):
    micro_bag(tmp_path / 'bag', 900)
    episodes = []
    for name, threads, batch in (('one', 1, 16), ('three', 3, 2), ('singly', 2, 1)):
        assert evaluate(['replay', str(tmp_path / 'bag'), '--checkpoint', str(micro_checkpoint),
                         '--out', str(tmp_path / name), '--latency', '20ms', '--probe-every',
                         '0.2', '--threads', str(threads), '--batch', str(batch)]) == 0
        (path,) = (tmp_path / name / 'parts').glob('*/*.npz')
        episodes.append(EpisodeReplay.load(path))
        (recording,) = json.loads((tmp_path / name / 'metrics.json').read_text())['recordings']
        assert recording['inferred'] >= 60 and recording['inference_s'] > 0
    for other in episodes[1:]:
        assert np.abs((other.actions - episodes[0].actions) / (UPPER - LOWER)).max() < 1e-5
        assert other.probes.keys() == episodes[0].probes.keys()
        for probe, chunks in episodes[0].probes.items():
            np.testing.assert_allclose(other.probes[probe] / (UPPER - LOWER),
                                       chunks / (UPPER - LOWER), atol=1e-5, rtol=0)


def test_an_interrupted_run_keeps_its_episodes_and_goes_on(run, bag, monkeypatch):
    whole = run(bag)[1]
    shutil.rmtree(bag.parent / 'out')
    real, replayed = jobs.Parts.save, []

    def save(parts, episode):
        real(parts, episode)
        replayed.append(episode.name)
        if len(replayed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs.Parts, 'save', save)
    code, partial, shown = run(bag)
    assert code == 130 and 'goes on from there' in shown
    assert partial['counts']['episodes'] == 1
    code, again, _ = run(bag)
    assert code == 0 and replayed == ['bag episode 0', 'bag episode 1']
    assert again['executed'] == whole['executed'] and again['episodes'] == whole['episodes']


def test_other_settings_and_another_recording_are_replayed_anew(run, bag):
    run(bag)
    _, narrow, _ = run(bag, '--latency', '60ms')
    assert narrow['latency_ms']['p50'] == 60.0
    shutil.rmtree(bag)
    simple_bag(bag, episodes=3)
    assert run(bag)[1]['counts']['episodes'] == 3


@pytest.mark.parametrize('condition, code', [
    ('first_step_mae.base > 0.01', 0), ('first_step_mae.base >= 0', 3), ('max(executed) > 0', 0),
    ('counts.episodes < 3', 3), ('mean(baselines.repeat_last.first_step_mae) > 1e-6', 3)])
def test_a_condition_that_holds_fails_the_run(run, bag, condition, code):
    assert run(bag, '--fail-if', condition)[0] == code


@pytest.mark.parametrize('condition, message', [
    ('first_step_mae.bse > 0.01', 'nearest: first_step_mae.base'),
    ('executed > 1', r'several numbers: write max\(executed\)'),
    ('verdict.level > 1', 'is no number'),
    ('__import__("os") > 1', 'write NAME > NUMBER'), ('x > nan', 'must be finite'),
    ('x >', 'write NAME > NUMBER'), ('max(x > 1', 'write NAME > NUMBER')])
def test_a_condition_that_cannot_be_read_is_explained(run, bag, condition, message):
    code, _, shown = run(bag, '--fail-if', condition)
    assert code == 1
    assert re.search(message, shown), shown


def test_a_missing_topic_is_named_with_the_nearest_and_all_that_are_there(run, tmp_path):
    simple_bag(tmp_path / 'bag', action_topic='actions')
    code, _, shown = run(tmp_path / 'bag')
    assert code == 1
    assert 'the bag has no topic /action (action_topic), did you mean /actions?' in shown
    assert '--topic action:=/actions' in shown
    assert '/joint_states (sensor_msgs/msg/JointState)' in shown
    code, document, _ = run(tmp_path / 'bag', '--topic', 'action:=/actions')
    assert code == 0 and document['executed']['max']['base'] == 0.0


def test_a_name_that_holds_the_word_is_nearer_than_one_that_looks_alike(run, tmp_path):
    scene = Scene()
    scene.robot(T0, 100 * MS, action_topic='arm/recorded_action')
    scene.add('instruction', T0, text('go'))
    scene.add('episode', T0, status('start', 0))
    scene.write(tmp_path / 'bag')
    assert 'did you mean /arm/recorded_action?' in run(tmp_path / 'bag')[2]
    assert not (tmp_path / 'out').exists()


def test_a_remapping_of_a_name_that_nothing_reads_is_refused(run, bag):
    assert 'nothing is read from /camera/left/image' in run(
        bag, '--topic', 'camera/left/image:=/x')[2]


def test_a_topic_of_the_wrong_type_is_named_with_the_right_one(run, bag):
    code, _, shown = run(bag, '--topic', 'joint_states:=/instruction')
    assert code == 1
    assert ('/instruction (state_topic) holds std_msgs/msg/String, expected '
            'sensor_msgs/msg/JointState') in shown


def test_pictures_and_actions_of_different_times_are_one_clear_reason(run, tmp_path):
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('go'))
    scene.robot(T0, 300 * MS, without=('actions',))
    scene.robot(T0 + 5000 * MS, 300 * MS, without=('front', 'wrist', 'states'))
    scene.add('episode', T0 + 5400 * MS, status('success', 0))
    scene.write(tmp_path / 'bag')
    code, document, shown = run(tmp_path / 'bag')
    assert code == 1 and 'pictures and actions do not overlap in time' in shown
    assert document['verdict']['level'] == 'stop'


def test_a_checkpoint_for_another_robot_is_refused_by_its_first_difference(
        run, bag, micro_checkpoint):
    code, _, shown = run(bag, policy=('--checkpoint', str(micro_checkpoint)))
    assert code == 1 and 'is for another robot than' in shown and 'micro_robot' in shown


def test_a_recording_of_another_robot_is_one_clear_reason(run, tmp_path):
    simple_bag(tmp_path / 'bag', action=lambda time_ns: made.trajectory(
        time_ns, ['shoulder', 'wrist', 'claw'], [[0.1, 0.2, 0.3]]))
    code, _, shown = run(tmp_path / 'bag')
    assert code == 1
    assert ("trajectory is for ['shoulder', 'wrist', 'claw'], expected "
            "['base', 'elbow', 'gripper']") in shown


@pytest.mark.parametrize('damage, lost', [
    ('truncated', 'is damaged'), ('unfinished', 'was not finished')])
def test_of_a_damaged_bag_the_whole_episodes_are_replayed_and_the_loss_is_told(
        run, tmp_path, damage, lost):
    simple_bag(tmp_path / 'bag', episodes=8, picture=noise)
    file = storage_file(tmp_path / 'bag')
    content = file.read_bytes()
    if damage == 'truncated':
        file.write_bytes(content[:len(content) * 3 // 5])
    else:
        (tmp_path / 'bag' / METADATA).unlink()
        file.write_bytes(content[:-500])
    code, document, shown = run(tmp_path / 'bag')
    assert code == 0 and 'damaged' in shown and lost in shown
    assert document['recordings'][0]['lost']
    episodes = document['counts']['episodes']
    assert 3 <= episodes <= 6 if damage == 'truncated' else episodes == 8
    assert document['executed']['max']['base'] == 0.0


def noise(stamp_ns: int, pixels):
    """Return a picture that cannot be compressed, so that the file's size tells its time."""
    return made.image(stamp_ns, np.random.default_rng(stamp_ns % 2**32).integers(
        0, 256, (48, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize('content, message', [
    (b'', 'the file is empty'), (b'not a bag at all', 'does not begin like an mcap file')])
def test_a_bag_of_which_nothing_is_readable_is_one_clear_error(run, bag, content, message):
    storage_file(bag).write_bytes(content)
    code, document, shown = run(bag)
    assert code == 1 and document is None and message in shown


def test_a_folder_without_a_bag_says_what_a_bag_is(run, tmp_path):
    (tmp_path / 'nothing').mkdir()
    assert 'is not a rosbag2 and holds none: a bag is a directory with metadata.yaml' in run(
        tmp_path / 'nothing')[2]
    assert 'there is no bag at' in run(tmp_path / 'gone')[2]


def test_of_many_bags_a_bad_one_is_reported_and_processes_give_the_numbers_of_one(run, tmp_path):
    for number in range(3):
        simple_bag(tmp_path / 'bags' / f'b{number}', episodes=1 + number)
    storage_file(tmp_path / 'bags' / 'b1').write_bytes(b'broken')
    found = []
    for jobs_option in ('1', '2'):
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)
        code, document, shown = run(tmp_path / 'bags', '--jobs', jobs_option)
        assert code == command.PARTIAL
        assert [each['name'] for each in document['recordings'] if each['error']] == ['b1']
        assert 'b1: ' in shown and 'does not begin like an mcap file' in shown
        assert document['counts']['episodes'] == 4
        found.append(document)
    for what in ('executed', 'horizon', 'baselines', 'episodes', 'seams', 'recordings'):
        assert found[0][what] == found[1][what]


def test_a_bag_that_ends_its_process_or_raises_anything_stops_no_other(
        run, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, '_work_in_process', troubled_work)
    for name in ('b0', 'dies', 'odd', 'p0', 'p1', 'p2'):
        simple_bag(tmp_path / 'bags' / name, episodes=1)
    code, document, shown = run(tmp_path / 'bags', '--jobs', '2')
    assert code == command.PARTIAL and document['counts']['episodes'] == 4
    assert {each['name']: each['error'] for each in document['recordings'] if each['error']} == {
        'dies': 'the worker process died, perhaps for want of memory',
        'odd': "KeyError: 'pose'"}
    assert "odd: KeyError: 'pose'" in shown


def test_processes_with_a_network_give_the_numbers_of_one(micro_checkpoint, tmp_path):
    for name in ('b0', 'b1'):
        micro_bag(tmp_path / 'bags' / name)
    one, two = [], []
    for number, found in (('1', one), ('2', two)):
        assert evaluate(['replay', str(tmp_path / 'bags'), '--checkpoint', str(micro_checkpoint),
                         '--out', str(tmp_path / number), '--latency', '20ms', '--jobs', number,
                         '--no-mcap']) == 0
        found += [EpisodeReplay.load(path)
                  for path in sorted((tmp_path / number / 'parts').glob('*/*.npz'))]
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two):
        assert np.abs((ours.actions - theirs.actions) / (UPPER - LOWER)).max() < 1e-5


@pytest.mark.parametrize('threads, processes, share', [
    (16, 4, 4), (16, 16, 1), (7, 3, 2), (2, 5, 1)])
def test_processes_share_the_threads_and_each_has_one(threads, processes, share, monkeypatch):
    assert jobs.share_of(threads, processes) == share
    monkeypatch.setattr(jobs.torch, 'get_num_threads', lambda: threads)
    assert jobs.share_of(0, processes) == share


def test_machines_of_a_ray_cluster_give_the_same_numbers(run, tmp_path):
    pytest.importorskip('ray', reason="Ray is an extra: pip install 'meanflow_ros[ray]'")
    for number in range(2):
        simple_bag(tmp_path / 'bags' / f'b{number}', episodes=2)
    simple_bag(tmp_path / 'bags' / 'bad', episodes=1, action_topic='actions')
    alone = run(tmp_path / 'bags')[1]
    shutil.rmtree(tmp_path / 'out')
    code, far, shown = run(tmp_path / 'bags', '--ray', 'local')
    assert code == command.PARTIAL and 'bad: the bag has no topic /action' in shown
    for what in ('executed', 'horizon', 'baselines', 'episodes', 'recordings'):
        assert alone[what] == far[what]


def test_without_ray_the_extra_is_named(run, bag, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'ray', None)
    code, _, shown = run(bag, '--ray')
    assert code == 1 and "pip install 'meanflow_ros[ray]'" in shown


def test_a_measured_latency_is_of_the_network_as_the_node_runs_it(
        micro_checkpoint, tmp_path, monkeypatch):
    micro_bag(tmp_path / 'bag')
    monkeypatch.setattr(latency, 'MEASURE_S', 600.0)    # a busy machine is slow
    loaded, load = [], latency.load
    monkeypatch.setattr(latency, 'load', lambda path, **how: loaded.append(how) or load(
        path, **how))
    arguments = ['replay', str(tmp_path / 'bag'), '--checkpoint', str(micro_checkpoint), '--out',
                 str(tmp_path / 'out'), '--probe-every', '0', '--sampler-steps', '2']
    for _ in range(2):    # the second takes what the first has measured
        assert evaluate(arguments) == 0
        found = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert loaded == [{'device': 'auto', 'dtype': 'auto', 'options': RuntimeOptions()}]
    device = choose_device('auto')
    dtype = str(choose_dtype('auto', device)).removeprefix('torch.')
    runtime = found['latency_ms']['runtime']
    assert (runtime['device'].partition(':')[0], runtime['dtype']) == (device.type, dtype)
    assert runtime['NFE'] == '2' and {'CUDA graph', 'compiled', 'kernels', 'fp8'} < runtime.keys()
    assert found['latency_ms']['source'] == (
        f'measured here, the network alone on {runtime["device"]} in {dtype}, 100 inferences')
    assert (found['settings']['device'], found['settings']['dtype']) == ('cpu', 'float32')
    assert len(json.loads((tmp_path / 'out' / 'latency.json').read_text())['latencies_ms']) == 100


def test_a_slow_network_is_timed_five_times(micro_checkpoint, monkeypatch):
    monkeypatch.setattr(latency, 'MEASURE_S', 0.0)
    begin = time.perf_counter()
    found = latency.measured(str(micro_checkpoint), device='cpu', dtype='float32', threads=1)
    assert 0 < sum(found.values_s) < time.perf_counter() - begin     # in seconds
    assert len(found.values_s) == 5 and found.source == (
        'measured here, the network alone on cpu in float32, 5 inferences')
    assert found.runtime['threads'] == '1'


def test_a_device_or_numbers_that_are_not_there_are_one_clear_error(run, bag):
    code, _, shown = run(bag, '--device', 'cuda:99')
    assert code == 1 and "device 'cuda:99' was asked for but PyTorch sees" in shown
    code, _, shown = run(bag, '--compare', 'dtype=float32', 'dtype=int8')
    assert code == 1 and 'dtype must be auto or one of' in shown and "got 'int8'" in shown


def test_latencies_of_another_machine_are_drawn_from_a_file(run, bag, tmp_path):
    (tmp_path / 'latency.json').write_text(json.dumps({'latencies_ms': [10.0, 30.0]}))
    document = run(bag, '--latency', tmp_path / 'latency.json')[1]
    assert document['latency_ms']['max'] == 30.0
    assert document['latency_ms']['source'] == 'file: latency.json'
    assert 'no such file' in run(bag, '--latency', 'soon')[2]
    (tmp_path / 'bad.json').write_text('{"latencies_ms": ["x"]}')
    assert 'must hold a list of numbers' in run(bag, '--latency', tmp_path / 'bad.json')[2]
