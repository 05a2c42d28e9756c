"""A data set of a few tiny episodes and a network of a few thousand weights, for the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import made_bags
import numpy as np
import torch

from meanflow_ros.core.dit import DiTConfig
from meanflow_ros.core.encoder import EncoderConfig
from meanflow_ros.training import policy as training_policy
from meanflow_ros.training import train
from meanflow_ros.training.cache import build_cache, open_cache
from meanflow_ros.training.config import TrainConfig
from meanflow_ros.training.distributed import Group

ROBOT = made_bags.ROBOT
SIZE = 32
ALONE = Group(rank=0, size=1, device=torch.device('cpu'))


def config(**changes) -> TrainConfig:
    """Return a configuration that trains in milliseconds."""
    return TrainConfig(**{
        'robot': ROBOT, 'image_size': SIZE, 'steps': 4, 'batch_size': 4, 'noise_samples': 2,
        'data_proportion': 0.5, 'validation': 0.2, 'learning_rate': 3e-3, **changes})


def write_bag(path: Path, episodes: int = 5, steps: int = 12, outcome: str = 'success') -> Path:
    """Write a bag of reaching motions; each instruction has its own."""
    make = made_bags
    random = np.random.default_rng(5)
    with make.BagWriter(path) as bag:
        now = make.T0
        for number in range(episodes):
            bag.write('episode', make.status('start', number), now)
            text = ('reach left', 'reach right')[number % 2]
            bag.write('instruction', make.make('std_msgs/String', data=text), now)
            for step in range(steps):
                base, elbow = 0.3 * number + 0.05 * step, 1.1 - 0.07 * step
                bag.write('joint_states', make.joint_state(now, base=base, elbow=elbow), now)
                bag.write('action', make.trajectory(
                    now, ROBOT.action_space.dimensions,
                    [[base + 0.05, elbow - 0.07, 0.1 + 0.06 * step]]), now)
                for camera in ROBOT.camera_names:
                    pixels = random.integers(0, 256, (16, 20, 3), dtype=np.uint8)
                    bag.write(f'camera/{camera}/image_raw', make.image(now, pixels), now)
                now += round(ROBOT.period_s * 1e9)
            bag.write('episode', make.status(outcome, number), now)
            now += 10**9
    return path


def make_data(directory: Path, **changes):
    """Return the PairDataset of such a bag below `directory`."""
    settings = config(**changes)
    bag = directory / 'bag'
    if not bag.exists():
        write_bag(bag)
    build_cache([bag], ROBOT, settings.data, SIZE, directory / 'cache')
    return open_cache(directory / 'cache')


def losses_of(run: Path) -> list[float]:
    """Return the losses of a run's directory, step by step."""
    return [json.loads(line)['loss'] for line in (run / 'losses.jsonl').read_text().splitlines()]


def fixed_objective(settings: TrainConfig, data):
    """Return a policy, its loss and a batch of six: the same weights and rows every time."""
    torch.manual_seed(3)
    policy = train.make_policy(settings, data)
    for value in policy.network.dit.state_dict().values():     # gates begin as zero
        if value.is_floating_point() and not value.any():
            value.normal_(0.0, 0.3)
    loss = train.TrainingLoss(policy.network.requires_grad_(True), settings, policy.config,
                              data.instructions)
    return policy, loss, data.gather(np.arange(6)).tensors()


def make_networks_small(monkeypatch) -> None:
    """Let the trainer build networks of a few thousand weights in place of its presets."""
    def encoder(name):
        return EncoderConfig(
            image_size=SIZE, token_dropout=0.0,
            vision={'embed_dim': [16, 16, 32, 32], 'depths': [1, 1, 1, 1],
                    'num_heads': [1, 1, 2, 2], 'num_groups': [1, 1, 2, 2],
                    'patch_stride': [4, 2, 2, 1], 'window_size': 2, 'drop_path_rate': 0.0,
                    'projection_dim': 32},
            text={'vocab_size': 270, 'd_model': 32, 'encoder_layers': 1,
                  'encoder_attention_heads': 2, 'encoder_ffn_dim': 32,
                  'max_position_embeddings': 128, 'dropout': 0.0})

    def dit(name, action_spaces, state_sizes):
        return DiTConfig(width=32, depth=2, heads=2, action_spaces=dict(action_spaces),
                         state_sizes=dict(state_sizes), adaln_rank=4)

    monkeypatch.setattr(training_policy, 'encoder_preset', encoder)
    monkeypatch.setattr(training_policy, 'dit_preset', dit)
