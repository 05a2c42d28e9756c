"""A policy as small as the classes allow, with random weights: a few ms per inference."""

from __future__ import annotations

import numpy as np
import torch

from meanflow_ros.core.contract import ActionSpace, CameraSpec, RobotSpec
from meanflow_ros.core.dit import DiTConfig
from meanflow_ros.core.encoder import EncoderConfig, train_tokenizer
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import Policy, PolicyConfig

CAMERAS = ('static', 'wrist')
HEIGHT, WIDTH = 48, 64
JOINTS = ('a', 'b', 'c')
DIMENSIONS = ('slide', 'swivel', 'pinch')
LOWER = np.array([-0.37, -41.3, 0.0021])
UPPER = np.array([0.91, 17.9, 0.0133])
HORIZON, PERIOD_S, FIRST_STEP = 8, 0.1, 2
ROBOT = 'micro_robot'


def make_policy() -> Policy:
    """Return the policy; the same weights in every process."""
    tokenizer = train_tokenizer(['push the lever', 'pull the lever'], 270)
    config = PolicyConfig(
        robot=RobotSpec(
            robot=ROBOT, state_names=JOINTS, horizon=HORIZON, period_s=PERIOD_S,
            first_step=FIRST_STEP,
            cameras=tuple(CameraSpec(name=name, width=WIDTH, height=HEIGHT) for name in CAMERAS),
            action_space=ActionSpace(name='odd', dimensions=DIMENSIONS,
                                     units=('m', 'deg', 'm'), lower=LOWER, upper=UPPER)),
        action_normalizer=Normalizer(low=LOWER + 0.01 * (UPPER - LOWER),
                                     high=UPPER - 0.02 * (UPPER - LOWER)),
        state_normalizer=Normalizer(low=np.array([-1.3, 0.2, -7.0]),
                                    high=np.array([2.1, 0.9, 31.0])),
        encoder=EncoderConfig(
            image_size=32, token_dropout=0.0,
            vision={'embed_dim': [16, 16, 32, 32], 'depths': [1, 1, 1, 1],
                    'num_heads': [1, 1, 2, 2], 'num_groups': [1, 1, 2, 2],
                    'patch_stride': [4, 2, 2, 1], 'window_size': 2, 'drop_path_rate': 0.0,
                    'projection_dim': 32},
            text={'vocab_size': tokenizer.get_vocab_size(), 'd_model': 32, 'encoder_layers': 1,
                  'encoder_attention_heads': 2, 'encoder_ffn_dim': 32,
                  'max_position_embeddings': 128}),
        dit=DiTConfig(width=32, depth=2, heads=2, action_spaces={'odd': 3},
                      state_sizes={'odd': 3}, adaln_rank=4),
        sampler_steps=1)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        policy = Policy.create(config, tokenizer)
        for value in policy.network.dit.state_dict().values():
            if value.is_floating_point() and not value.any():  # gates and outputs begin as zero
                value.normal_(0.0, 0.3)
    return policy
