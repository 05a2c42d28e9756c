"""A checkpoint of random weights for the robot of the campaign."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from meanflow_ros.core.contract import ActionSpace, CameraSpec
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import Policy
from micro_policy import make_policy
from reliability.robot import CAMERAS, DIMENSIONS, HEIGHT, LOWER, STATES, UPPER, WIDTH


def write_checkpoint(directory: Path) -> Path:
    """Write the micro policy with this robot's actions; its chunks go all over their ranges."""
    policy = make_policy()
    robot, span = policy.robot, UPPER - LOWER
    space = ActionSpace(name='odd', dimensions=DIMENSIONS, units=('rad', 'rad', 'm', 'rad/s'),
                        lower=LOWER, upper=UPPER, rates=('turn',))
    state_low = np.array([LOWER[0], LOWER[1], 0.2])
    config = dataclasses.replace(
        policy.config,
        robot=dataclasses.replace(
            robot, state_names=STATES, action_space=space, cameras=tuple(
                CameraSpec(name=name, width=WIDTH, height=HEIGHT) for name in CAMERAS)),
        action_normalizer=Normalizer(low=LOWER + 0.01 * span, high=UPPER - 0.02 * span),
        state_normalizer=Normalizer(low=state_low, high=np.array([UPPER[0], UPPER[1], 0.9])),
        dit=dataclasses.replace(policy.config.dit, action_spaces={'odd': len(DIMENSIONS)}))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        made = Policy.create(config, policy.network.encoder.tokenizer)
        for value in made.network.dit.state_dict().values():
            if value.is_floating_point() and not value.any():
                value.normal_(0.0, 0.3)
    made.save(directory)
    return directory
