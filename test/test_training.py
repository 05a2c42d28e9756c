"""From a recorded bag to a checkpoint that loads, and what stands between."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from meanflow_ros.core.policy import Policy
from meanflow_ros.ros.bag import TYPES, BagWriter
from meanflow_ros.training.config import read_train_config
from meanflow_ros.training.dataset import (
    ChunkDataset, Episode, augment, find_bags, read_bag, resize_picture)
from meanflow_ros.training.train import action_error, main, train

CONFIG = Path(__file__).parent.parent / 'config' / 'train_metaworld.yaml'
PERIOD_NS = 25_000_000


def config(**changes):
    return dataclasses.replace(
        read_train_config(CONFIG),
        **{'image_size': 32, 'steps': 2, 'batch_size': 2, 'noise_samples': 1, **changes})


def episode(length=7, seed=0, name='made by hand', instruction='open the faucet'):
    random = np.random.default_rng(seed)
    actions = np.clip(random.normal(0.1, 0.3, (length, 4)), -0.79, 0.77)
    return Episode(
        name=name, instruction=instruction, states=random.normal(0.7, 0.2, (length, 9)),
        pictures=random.integers(0, 256, (length, 2, 32, 32, 3), dtype=np.uint8), actions=actions)


def write_episode(bag, now_ns, outcome, steps=4, actions=True):
    """Write a made-up episode on the topics of a demonstration; return the time after it."""
    def message(kind, **fields):
        return TYPES.types[kind](**fields)

    def header():
        return message('std_msgs/msg/Header', frame_id='', stamp=message(
            'builtin_interfaces/msg/Time', sec=now_ns // 10**9, nanosec=now_ns % 10**9))

    def mark(text):
        bag.write('episode', message(
            'diagnostic_msgs/msg/DiagnosticStatus', level=0, name='faucet-open', message=text,
            hardware_id='', values=[message('diagnostic_msgs/msg/KeyValue', key='episode',
                                            value='3')]), now_ns)

    spec = read_train_config(CONFIG).robot
    mark('start')
    bag.write('instruction', message('std_msgs/msg/String', data='open the faucet'), now_ns)
    for step in range(steps):
        bag.write('joint_states', message(
            'sensor_msgs/msg/JointState', header=header(), name=list(reversed(spec.state_names)),
            position=np.arange(9.0) + step / 7, velocity=np.zeros(0), effort=np.zeros(0)), now_ns)
        if actions:
            bag.write('action', message(
                'trajectory_msgs/msg/JointTrajectory', header=header(),
                joint_names=list(spec.action_space.dimensions), points=[message(
                    'trajectory_msgs/msg/JointTrajectoryPoint',
                    positions=np.array([0.1, -0.2, 0.3, 0.7]) + step / 100,
                    velocities=np.zeros(0), accelerations=np.zeros(0), effort=np.zeros(0),
                    time_from_start=message('builtin_interfaces/msg/Duration', sec=0,
                                            nanosec=0))]), now_ns)
        for camera in spec.camera_names:
            pixels = np.full((40, 48, 3), 50 * step + 1, np.uint8)
            bag.write(f'camera/{camera}/image_raw', message(
                'sensor_msgs/msg/Image', header=header(), height=40, width=48, encoding='rgb8',
                is_bigendian=0, step=144, data=pixels.reshape(-1)), now_ns)
        now_ns += PERIOD_NS
    mark(outcome)
    return now_ns + 10**9


def test_a_bag_becomes_the_episodes_that_succeeded_and_names_those_it_skips(tmp_path):
    with BagWriter(tmp_path / 'bag') as bag:
        now_ns = write_episode(bag, 10**9, 'success')
        now_ns = write_episode(bag, now_ns, 'failure')
        now_ns = write_episode(bag, now_ns, 'success', actions=False)
        write_episode(bag, now_ns, 'success', steps=3)
    episodes, skipped = read_bag(tmp_path / 'bag', read_train_config(CONFIG).robot, 32)
    assert [len(e.actions) for e in episodes] == [4, 3]
    assert len(skipped) == 2 and 'failure' in skipped[0] and '0 actions' in skipped[1]
    first = episodes[0]
    assert first.instruction == 'open the faucet'
    np.testing.assert_allclose(first.actions[2], [0.12, -0.18, 0.32, 0.72])
    np.testing.assert_allclose(first.states[1], np.arange(9.0)[::-1] + 1 / 7)
    assert first.pictures.shape == (4, 2, 32, 32, 3)
    assert (first.pictures[2] == 101).all()


def test_a_folder_without_a_bag_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match='no rosbag2'):
        find_bags(tmp_path)


def test_a_chunk_is_what_follows_and_its_padding_is_masked():
    robot = read_train_config(CONFIG).robot
    data = ChunkDataset([episode(5), episode(3, seed=1)], robot, torch.device('cpu'))
    assert len(data) == 8
    np.testing.assert_array_equal(data.chunk_rows[3], [3, 4] + [4] * 14)
    np.testing.assert_array_equal(data.mask[3], [True, True] + [False] * 14)
    np.testing.assert_array_equal(data.chunk_rows[5][:4], [5, 6, 7, 7])
    assert data.mask.sum() == 5 + 4 + 3 + 2 + 1 + 3 + 2 + 1


def test_the_k_of_the_time_rule_moves_the_chunk():
    robot = dataclasses.replace(read_train_config(CONFIG).robot, first_step=2)
    data = ChunkDataset([episode(5)], robot, torch.device('cpu'))
    np.testing.assert_array_equal(data.chunk_rows[1][:3], [3, 4, 4])
    np.testing.assert_array_equal(data.mask[1][:3], [True, True, False])


def test_pictures_are_resized_as_the_encoder_does():
    picture = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    from meanflow_ros.core.encoder import FlorenceEncoder
    pixels = FlorenceEncoder.preprocess(
        SimpleNamespace(mean=torch.zeros(1), config=SimpleNamespace(image_size=32)), picture)
    small = resize_picture(picture, 32)
    assert np.abs(small - pixels.permute(1, 2, 0).numpy()).max() <= 0.5


def test_augmentation_without_strength_changes_nothing_and_with_it_moves_pixels():
    torch.manual_seed(0)
    pixels = torch.rand(2, 2, 3, 16, 16) * 255
    assert torch.allclose(augment(pixels, shift=0.0, colour=0.0), pixels, atol=1e-3)
    assert (augment(pixels, shift=3.0, colour=0.0) - pixels).abs().mean() > 5


@pytest.mark.parametrize('loss', ['meanflow', 'rf'])
def test_training_writes_a_checkpoint_that_loads_with_the_statistics_of_the_data(tmp_path, loss):
    data = ChunkDataset([episode(6), episode(5, seed=1, instruction='close the faucet')],
                        config().robot, torch.device('cpu'))
    train(config(loss=loss), data, torch.device('cpu'), tmp_path / 'made', torch.bfloat16)
    policy = Policy.load(tmp_path / 'made')
    low = np.quantile(data.actions, 0.01, axis=0)
    np.testing.assert_allclose(policy.config.action_normalizer.low, low)
    assert policy.config.instantaneous == (loss == 'rf')
    assert policy.config.training['loss'] == loss
    assert action_error(policy, data, steps=1).shape == (4,)


def test_a_typo_in_the_configuration_is_refused_with_the_right_name(tmp_path):
    path = tmp_path / 'typo.yaml'
    path.write_text(CONFIG.read_text().replace('learning_rate:', 'lerning_rate:'))
    with pytest.raises(ValueError, match="lerning_rate.*did you mean 'learning_rate'"):
        read_train_config(path)


def test_the_command_says_what_is_wrong_and_exits_with_2(tmp_path, capsys):
    assert main([str(CONFIG), '--data', str(tmp_path), '--out', str(tmp_path / 'out')]) == 2
    assert 'no rosbag2' in capsys.readouterr().err


def test_ctrl_c_in_the_middle_of_training_leaves_no_checkpoint(tmp_path, monkeypatch):
    data = ChunkDataset([episode(6)], config().robot, torch.device('cpu'))

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr('meanflow_ros.core.meanflow.meanflow_loss', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(), data, torch.device('cpu'), tmp_path / 'made', torch.float32)
    assert not (tmp_path / 'made').exists()
