"""What is measured: policies with random weights of a preset's sizes, and their observations."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from meanflow_ros.core.contract import ActionSpace, CameraSpec, Observation, RobotSpec
from meanflow_ros.core.dit import dit_preset
from meanflow_ros.core.encoder import encoder_preset, train_tokenizer
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import Policy, PolicyConfig

INSTRUCTIONS = ('open the drawer', 'push the red lever to the left', 'pick up the spoon',
                'put the block into the bowl', 'close it', 'turn the faucet on', 'wipe the table',
                'move the cup next to the plate, then press the green button')
ZERO_WEIGHTS_BECOME = 0.1   # standard deviation


def random_policy(preset: str, *, cameras: int = 2, width: int = 640, height: int = 480,
                  horizon: int = 10, states: int = 7, actions: int = 7,
                  rectified_flow: bool = False, device: torch.device | str = 'cpu') -> Policy:
    """Return a policy of a preset's sizes with random weights, the same on one kind of device.

    What training starts from zero (gates, the last layer) is random too: a network that does
    nothing would agree with any other. rectified_flow: blind to h, followed by Euler steps.
    """
    space = ActionSpace(name='bench', dimensions=tuple(f'action_{i}' for i in range(actions)),
                        units=('rad',) * actions, lower=[-2.9] * actions, upper=[3.1] * actions)
    robot = RobotSpec(
        robot='bench', state_names=tuple(f'joint_{i}' for i in range(states)), horizon=horizon,
        period_s=0.1, first_step=1, action_space=space, cameras=tuple(
            CameraSpec(name=f'camera_{i}', width=width, height=height) for i in range(cameras)))
    dit = dit_preset(preset, {space.name: actions}, {space.name: states} if states else {})
    config = PolicyConfig(
        robot=robot, encoder=encoder_preset(preset),
        dit=dataclasses.replace(dit, h_in='none') if rectified_flow else dit,
        sampler='euler' if rectified_flow else 'average',
        action_normalizer=Normalizer(low=[-2.3] * actions, high=[2.7] * actions),
        state_normalizer=Normalizer(low=[-1.1] * states, high=[1.9] * states) if states else None)
    with torch.random.fork_rng([device] if torch.device(device).type == 'cuda' else []):
        torch.manual_seed(0)
        with torch.device(device):
            policy = Policy.create(config, train_tokenizer(INSTRUCTIONS))
        for value in policy.network.dit.state_dict().values():
            if not value.is_meta and value.is_floating_point() and not value.any():
                value.normal_(0.0, ZERO_WEIGHTS_BECOME)
    return policy


def observations(robot: RobotSpec, count: int = 8) -> list[Observation]:
    """Return observations of noise, each with an instruction and a stamp of its own."""
    random = np.random.default_rng(0)
    return [Observation(
        stamp_ns=1_000_000_007 * (number + 1), instruction=INSTRUCTIONS[number % 8],
        state=random.uniform(-1, 1.8, len(robot.state_names)),
        images={camera.name: random.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
                for camera in robot.cameras}) for number in range(count)]
