"""Recordings to training pairs, to a cache on disk, to batches."""

import dataclasses
import errno
import multiprocessing
import os
import signal
import threading
import time

import child
import made_bags as made
import numpy as np
import pytest
import torch
import yaml
from made_bags import MS, ROBOT, T0, Scene, command, simple_bag, status, text
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from meanflow_ros.core.contract import TimedActions
from meanflow_ros.core.schema import read_dataclass
from meanflow_ros.ros.bag import TYPES, absolute_topic
from meanflow_ros.ros.from_messages import TWIST_FIELDS, action_reader
from meanflow_ros.training import cache
from meanflow_ros.training.cache import build_cache, open_cache
from meanflow_ros.training.data_config import DataConfig
from meanflow_ros.training.episode import ActionStream, Episode, Skipped, pair
from meanflow_ros.training.loader import Loader
from meanflow_ros.training.recordings import find_recordings, read_episodes

SIZE = 32


def read(path, robot=ROBOT, **data):
    """Return the episodes of a recording and what was skipped, as 'name: reason'."""
    found = list(read_episodes(path, robot, DataConfig(**data), SIZE))
    return ([e for e in found if isinstance(e, Episode)],
            [f'{e.name}: {e.reason}' for e in found if isinstance(e, Skipped)])


def arm(**changes):
    return dataclasses.replace(ROBOT, **changes)


def space(*dimensions):
    return dataclasses.replace(ROBOT.action_space, dimensions=dimensions,
                               units=('1',) * len(dimensions), lower=[-9.5] * len(dimensions),
                               upper=[7.5] * len(dimensions))


def stream(*stamps_ns):
    made_stream = ActionStream()
    for stamp_ns in stamps_ns:
        made_stream.add(TimedActions(stamp_ns=stamp_ns, due_ns=[stamp_ns],
                                     actions=[command(stamp_ns)]))
    return made_stream


def one_bag(path, **changes):
    """Write a bag without an episode topic; see `Scene.robot` for the changes."""
    scene = Scene()
    scene.add('instruction', T0, text('fold the towel'))
    scene.robot(T0, 300 * MS, **changes)
    scene.write(path)


# Pairs


def test_a_chunk_holds_the_commands_that_were_due_after_the_picture():
    rows, chunks, mask = pair(np.array([T0, T0 + 40 * MS]), [stream(*range(
        T0, T0 + 200 * MS, 20 * MS))], ROBOT)
    assert rows.tolist() == [0, 1] and mask.all()
    for i in range(5):
        np.testing.assert_array_equal(chunks[1, i], command(T0 + (40 + 20 * i) * MS))


def test_the_k_of_the_time_rule_moves_the_chunk():
    actions = [stream(*range(T0, T0 + 200 * MS, 20 * MS))]
    _, chunks, _ = pair(np.array([T0]), actions, arm(first_step=3))
    np.testing.assert_array_equal(chunks[0, 0], command(T0 + 60 * MS))


def test_a_command_holds_until_the_next_one_and_rounding_does_not_pick_the_one_before():
    slow = stream(T0, T0 + 70 * MS)
    dues = T0 + np.array([0, 35 * MS, 59 * MS, 61 * MS, 70 * MS - 1, 90 * MS])
    values, known = slow.sample(dues, slack_ns=10 * MS)
    assert known.all()
    expected = [command(T0)] * 3 + [command(T0 + 70 * MS)] * 3
    np.testing.assert_array_equal(values, expected)


def test_before_the_first_command_none_is_known():
    _, known = stream(T0).sample(np.array([T0 - 11 * MS, T0 - 10 * MS, T0]), slack_ns=10 * MS)
    assert known.tolist() == [False, True, True]


def test_steps_after_the_end_are_masked_and_repeat_the_last_action():
    rows, chunks, mask = pair(np.array([T0, T0 + 60 * MS, T0 + 99 * MS]), [stream(
        *range(T0, T0 + 81 * MS, 20 * MS))], ROBOT)
    assert rows.tolist() == [0, 1]
    assert mask.sum(1).tolist() == [5, 2]
    np.testing.assert_array_equal(chunks[1, 1:], [command(T0 + 80 * MS)] * 4)


def test_a_trajectory_replaces_what_is_due_from_its_first_step_on():
    actions = ActionStream()
    for stamp_ns, value in ((T0, 1.0), (T0 + 30 * MS, 2.0)):
        actions.add(TimedActions(stamp_ns=stamp_ns, actions=[[value], [value + 0.25]],
                                 due_ns=[stamp_ns, stamp_ns + 40 * MS]))
    values, _ = actions.sample(T0 + np.array([0, 29, 40, 70]) * MS, slack_ns=0)
    assert values[:, 0].tolist() == [1.0, 1.0, 2.0, 2.25]
    with pytest.raises(ValueError, match='goes backward by 0.001 s'):
        actions.add(TimedActions(stamp_ns=T0 + 29 * MS, due_ns=[T0 + 99 * MS], actions=[[3.0]]))


# Bags


def test_cameras_and_commands_need_no_common_stamps(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=1)
    (episode,), skipped = read(tmp_path / 'bag')
    assert skipped == [] and episode.name == 'bag episode 0'
    assert set(episode.instructions) == {'pick up block 0'}
    assert len(episode) == 12 and episode.pictures.shape == (12, 2, SIZE, SIZE, 3)
    for row in range(12):
        due_ns = T0 + row * 33 * MS + 20 * MS * np.arange(5)
        nearest = np.ceil((due_ns - T0) / (20 * MS) - 0.5).astype(int)   # a tie: the one held
        recorded = nearest <= 19
        np.testing.assert_array_equal(episode.mask[row], recorded)
        np.testing.assert_array_equal(episode.chunks[row][recorded], [
            command(T0 + n * 20 * MS) for n in nearest[recorded]])
        state_ns = T0 + min(round(row * 3.3), (row * 33 + 3) // 10) * 10 * MS  # come by then
        np.testing.assert_allclose(episode.states[row], [
            made.pose(state_ns)[name] for name in ROBOT.state_names], atol=1e-12)


def test_pictures_are_resized_and_lie_in_the_order_of_the_robot(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=1)
    turned = arm(cameras=ROBOT.cameras[::-1])
    (episode,), _ = read(tmp_path / 'bag')
    (other,), _ = read(tmp_path / 'bag', turned)
    np.testing.assert_array_equal(episode.pictures[:, ::-1], other.pictures)
    (whole,), _ = read(tmp_path / 'bag', arm(cameras=ROBOT.cameras[:1]))
    picture = torch.tensor(made.pixels('front', 4)).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(picture, (SIZE, SIZE), mode='bilinear',
                                              antialias=True, align_corners=False)
    np.testing.assert_allclose(whole.pictures[4, 0], resized[0].permute(1, 2, 0), atol=0.51)


@pytest.mark.parametrize('storage', [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize('compression', [None, CompressionMode.FILE, CompressionMode.MESSAGE])
def test_every_storage_and_compression_gives_the_same_pairs(tmp_path, storage, compression):
    simple_bag(tmp_path / 'plain', episodes=1, length_ns=150 * MS)
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('pick up block 0'))
    end_ns = scene.robot(T0, 150 * MS)
    scene.add('episode', end_ns + 3 * MS, status('success', 0))
    writer = Writer(tmp_path / 'other', version=9, storage_plugin=storage)
    if compression:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for time_ns, topic, message in sorted(scene.messages, key=lambda entry: entry[0]):
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(absolute_topic(topic), kind,
                                                           typestore=TYPES)
            writer.write(connections[topic], time_ns, TYPES.serialize_cdr(message, kind))
    (expected,), _ = read(tmp_path / 'plain')
    (actual,), skipped = read(tmp_path / 'other')
    assert skipped == []
    for name in ('pictures', 'states', 'chunks', 'mask'):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


def test_compressed_pictures_are_found_by_themselves(tmp_path):
    simple_bag(tmp_path / 'raw', episodes=1)
    simple_bag(tmp_path / 'png', episodes=1, picture=made.compressed, suffix='/compressed')
    (raw,), _ = read(tmp_path / 'raw')
    (png,), _ = read(tmp_path / 'png')
    np.testing.assert_array_equal(raw.pictures, png.pictures)


def test_other_topics_are_named_in_the_configuration(tmp_path):
    scene = Scene()
    scene.add('/task', T0, text('stack'))
    for now_ns in range(T0, T0 + 200 * MS, 20 * MS):
        scene.add('/eye', now_ns, made.image(now_ns, made.pixels('front', 1)))
        scene.add('/arm/state', now_ns, made.joint_state(now_ns, **made.pose(now_ns)))
        scene.add('/arm/command', now_ns, made.plain_action(now_ns))
    scene.write(tmp_path / 'bag')
    (episode,), skipped = read(
        tmp_path / 'bag', arm(cameras=ROBOT.cameras[:1]), camera_topics={'front': 'eye'},
        state_topic='arm/state', action_topic='/arm/command', instruction_topic='task',
        episodes='bag')
    assert skipped == [] and len(episode) == 10 and episode.name == 'bag'


def test_joint_states_can_be_the_actions(tmp_path):
    one_bag(tmp_path / 'bag', without=('actions',))
    robot = arm(action_space=space('unused', 'base'))
    (episode,), _ = read(tmp_path / 'bag', robot, action_topic='joint_states', episodes='bag')
    np.testing.assert_allclose(episode.chunks[0, :, 1], [
        made.pose(T0 + 20 * MS * i)['base'] for i in range(5)])
    assert set(episode.chunks[0, :, 0]) == {9.25}


def test_an_array_is_read_by_position_and_due_when_it_was_received(tmp_path):
    one_bag(tmp_path / 'bag', action=lambda now_ns: made.numbers(command(now_ns)))
    (episode,), _ = read(tmp_path / 'bag', episodes='bag')
    np.testing.assert_array_equal(episode.chunks[2, 0], command(T0 + 60 * MS))
    episodes, skipped = read(tmp_path / 'bag', arm(action_space=space('a', 'b')), episodes='bag')
    assert episodes == [] and skipped == ['bag: action has 3 numbers, expected 2: a, b']


def test_a_twist_is_read_by_its_fields_and_the_gripper_from_a_topic_of_its_own(tmp_path):
    def action(now_ns):
        return made.twist(now_ns, [*command(now_ns), 0.5, -0.25, 0.75])

    scene = Scene()
    scene.add('instruction', T0, text('screw it in'))
    scene.robot(T0, 300 * MS, action=action)
    for late_ns, value in ((-MS, 0.125), (150 * MS, 0.875)):
        scene.add('gripper', T0 + late_ns, made.make('std_msgs/Float32', data=value))
    scene.write(tmp_path / 'bag')
    (whole,), _ = read(tmp_path / 'bag', arm(action_space=space(*'xyzuvw')), episodes='bag')
    np.testing.assert_array_equal(whole.chunks[0, 0], [*command(T0), 0.5, -0.25, 0.75])
    (some,), _ = read(tmp_path / 'bag', arm(action_space=space('turn', 'ahead', 'hand')),
                      twist_fields=('angular.z', 'linear.x'), gripper_topic='gripper',
                      episodes='bag')
    np.testing.assert_array_equal(some.chunks[0, 0], [0.75, command(T0)[0], 0.125])
    np.testing.assert_array_equal(some.chunks[5, 0, 2], 0.875)       # at 165 ms
    _, skipped = read(tmp_path / 'bag', arm(action_space=space('turn', 'ahead')), episodes='bag')
    assert '6 twist fields for the 2 dimensions turn, ahead' in skipped[0]


def test_what_was_executed_is_read_beside_the_action_where_it_is_recorded(tmp_path):
    scene = Scene()
    scene.add('instruction', T0, text('screw it in'))
    scene.robot(T0, 300 * MS)
    names = ROBOT.action_space.dimensions
    for at_ns in range(0, 300 * MS, 20 * MS):
        scene.add('executed', T0 + at_ns, made.trajectory(
            T0 + at_ns, names, [command(T0 + at_ns) + [0.25, 0.0, -0.5]]))
    scene.write(tmp_path / 'bag')
    (plain,), _ = read(tmp_path / 'bag', episodes='bag')
    np.testing.assert_array_equal(plain.executed, plain.chunks)
    (apart,), _ = read(tmp_path / 'bag', episodes='bag', executed_topic='executed', relative=True)
    (relative,), _ = read(tmp_path / 'bag', episodes='bag', relative=True)
    np.testing.assert_array_equal(apart.chunks, relative.chunks)
    np.testing.assert_allclose(apart.executed - apart.chunks, np.broadcast_to(
        [0.25, 0.0, -0.5], apart.chunks.shape), atol=1e-6)
    build_cache([tmp_path / 'bag'], ROBOT, DataConfig(episodes='bag', executed_topic='executed'),
                SIZE, tmp_path / 'cache')
    batch = open_cache(tmp_path / 'cache').gather(np.array([0, 3]))
    np.testing.assert_allclose(batch.executed - batch.chunk, np.broadcast_to(
        [0.25, 0.0, -0.5], batch.chunk.shape), atol=1e-6)
    _, skipped = read(tmp_path / 'bag', episodes='bag', executed_topic='nothing')
    assert 'has no topic /nothing (executed_topic)' in skipped[0]


def test_a_message_that_is_no_action_is_named_with_what_would_be():
    with pytest.raises(ValueError, match='cannot be read from std_msgs/msg/String, use one of '
                                         'trajectory_msgs/msg/JointTrajectory'):
        action_reader('std_msgs/msg/String', ['x'])


def test_a_stamp_of_zero_means_now_and_a_trajectory_keeps_its_steps():
    reader = action_reader('trajectory_msgs/msg/JointTrajectory', ['b', 'a'])
    timed = reader(made.trajectory(0, ['a', 'b'], [[1.5, 2.5], [3.5, 4.5]], 20 * MS), T0)
    assert timed.stamp_ns == T0 and timed.due_ns.tolist() == [T0, T0 + 20 * MS]
    assert timed.actions.tolist() == [[2.5, 1.5], [4.5, 3.5]]
    twist = action_reader('geometry_msgs/msg/TwistStamped', list(TWIST_FIELDS))
    assert twist(made.twist(0, range(6)), T0).due_ns.tolist() == [T0]
    assert twist(made.twist(T0 - 7, range(6)), T0).due_ns.tolist() == [T0 - 7]


def test_relative_actions_are_counted_from_the_measured_state_of_the_same_name(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=1)
    (plain,), _ = read(tmp_path / 'bag')
    (relative,), _ = read(tmp_path / 'bag', relative=True)
    assert DataConfig(relative=True).relative_to(ROBOT) == ('base', 'elbow', '')
    assert DataConfig().relative_to(ROBOT) == ('', '', '')
    elbow, base = plain.states.T
    np.testing.assert_allclose(relative.chunks[:, :, 0], plain.chunks[:, :, 0] - base[:, None])
    np.testing.assert_allclose(relative.chunks[:, :, 1], plain.chunks[:, :, 1] - elbow[:, None])
    np.testing.assert_array_equal(relative.chunks[:, :, 2], plain.chunks[:, :, 2])
    with pytest.raises(ValueError, match='no action dimension is named like a state'):
        DataConfig(relative=True).relative_to(arm(action_space=space('x')))


def test_an_integer_that_changes_cuts_episodes_and_a_negative_one_ends_them(tmp_path):
    scene = Scene()
    scene.robot(T0, 900 * MS)
    for late, number in ((0, 7), (100, 7), (300, 8), (600, -1)):
        scene.add('episode_index', T0 + late * MS, made.make('std_msgs/Int32', data=number))
    scene.add('instruction', T0, text('sort'))
    scene.write(tmp_path / 'bag')
    episodes, skipped = read(tmp_path / 'bag', episode_topic='episode_index')
    assert skipped == [] and [e.name for e in episodes] == ['bag episode 7', 'bag episode 8']
    np.testing.assert_array_equal(episodes[1].chunks[0, 0], command(T0 + 320 * MS))  # held
    assert not episodes[0].mask[-1, -1]


def test_a_pause_of_the_pictures_or_of_the_actions_begins_a_new_episode(tmp_path):
    scene = Scene()
    scene.add('instruction', T0 - MS, text('sweep'))
    scene.robot(T0, 300 * MS)
    scene.robot(T0 + 900 * MS, 200 * MS)                             # everything has paused
    scene.robot(T0 + 1100 * MS, 1000 * MS, without=('actions',))     # only the actions pause
    scene.robot(T0 + 2100 * MS, 240 * MS)
    scene.write(tmp_path / 'bag')
    episodes, skipped = read(tmp_path / 'bag', episodes='gaps', gap_s=0.5)
    assert skipped == []
    assert [(e.name, len(e)) for e in episodes] == [
        ('bag episode 0', 9), ('bag episode 1', 6), ('bag episode 2', 7)]
    np.testing.assert_array_equal(episodes[2].chunks[0, 0], command(T0 + 2100 * MS))


def test_instructions_come_from_a_file_where_one_is_named(tmp_path):
    simple_bag(tmp_path / 'a')
    simple_bag(tmp_path / 'b')
    (tmp_path / 'said.yaml').write_text(yaml.safe_dump(
        {'a': 'wipe', 'a episode 1': ' dry it ', 'b episode 0': 'put away'}))
    episodes, skipped = read(tmp_path / 'a', instruction_file='said.yaml')
    assert [set(e.instructions) for e in episodes] == [{'wipe'}, {'dry it'}] and not skipped
    episodes, skipped = read(tmp_path / 'b', instruction_file='said.yaml')
    assert len(episodes) == 1
    assert "has no instruction for 'b episode 1' or 'b'" in skipped[0]
    (tmp_path / 'a' / 'said.txt').write_text('polish\n')
    assert read(tmp_path / 'a', instruction_file='said.txt')[0][1].instructions[0] == 'polish'
    assert 'there is none at' in read(tmp_path / 'b', instruction_file='said.txt')[1][0]


def test_an_instruction_that_changes_within_an_episode_changes_from_there_on(tmp_path):
    scene = Scene()
    scene.add('instruction', T0, text('left'))
    scene.robot(T0, 200 * MS)
    scene.add('instruction', T0 + 100 * MS, text('right'))
    scene.write(tmp_path / 'bag')
    (episode,), _ = read(tmp_path / 'bag', episodes='bag')
    assert episode.instructions == ('left',) * 3 + ('right',) * 3


def test_the_time_of_a_simulation_is_that_of_its_clock(tmp_path):
    scene = Scene()
    scene.robot(T0, 200 * MS)
    scene.add('instruction', T0, text('wait'))
    wall_ns = T0 + 10**15
    scene.messages = [(stamp_ns - T0 + wall_ns, topic, message)
                      for stamp_ns, topic, message in scene.messages]
    for late in range(0, 200, 5):
        now_ns = T0 + late * MS
        scene.add('clock', wall_ns + late * MS - 1, made.make(
            'rosgraph_msgs/Clock', clock=made.header(now_ns).stamp))
    scene.write(tmp_path / 'bag')
    assert 'old, at most 0.5 s is allowed' in read(tmp_path / 'bag', episodes='bag')[1][0]
    (episode,), _ = read(tmp_path / 'bag', episodes='bag', use_sim_time=True)
    np.testing.assert_array_equal(episode.chunks[0, 0], command(T0))


# Broken recordings


def test_an_episode_that_failed_or_never_ended_is_skipped_by_name_and_reason(tmp_path):
    scene, now_ns = Scene(), T0
    scene.add('instruction', now_ns, text('try'))
    for number, end in enumerate(('success', 'failure', None, 'success', None)):
        scene.add('episode', now_ns, status('start', number))
        now_ns = scene.robot(now_ns, 200 * MS) + 3 * MS
        if end:
            scene.add('episode', now_ns, status(end, number))
        now_ns += 500 * MS
    scene.write(tmp_path / 'bag')
    episodes, skipped = read(tmp_path / 'bag')
    assert [e.name for e in episodes] == ['bag episode 0', 'bag episode 3']
    assert skipped == ["bag episode 1: ended with 'failure'",
                       'bag episode 2: the next one starts before it has ended',
                       'bag episode 4: the bag ends before the episode does']


def test_a_gap_in_the_actions_breaks_the_episode(tmp_path):
    scene = Scene()
    scene.add('instruction', T0, text('go on'))
    scene.robot(T0, 600 * MS, without=('actions',))
    for late in [*range(0, 200, 20), *range(410, 600, 20)]:
        scene.add('action', T0 + late * MS, made.plain_action(T0 + late * MS))
    scene.write(tmp_path / 'bag')
    assert read(tmp_path / 'bag', episodes='bag')[1] == [
        'bag: no action for 0.230 s, 0.180 s after the first; at most 0.200 s is allowed '
        '(max_action_gap)']
    assert len(read(tmp_path / 'bag', episodes='bag', max_action_gap=11.5)[0]) == 1


@pytest.mark.parametrize('left_out, topic', [
    ('front', '/camera/front/image_raw'), ('states', '/joint_states'), ('actions', '/action')])
def test_a_missing_topic_is_named_with_those_that_there_are(tmp_path, left_out, topic):
    simple_bag(tmp_path / 'bag', episodes=1, without=(left_out,))
    episodes, (skipped,) = read(tmp_path / 'bag')
    assert episodes == [] and f'the bag has no topic {topic} (' in skipped
    assert '/camera/wrist/image_raw' in skipped


def test_a_topic_of_the_wrong_type_is_named(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=1)
    assert '/action (state_topic) holds trajectory_msgs/msg/JointTrajectory, expected ' \
        'sensor_msgs/msg/JointState' in read(tmp_path / 'bag', state_topic='action')[1][0]


def test_what_the_node_cannot_use_gives_no_pair_and_a_reason(tmp_path):
    def broken(stamp_ns, pixels):
        message = made.image(stamp_ns, pixels)
        message.step = 7
        return message

    simple_bag(tmp_path / 'bag', episodes=1, picture=broken)
    assert 'there is no observation (camera/front: step is 7 bytes but a row of 20 rgb8 pixels ' \
        'takes 60)' in read(tmp_path / 'bag')[1][0]


def test_an_action_that_is_not_finite_breaks_only_its_episode(tmp_path):
    def action(now_ns):
        values = command(now_ns)
        return made.trajectory(now_ns, ROBOT.action_space.dimensions, [
            values if now_ns != T0 + 100 * MS else values * np.nan])

    simple_bag(tmp_path / 'bag', action=action)
    episodes, skipped = read(tmp_path / 'bag')
    assert [e.name for e in episodes] == ['bag episode 1']
    assert skipped == ['bag episode 0: trajectory has positions that are not finite']


def test_a_damaged_bag_is_skipped_by_name(tmp_path):
    simple_bag(tmp_path / 'bag')
    (file,) = (tmp_path / 'bag').glob('*.mcap*')
    file.write_bytes(file.read_bytes()[:1500])
    episodes, (skipped,) = read(tmp_path / 'bag')
    assert episodes == [] and skipped.startswith('bag: ') and 'cannot be read' in skipped


def test_a_bag_in_which_no_episode_begins_says_so(tmp_path):
    scene = Scene()
    scene.add('instruction', T0, text('never'))
    scene.add('episode', T0 + MS, status('success'))
    scene.robot(T0, 100 * MS)
    scene.write(tmp_path / 'bag')
    assert read(tmp_path / 'bag')[1] == ['bag: no episode begins in it (episodes: topic)']


# Finding, configuring


def test_recordings_are_found_in_and_below_a_folder(tmp_path):
    simple_bag(tmp_path / 'x' / 'b', episodes=1, length_ns=60 * MS)
    (tmp_path / 'l' / 'meta').mkdir(parents=True)
    (tmp_path / 'l' / 'meta' / 'info.json').write_text('{}')
    assert find_recordings(tmp_path) == [tmp_path / 'l', tmp_path / 'x' / 'b']
    assert find_recordings(tmp_path / 'x' / 'b') == [tmp_path / 'x' / 'b']


def test_a_folder_without_a_recording_lists_what_it_holds(tmp_path):
    (tmp_path / 'deep').mkdir()
    (tmp_path / 'deep' / 'lost_0.mcap').write_bytes(b'')
    (tmp_path / 'notes.txt').write_text('')
    with pytest.raises(ValueError, match='no rosbag2 .* it holds notes.txt, lost_0.mcap. '
                                         'lost_0.mcap has lost its metadata.yaml: `ros2 bag'):
        find_recordings(tmp_path)


@pytest.mark.parametrize('section, message', [
    ({'epsiodes': 'bag'}, "unknown field 'epsiodes' .did you mean 'episodes'"),
    ({'episodes': 'file'}, "episodes must be one of topic, gaps, bag, got 'file'"),
    ({'relative': 'yes'}, "data.relative must be bool, got 'yes'"),
    ({'gap_s': 0}, 'gap_s must be above 0'),
    ({'twist_fields': ['linear.w']}, "unknown field 'linear.w' .did you mean 'linear"),
    ({'camera_topics': {'front': 3}}, "camera_topics must map camera names to names, got 'front'"),
    ({'max_skew_s': -1}, 'max_skew_s must be above 0')])
def test_a_wrong_field_of_the_data_section_is_named(section, message):
    with pytest.raises(ValueError, match=message):
        read_dataclass(DataConfig, section, 'data')


def test_a_topic_for_a_camera_that_the_robot_has_not_is_refused(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=1, length_ns=60 * MS)
    assert "the robot has no camera 'frnt' (did you mean 'front'?)" in read(
        tmp_path / 'bag', camera_topics={'frnt': 'eye'})[1][0]


# Cache


@pytest.fixture(scope='module')
def bags(tmp_path_factory):
    """Return a folder of three bags of two episodes, one of them with a failed episode."""
    folder = tmp_path_factory.mktemp('bags')
    for name in ('a', 'b'):
        simple_bag(folder / name)
    simple_bag(folder / 'c', action=lambda now_ns: made.numbers(
        command(now_ns) * (np.nan if now_ns < T0 + 100 * MS else 1)))
    return folder


@pytest.fixture(scope='module')
def built(bags, tmp_path_factory):
    """Return the folder of a cache of these bags, built here."""
    directory = tmp_path_factory.mktemp('caches') / 'one'
    build_cache(find_recordings(bags), ROBOT, DataConfig(), SIZE, directory)
    return directory


def everything(dataset):
    return dataset.gather(np.arange(len(dataset))).tensors()


def test_a_cache_gives_back_the_pairs_of_the_recordings(bags, built):
    dataset, row = open_cache(built), 0
    for name in 'abc':
        for episode in read(bags / name)[0]:
            assert dataset.episode_names[dataset.episode_of_row[row]] == episode.name
            rows = np.arange(row, row + len(episode))
            batch = dataset.gather(rows)
            np.testing.assert_array_equal(batch.pictures, episode.pictures)
            np.testing.assert_allclose(batch.state, episode.states, rtol=1e-6)
            np.testing.assert_array_equal(batch.chunk, episode.chunks)
            np.testing.assert_array_equal(batch.mask, episode.mask)
            assert [dataset.instructions[i] for i in batch.instruction] == list(
                episode.instructions)
            row += len(episode)
    assert len(dataset) == row and dataset.instructions == ['pick up block 0', 'pick up block 1']
    assert dataset.skipped == [('c episode 0', 'action is not finite: [nan nan nan]')]
    assert {str(t.dtype).split('.')[1] for t in batch.tensors().values()} == {
        'uint8', 'float32', 'int64'}


def test_many_workers_make_the_same_cache_as_one(bags, built, tmp_path):
    seen = []
    build_cache(find_recordings(bags), ROBOT, DataConfig(), SIZE, tmp_path / 'many', workers=2,
                progress=lambda name, rows, reason: seen.append((name, rows, reason)))
    one, many = open_cache(built), open_cache(tmp_path / 'many')
    for name, values in everything(one).items():
        assert torch.equal(values, everything(many)[name]), name
    assert one.episode_names == many.episode_names and one.skipped == many.skipped
    assert len(seen) == 6 and sum(rows for _, rows, _ in seen) == len(many)
    assert sum(reason is not None for _, _, reason in seen) == 1


def test_a_second_run_uses_the_cache_again_and_a_changed_input_builds_it_anew(bags, tmp_path):
    reads = []

    def build(size=SIZE, folder=bags, robot=ROBOT, **data):
        reads.clear()
        build_cache(find_recordings(folder)[:1], robot, DataConfig(**data), size, tmp_path / 'x',
                    progress=lambda *entry: reads.append(entry))
        return len(reads)

    assert build() == 2
    assert build() == 0
    assert build(size=16) == 2
    assert build(size=16, max_action_gap=11.0) == 2
    assert build(robot=arm(horizon=3)) == 2
    assert build(robot=arm(horizon=3)) == 0
    (bags / 'a' / 'metadata.yaml').touch()
    assert build(robot=arm(horizon=3)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ['x']


def test_nothing_usable_is_an_error_with_the_reasons_and_leaves_no_cache(bags, tmp_path):
    with pytest.raises(ValueError, match='there is no usable episode: a: the bag has no topic '
                                         '/acton .action_topic., it has /action, '):
        build_cache([bags / 'a', bags / 'b'], ROBOT, DataConfig(action_topic='acton'), SIZE,
                    tmp_path / 'x')
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_cache_is_not_overwritten(bags, tmp_path):
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'thesis.tex').write_text('mine')
    with pytest.raises(ValueError, match='is not a cache .*choose another directory'):
        build_cache([bags / 'a'], ROBOT, DataConfig(), SIZE, tmp_path / 'x')
    assert (tmp_path / 'x' / 'thesis.tex').read_text() == 'mine'
    with pytest.raises(ValueError, match='is not a cache'):
        open_cache(tmp_path / 'nowhere')


def test_a_full_disk_is_said_so_and_leaves_no_cache(bags, tmp_path, monkeypatch):
    def full(self, job):
        yield from ()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache._ShardWriter, 'write', full)
    with pytest.raises(OSError, match='the disk is full, the cache .*/x was not written'):
        build_cache([bags / 'a'], ROBOT, DataConfig(), SIZE, tmp_path / 'x')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('number, workers', [(signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_a_build_that_is_stopped_in_the_middle_leaves_nothing_that_is_believed(
        tmp_path, number, workers):
    for i in range(3):
        simple_bag(tmp_path / 'bags' / f'{i}', episodes=60, length_ns=100 * MS)
    heard, said = multiprocessing.get_context('fork').Pipe(duplex=False)

    def wait_there(*entry):
        said.send(entry)
        time.sleep(60)

    def build():
        build_cache(find_recordings(tmp_path / 'bags'), ROBOT, DataConfig(), SIZE, tmp_path / 'x',
                    workers, progress=wait_there)

    process = child.start(build, errors=tmp_path / 'errors.txt')
    assert heard.poll(30)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == (130 if number == signal.SIGINT else -number)
    assert not (tmp_path / 'x').exists()
    child.wait_until_alone(process.pid)
    if number == signal.SIGINT:
        assert sorted(path.name for path in tmp_path.iterdir()) == ['bags', 'errors.txt']
        assert (tmp_path / 'errors.txt').read_text() == ''
    build_cache(find_recordings(tmp_path / 'bags')[:1], ROBOT, DataConfig(), SIZE, tmp_path / 'x')
    assert len(open_cache(tmp_path / 'x').episode_names) == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bags', 'errors.txt', 'x']


def test_two_builders_of_one_cache_do_not_disturb_each_other(bags, tmp_path):
    def build():
        build_cache([bags / 'a', bags / 'b'], ROBOT, DataConfig(), SIZE, tmp_path / 'x' / 'y')

    builders = [child.start(build, errors=tmp_path / 'errors.txt') for _ in range(3)]
    for builder in builders:
        builder.join(30)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    assert len(open_cache(tmp_path / 'x' / 'y').episode_names) == 4
    assert [path.name for path in (tmp_path / 'x').iterdir()] == ['y']


def test_a_damaged_cache_is_named(built, tmp_path):
    copy = tmp_path / 'copy'
    copy.mkdir()
    for file in built.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[:None if file.suffix == '.json' else 99])
    with pytest.raises(ValueError, match=r'the cache is damaged, delete it: .*\.raw has 99 bytes'):
        open_cache(copy)


def test_the_split_is_by_whole_episodes_and_always_the_same(built):
    dataset = open_cache(built)
    train, validation = dataset.split(0.4)
    assert sorted([*train, *validation]) == list(range(len(dataset)))
    apart = [set(dataset.episode_of_row[rows]) for rows in (train, validation)]
    assert not apart[0] & apart[1] and len(apart[1]) == 2
    again = open_cache(built).split(0.4)
    np.testing.assert_array_equal(again[1], validation)
    assert len(dataset.split(0.0)[1]) == 0 and len(dataset.split(0.001)[1]) > 0
    with pytest.raises(ValueError, match='validation share must be in'):
        dataset.split(1.0)


def test_the_sample_for_statistics_is_bounded_and_holds_recorded_actions_only(built):
    dataset = open_cache(built)
    states, actions = dataset.sample()
    np.testing.assert_array_equal(states, dataset.states)
    np.testing.assert_array_equal(actions, dataset.chunks[dataset.mask])
    states, actions = dataset.sample(np.arange(7, 40), limit=10)
    assert len(states) == 10 and 0 < len(actions) <= 10
    np.testing.assert_array_equal(states[[0, -1]], dataset.states[[7, 39]])


# Loader


def drawn(dataset):
    """Return rows(step): batches of three, drawn from the step alone."""
    return lambda step: np.random.default_rng([5, step]).integers(0, len(dataset), 3)


@pytest.mark.parametrize('options', [{}, {'threads': 4, 'ahead': 9}, {'resident': True}])
def test_a_batch_depends_on_its_step_alone(built, options):
    dataset = open_cache(built)
    rows = drawn(dataset)
    with Loader(dataset, rows, 'cpu', start_step=4, **options) as loader:
        for step in range(4, 24):
            batch, expected = next(loader).tensors(), dataset.gather(rows(step)).tensors()
            for name, values in batch.items():
                assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize('resident', [False, True])
def test_what_goes_wrong_in_a_thread_reaches_the_consumer(built, resident):
    dataset = open_cache(built)
    with Loader(dataset, lambda step: np.array([step]), 'cpu', start_step=len(dataset) - 1,
                resident=resident) as loader:
        assert len(next(loader).mask) == 1
        with pytest.raises(IndexError):
            next(loader)


def test_closing_the_loader_ends_its_threads(built):
    before = threading.active_count()
    dataset = open_cache(built)
    loader = Loader(dataset, drawn(dataset), 'cpu')
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before and list(loader) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('resident', [False, True])
def test_a_gpu_gets_the_same_batches(built, resident):
    dataset = open_cache(built)
    rows = drawn(dataset)
    with Loader(dataset, rows, 'cuda', resident=resident) as loader:
        for step in range(50):
            for name, values in next(loader).tensors().items():
                assert values.is_cuda
                assert torch.equal(values.cpu(), dataset.gather(rows(step)).tensors()[name])
