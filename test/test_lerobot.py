"""LeRobot data sets in, and bags out to them."""

import dataclasses
import json
import os
import signal
import sys
import time
from fractions import Fraction

import av
import child
import cv2
import made_bags as made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from made_bags import MS, ROBOT, T0, Scene, simple_bag, status, text

from meanflow_ros.core.contract import CameraSpec
from meanflow_ros.core.schema import to_plain
from meanflow_ros.training.cache import build_cache, open_cache
from meanflow_ros.training.data_config import DataConfig
from meanflow_ros.training.episode import Episode, Skipped
from meanflow_ros.training.export_lerobot import export, main
from meanflow_ros.training.recordings import find_recordings, read_episodes

SIZE, FPS = 32, 50
VIDEO_ERROR = 3.0    # mean difference of a picture from its video, of 255; 7 from the next one
LENGTHS = (7, 4, 9)
STATE_NAMES, ACTION_NAMES = ['base', 'elbow'], ['gripper', 'base', 'elbow']


def read(path, robot=ROBOT, part=(0, 1), **data):
    found = list(read_episodes(path, robot, DataConfig(**data), SIZE, part))
    return ([e for e in found if isinstance(e, Episode)],
            [f'{e.name}: {e.reason}' for e in found if isinstance(e, Skipped)])


def grid_bag(path, episodes=2, length_ns=300 * MS, **changes):
    """Write a bag whose pictures lie on the grid of its actions."""
    simple_bag(path, episodes=episodes, length_ns=length_ns, camera_ns=20 * MS, delay_ns=0,
               **changes)


def assert_same(actual, expected, *, video_error=VIDEO_ERROR):
    np.testing.assert_array_equal(actual.mask, expected.mask)
    np.testing.assert_array_equal(actual.chunks, expected.chunks)
    np.testing.assert_allclose(actual.states, expected.states, rtol=1e-6)
    assert actual.instructions == expected.instructions
    difference = np.abs(actual.pictures.astype(float) - expected.pictures)
    assert difference.mean((2, 3, 4)).max() <= video_error


# Data sets made by hand


def action_of(episode, frame):
    return np.array([frame / 64 + episode, -frame / 128, 0.5 + episode / 8], np.float32)


def state_of(episode, frame):
    return np.array([episode - frame / 32, frame / 16], np.float32)


def picture_of(camera, episode, frame):
    return made.pixels(camera, episode * 20 + frame, height=32, width=48)


def rows_of(episode, length, first_row):
    """Return the columns of an episode's table."""
    frames = range(length)
    return {
        'action': pa.array([action_of(episode, frame).tolist() for frame in frames],
                           pa.list_(pa.float32())),
        'observation.state': pa.array([state_of(episode, frame).tolist() for frame in frames],
                                      pa.list_(pa.float32())),
        'timestamp': pa.array([frame / FPS for frame in frames], pa.float32()),
        'frame_index': pa.array(frames, pa.int64()),
        'episode_index': pa.array([episode] * length, pa.int64()),
        'index': pa.array(range(first_row, first_row + length), pa.int64()),
        'task_index': pa.array([episode % 2] * length, pa.int64())}


def write_video(path, pictures, key_frame_every=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=FPS, options={
            'crf': '12', 'g': str(key_frame_every)})
        stream.width, stream.height, stream.pix_fmt = 48, 32, 'yuv420p'
        for number, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def info_of(version, **changes):
    pictures = {'shape': [32, 48, 3], 'names': ['height', 'width', 'channels']}
    features = {
        'action': {'dtype': 'float32', 'shape': [3], 'names': ACTION_NAMES},
        'observation.state': {'dtype': 'float32', 'shape': [2], 'names': {'motors': STATE_NAMES}},
        'observation.images.front': {'dtype': 'video', **pictures},
        'observation.images.wrist': {'dtype': 'image', **pictures},
        'index': {'dtype': 'int64', 'shape': [1], 'names': None}}
    return {'codebase_version': version, 'fps': FPS, 'chunks_size': 2,
            'total_episodes': len(LENGTHS), 'features': features, **changes}


def wrist_column(episode, length):
    cells = [{'bytes': cv2.imencode('.png', cv2.cvtColor(picture_of('wrist', episode, frame),
                                                         cv2.COLOR_RGB2BGR))[1].tobytes(),
              'path': None} for frame in range(length)]
    return pa.array(cells, pa.struct({'bytes': pa.binary(), 'path': pa.string()}))


def write_info(root, info):
    (root / 'meta').mkdir(parents=True, exist_ok=True)
    (root / 'meta' / 'info.json').write_text(json.dumps(info))


def make_v2(root, **changes):
    """Write three episodes as version 2.1: a file each, two to a chunk."""
    write_info(root, info_of(
        'v2.1', data_path='data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet',
        video_path='videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4',
        **changes))
    row = 0
    for episode, length in enumerate(LENGTHS):
        columns = rows_of(episode, length, row)
        row += length
        columns['observation.images.wrist'] = wrist_column(episode, length)
        path = root / f'data/chunk-{episode // 2:03d}/episode_{episode:06d}.parquet'
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        write_video(root / f'videos/chunk-{episode // 2:03d}/observation.images.front/'
                    f'episode_{episode:06d}.mp4',
                    [picture_of('front', episode, frame) for frame in range(length)])
    (root / 'meta' / 'episodes.jsonl').write_text(''.join(
        json.dumps({'episode_index': episode, 'tasks': ['x'], 'length': length}) + '\n'
        for episode, length in enumerate(LENGTHS)))
    (root / 'meta' / 'tasks.jsonl').write_text(''.join(
        json.dumps({'task_index': number, 'task': task}) + '\n'
        for number, task in enumerate(('stack', 'unstack'))))


def make_v3(root, **changes):
    """Write the same as version 3.0: two episodes in the first file, one in the second."""
    write_info(root, info_of(
        'v3.0', data_path='data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet',
        video_path='videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4',
        **changes))
    entries, row, rows, pictures = [], 0, [], []
    for episode, length in enumerate(LENGTHS):
        file, first_of_file = (0, 0) if episode < 2 else (1, 11)
        columns = rows_of(episode, length, row)
        columns['observation.images.wrist'] = wrist_column(episode, length)
        rows.append(pa.table(columns))
        pictures += [picture_of('front', episode, frame) for frame in range(length)]
        entries.append({
            'episode_index': episode, 'length': length, 'tasks': ['x'],
            'data/chunk_index': 0, 'data/file_index': file,
            'videos/observation.images.front/chunk_index': 0,
            'videos/observation.images.front/file_index': file,
            'videos/observation.images.front/from_timestamp': (row - first_of_file) / FPS,
            'videos/observation.images.front/to_timestamp': (row - first_of_file + length) / FPS})
        row += length
        if episode:
            path = root / f'data/chunk-000/file-{file:03d}.parquet'
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.concat_tables(rows), path, row_group_size=5)
            write_video(root / f'videos/observation.images.front/chunk-000/file-{file:03d}.mp4',
                        pictures)
            rows, pictures = [], []
    path = root / 'meta/episodes/chunk-000/file-000.parquet'
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(entries), path)
    pq.write_table(pa.table({'task_index': [0, 1], '__index_level_0__': ['stack', 'unstack']}),
                   root / 'meta' / 'tasks.parquet')


@pytest.fixture(scope='module', params=['v2.1', 'v3.0'])
def root(request, tmp_path_factory):
    """Return a data set of the version."""
    path = tmp_path_factory.mktemp('sets') / 'set'
    (make_v2 if request.param == 'v2.1' else make_v3)(path)
    return path


def changed(root, tmp_path, **changes):
    """Return a data set with another info.json, and the same files."""
    copy = tmp_path / 'set'
    copy.mkdir()
    for entry in root.iterdir():
        if entry.name != 'meta':
            (copy / entry.name).symlink_to(entry)
    (copy / 'meta').mkdir()
    for entry in (root / 'meta').iterdir():
        if entry.name != 'info.json':
            (copy / 'meta' / entry.name).symlink_to(entry)
    info = json.loads((root / 'meta' / 'info.json').read_text())
    write_info(copy, {**info, **changes})
    return copy


def test_every_frame_becomes_an_observation_with_the_actions_that_follow(root):
    episodes, skipped = read(root)
    assert skipped == [] and [len(e) for e in episodes] == list(LENGTHS)
    for number, episode in enumerate(episodes):
        assert episode.name == f'set episode {number}'
        assert set(episode.instructions) == {('stack', 'unstack')[number % 2]}
        for frame in range(LENGTHS[number]):
            for step in range(5):
                later = min(frame + step, LENGTHS[number] - 1)
                gripper, base, elbow = action_of(number, later)
                np.testing.assert_array_equal(episode.chunks[frame, step], [base, elbow, gripper])
                assert episode.mask[frame, step] == (frame + step < LENGTHS[number])
            base, elbow = state_of(number, frame)
            np.testing.assert_array_equal(episode.states[frame], [elbow, base])


def test_pictures_come_from_videos_and_from_tables(root):
    episodes, _ = read(root, part=(0, 1))
    for number, episode in enumerate(episodes):
        for frame in range(LENGTHS[number]):
            for at, camera in enumerate(('front', 'wrist')):
                expected = cv2.resize(picture_of(camera, number, frame), (SIZE, SIZE),
                                      interpolation=cv2.INTER_AREA).astype(float)
                error = np.abs(episode.pictures[frame, at] - expected).mean()
                assert error < VIDEO_ERROR, (number, frame, camera)


def test_shares_of_a_data_set_make_the_whole(root):
    whole, _ = read(root)
    parts = [e for i in range(2) for e in read(root, part=(i, 2))[0]]
    assert [e.name for e in parts] == [e.name for e in whole]
    for one, other in zip(parts, whole):
        np.testing.assert_array_equal(one.pictures, other.pictures)


def test_a_period_of_several_frames_skips_those_between(root):
    robot = dataclasses.replace(ROBOT, period_s=0.04, horizon=3, first_step=1)
    episodes, _ = read(root, robot)
    assert [len(e) for e in episodes] == [5, 2, 7]      # the first step must be recorded
    np.testing.assert_array_equal(episodes[0].chunks[1, :2, 0], [-3 / 128, -5 / 128])
    assert episodes[0].mask[1].tolist() == [True, True, False]


@pytest.mark.parametrize('period_s, advice', [(0.033, '0.04'), (0.009, '0.02')])
def test_a_period_that_is_no_whole_number_of_frames_is_refused(root, period_s, advice):
    _, skipped = read(root, dataclasses.replace(ROBOT, period_s=period_s))
    assert '50 fps do not fit the period' in skipped[0] and f'period_s: {advice}' in skipped[0]


def test_relative_actions_and_a_file_of_instructions_work_as_with_bags(root, tmp_path):
    (root.parent / 'said.yaml').write_text(yaml.safe_dump({'set': 'sweep'}))
    plain, _ = read(root)
    relative, _ = read(root, relative=True, instruction_file='said.yaml')
    np.testing.assert_array_equal(
        relative[0].chunks[:, :, 0], plain[0].chunks[:, :, 0] - plain[0].states[:, 1:])
    assert set(relative[0].instructions) == {'sweep'}


def test_names_decide_which_number_is_which(root, tmp_path):
    info = json.loads((root / 'meta' / 'info.json').read_text())
    features = info['features']
    features['action']['names'] = ['a', 'b', 'c']
    _, skipped = read(changed(root, tmp_path, features=features))
    assert "feature 'action' has the names ['a', 'b', 'c'], the robot has ['base'" in skipped[0]
    (first, *_), _ = read(tmp_path / 'set', lerobot_by_position=True)
    np.testing.assert_array_equal(first.chunks[2, 0], action_of(0, 2))


@pytest.mark.parametrize('data, reason', [
    ({'lerobot_images': {'front': 'observation.image'}},
     "there are no pictures 'observation.image' for camera 'front', there are "
     'observation.images.front, observation.images.wrist'),
    ({'lerobot_action': 'actions'}, "there is no feature 'actions', there are action, "),
    ({'lerobot_state': 'index'}, "feature 'index' has 1 numbers, the robot has 2: ['elbow'")])
def test_a_missing_feature_is_named_with_those_that_there_are(root, data, reason):
    _, skipped = read(root, **data)
    assert reason in skipped[0]


def test_states_and_actions_can_be_one_feature(root):
    (first, *_), _ = read(root, lerobot_state='action')
    np.testing.assert_array_equal(first.states, first.chunks[:, 0, 1::-1])


def test_another_version_is_refused_by_name(root, tmp_path):
    _, skipped = read(changed(root, tmp_path, codebase_version='v1.6'))
    assert skipped == ["set: version 'v1.6' of LeRobot data sets cannot be read, only v2.0, "
                       'v2.1, v3.0']


def test_a_broken_video_costs_only_its_episodes(tmp_path):
    make_v2(tmp_path / 'set')
    video = tmp_path / 'set/videos/chunk-000/observation.images.front/episode_000001.mp4'
    video.write_bytes(video.read_bytes()[:300])
    (tmp_path / 'set/data/chunk-001/episode_000002.parquet').unlink()
    episodes, skipped = read(tmp_path / 'set')
    assert [e.name for e in episodes] == ['set episode 0']
    assert skipped[0].startswith('set episode 1: ') and 'episode_000001.mp4' in skipped[0]
    assert skipped[1].startswith('set episode 2: ')


def test_a_video_that_ends_early_is_named_with_the_missing_second(tmp_path):
    make_v3(tmp_path / 'set')
    write_video(tmp_path / 'set/videos/observation.images.front/chunk-000/file-000.mp4',
                [picture_of('front', 0, frame) for frame in range(9)])
    episodes, skipped = read(tmp_path / 'set')
    assert [e.name for e in episodes] == ['set episode 0', 'set episode 2']
    assert skipped == ['set episode 1: file-000.mp4 has no frame at 0.180 s']


def test_bags_and_lerobot_data_sets_are_cached_together(root, tmp_path):
    grid_bag(tmp_path / 'bag', episodes=1)
    paths = find_recordings(root) + find_recordings(tmp_path)
    build_cache(paths, ROBOT, DataConfig(), SIZE, tmp_path / 'cache')
    assert open_cache(tmp_path / 'cache').instructions == ['pick up block 0', 'stack', 'unstack']
    assert len(open_cache(tmp_path / 'cache').episode_names) == 4


def test_without_its_packages_a_data_set_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, 'meanflow_ros.training.lerobot', None)
    with pytest.raises(ValueError, match=r"pip install 'meanflow_ros\[lerobot\]'"):
        read(root)


# Export


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Return a folder of two bags and a data set made of them."""
    folder = tmp_path_factory.mktemp('export')
    grid_bag(folder / 'bags' / 'a', episodes=3)
    grid_bag(folder / 'bags' / 'b', episodes=1)
    skipped = export(find_recordings(folder / 'bags'), folder / 'set', ROBOT, DataConfig())
    assert skipped == []
    return folder


def test_a_bag_exported_and_read_again_gives_the_same_pairs(exported):
    from_bags = [e for name in 'ab' for e in read(exported / 'bags' / name)[0]]
    from_export, skipped = read(exported / 'set')
    assert skipped == [] and len(from_export) == len(from_bags) == 4
    for actual, expected in zip(from_export, from_bags):
        assert_same(actual, expected)


def test_the_export_describes_itself_as_lerobot_does(exported):
    root = exported / 'set'
    info = json.loads((root / 'meta' / 'info.json').read_text())
    assert (info['codebase_version'], info['fps'], info['total_episodes']) == ('v3.0', 50, 4)
    assert info['features']['action'] == {'dtype': 'float32', 'shape': [3],
                                          'names': ['base', 'elbow', 'gripper']}
    assert info['features']['observation.images.wrist']['shape'] == [16, 20, 3]
    stats = json.loads((root / 'meta' / 'stats.json').read_text())
    table = pq.read_table(root / 'data/chunk-000/file-000.parquet')
    actions = np.array(table['action'].to_pylist())
    assert len(table) == info['total_frames'] == stats['action']['count'][0]
    assert table['index'].to_pylist() == list(range(len(table)))
    np.testing.assert_allclose(stats['action']['mean'], actions.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats['action']['std'], actions.std(0), rtol=1e-5)
    np.testing.assert_allclose(stats['action']['q10'], np.quantile(actions, 0.1, axis=0))
    assert np.shape(stats['observation.images.front']['mean']) == (3, 1, 1)
    episodes = pq.read_table(root / 'meta/episodes/chunk-000/file-000.parquet').to_pylist()
    assert [row['dataset_to_index'] - row['dataset_from_index'] for row in episodes] == [
        row['length'] for row in episodes]
    for key in ('observation.images.front', 'observation.images.wrist'):
        starts = [row[f'videos/{key}/from_timestamp'] for row in episodes]
        np.testing.assert_allclose(starts, [row['dataset_from_index'] / 50 for row in episodes])
    tasks = pq.read_table(root / 'meta' / 'tasks.parquet')
    assert dict(zip(tasks['task'].to_pylist(), tasks['task_index'].to_pylist())) == {
        'pick up block 0': 0, 'pick up block 1': 1}


def test_cameras_slower_than_the_actions_show_their_newest_picture(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=1, camera_ns=40 * MS, delay_ns=0)
    export([tmp_path / 'bag'], tmp_path / 'set', ROBOT, DataConfig())
    (from_bag,), _ = read(tmp_path / 'bag')
    (from_export,), _ = read(tmp_path / 'set')
    np.testing.assert_array_equal(from_export.chunks[::2], from_bag.chunks)
    shown = from_export.pictures.astype(float)
    assert np.abs(shown[::2] - from_bag.pictures).mean() < VIDEO_ERROR
    assert np.abs(shown[1::2] - from_bag.pictures).mean() < VIDEO_ERROR


def test_sides_of_odd_length_and_a_robot_without_states_are_exported(tmp_path, monkeypatch):
    robot = dataclasses.replace(ROBOT, state_names=(), cameras=(CameraSpec(
        name='front', width=21, height=17),))
    scene = Scene()
    scene.add('instruction', T0, text('look'))
    for now_ns in range(T0, T0 + 200 * MS, 20 * MS):
        scene.add('action', now_ns, made.plain_action(now_ns))
        scene.add('camera/front/image_raw', now_ns, made.image(
            now_ns, made.pixels('front', 2, height=17, width=21)))
    scene.write(tmp_path / 'bag')
    data = DataConfig(episodes='bag')
    export([tmp_path / 'bag'], tmp_path / 'set', robot, data)
    (expected,), _ = read(tmp_path / 'bag', robot, episodes='bag')
    (actual,), _ = read(tmp_path / 'set', robot)
    assert_same(actual, expected)


def test_pictures_that_pause_or_change_their_size_skip_the_episode(tmp_path):
    scene, now_ns = Scene(), T0
    for number in range(3):
        scene.add('episode', now_ns, status('start', number))
        scene.add('instruction', now_ns, text('hold still'))
        scene.robot(now_ns, 1000 * MS, camera_ns=20 * MS, delay_ns=0, without=('wrist',))
        now_ns += 1010 * MS
        scene.add('episode', now_ns, status('success', number))
    end_ns = T0 + 2020 * MS
    scene.messages = [
        entry for entry in scene.messages
        if not ('front' in entry[1] and T0 + 200 * MS < entry[0] < T0 + 900 * MS)]
    scene.messages = [
        (at, topic, made.image(at, made.pixels('front', 1, height=24, width=20))
         if 'front' in topic and at >= end_ns else message)
        for at, topic, message in scene.messages]
    scene.write(tmp_path / 'bag')
    robot = dataclasses.replace(ROBOT, cameras=ROBOT.cameras[:1])
    skipped = export([tmp_path / 'bag'], tmp_path / 'set', robot, DataConfig())
    assert [entry.reason for entry in skipped] == [
        'pictures pause for more than 0.5 s (max_age_s)',
        "a picture of camera 'front' is 20x24, before they were 20x16"]
    assert json.loads((tmp_path / 'set/meta/info.json').read_text())['total_episodes'] == 1


def config_file(path, **data):
    path.write_text(yaml.safe_dump({'robot': to_plain(ROBOT), 'data': data, 'steps': 3}))
    return path


def test_the_command_exports_and_says_what_it_wrote(exported, tmp_path, capsys):
    config = config_file(tmp_path / 'train.yaml')
    arguments = [str(exported / 'bags' / 'b'), str(tmp_path / 'out'), '--config', str(config)]
    assert main(arguments) == 0
    assert '1 episodes, 15 frames at 50 fps, 1 instructions; 0 skipped' in capsys.readouterr().out
    assert main(arguments) == 2
    assert 'exists already, choose a new path' in capsys.readouterr().err


@pytest.mark.parametrize('data, message', [
    ({'action_topic': 'acts'}, 'there is no usable episode: b: the bag has no topic /acts'),
    ({'gap': 2}, "unknown field 'gap' (did you mean 'gap_s'?)")])
def test_the_command_says_what_is_wrong_and_leaves_nothing(
        exported, tmp_path, capsys, data, message):
    config = config_file(tmp_path / 'train.yaml', **data)
    assert main([str(exported / 'bags' / 'b'), str(tmp_path / 'out'), '--config',
                 str(config)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['train.yaml']


def test_ctrl_c_leaves_nothing_of_an_export(tmp_path):
    grid_bag(tmp_path / 'bags' / '0', episodes=12, length_ns=2000 * MS)
    for number in range(1, 12):
        (tmp_path / 'bags' / f'{number}').symlink_to(tmp_path / 'bags' / '0')
    config = config_file(tmp_path / 'train.yaml')
    process = child.start(main, [str(tmp_path / 'bags'), str(tmp_path / 'out'), '--config',
                                 str(config)], errors=tmp_path / 'errors.txt')
    while not list(tmp_path.glob('.out.partial*/videos/*/*/*.mp4')):
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    errors = (tmp_path / 'errors.txt').read_text()
    assert process.exitcode == 130, errors
    assert 'interrupted, nothing was written' in errors and 'Traceback' not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'bags', 'errors.txt', 'train.yaml']
