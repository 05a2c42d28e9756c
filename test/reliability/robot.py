"""The robot of the campaign: every kind of output, a checkpoint of random weights, its limits.

shoulder: joint_trajectory_controller. elbow and grip: forward_command_controller; grip is not
measured. turn: a rate, for MoveIt Servo.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import yaml

from meanflow_ros.core.contract import ActionSpace
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import Policy
from micro_policy import make_policy

DIMENSIONS = ('shoulder', 'elbow', 'grip', 'turn')
STATES = ('shoulder', 'elbow', 'load')
LOAD = 0.4                                        # of the state that is no action
LOWER = np.array([-1.27, -0.37, 0.0021, -0.83])
UPPER = np.array([1.71, 0.91, 0.0133, 0.61])
VELOCITY = np.array([1.1, 0.53, 0.017, 2.3])      # of turn: how fast the rate may change
ACCELERATION = np.array([7.0, 4.1, 0.29, 19.0])
HOME = {'shoulder': 0.2, 'elbow': 0.1}
CONTROL_RATE_HZ = 50.0
MAX_AGE_S, DEADLINE_S, STOP_S = 0.3, 0.4, 0.3
TOPICS = {'trajectory': 'arm/joint_trajectory', 'forward': 'elbow/commands',
          'twist': 'servo/twist'}
PARAMETERS = {'threads': 1, 'max_age_s': MAX_AGE_S, 'max_skew_s': 0.1, 'autostart': True}


def write_checkpoint(directory: Path) -> Path:
    """Write the micro policy with this robot's actions; its chunks go all over their ranges."""
    policy = make_policy()
    robot, span = policy.robot, UPPER - LOWER
    space = ActionSpace(name='odd', dimensions=DIMENSIONS, units=('rad', 'rad', 'm', 'rad/s'),
                        lower=LOWER, upper=UPPER, rates=('turn',))
    state_low = np.array([LOWER[0], LOWER[1], 0.2])
    config = dataclasses.replace(
        policy.config,
        robot=dataclasses.replace(robot, state_names=STATES, action_space=space),
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


def write_motion(path: Path) -> Path:
    """Write the motion file."""
    def named(values):
        return dict(zip(DIMENSIONS, values.tolist()))

    path.write_text(yaml.safe_dump({
        'control_rate_hz': CONTROL_RATE_HZ, 'safe_action': 'decelerate', 'stop_s': STOP_S,
        'deadline_s': DEADLINE_S,
        'limits': {'velocity': named(VELOCITY), 'acceleration': named(ACCELERATION)},
        'first_step': {'shoulder': 0.05, 'elbow': 0.05},
        'remedies': {kind: 'clamp' for kind in ('velocity', 'acceleration', 'first_step')},
        'outputs': [
            {'type': 'joint_trajectory', 'topic': TOPICS['trajectory'],
             'dimensions': ['shoulder']},
            {'type': 'forward_command', 'topic': TOPICS['forward'],
             'dimensions': ['elbow', 'grip']},
            {'type': 'twist', 'topic': TOPICS['twist'], 'axes': {'angular.z': 'turn'},
             'frame_id': 'tool'}]}))
    return path
