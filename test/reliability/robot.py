"""The robot of the campaign: cameras, every kind of output, and its limits.

shoulder: joint_trajectory_controller. elbow and grip: forward_command_controller; grip is not
measured. turn: a rate, for MoveIt Servo.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

CAMERAS, HEIGHT, WIDTH = ('static', 'wrist'), 48, 64
DIMENSIONS = ('shoulder', 'elbow', 'grip', 'turn')
STATES = ('shoulder', 'elbow', 'load')
LOAD = 0.4                                        # of the state that is no action
LOWER = np.array([-1.27, -0.37, 0.0021, -0.83])
UPPER = np.array([1.71, 0.91, 0.0133, 0.61])
VELOCITY = np.array([1.1, 0.53, 0.017, 2.3])      # of turn: how fast the rate may change
ACCELERATION = np.array([7.0, 4.1, 0.29, 19.0])
JERK = np.array([np.inf, 67.0, np.inf, np.inf])
NEUTRAL = {'shoulder': 0.3, 'elbow': 0.2, 'grip': 0.007, 'turn': 0.0}
INSTRUCTION = 'push the lever'
HOME = {'shoulder': 0.2, 'elbow': 0.1}
CONTROL_RATE_HZ = 50.0
MAX_AGE_S, DEADLINE_S, STOP_S = 0.3, 0.4, 0.3
TOPICS = {'trajectory': 'arm/joint_trajectory', 'forward': 'elbow/commands',
          'twist': 'servo/twist'}
PARAMETERS = {'threads': 1, 'max_age_s': MAX_AGE_S, 'max_skew_s': 0.1, 'autostart': True}


def write_motion(path: Path, safe_action: str = 'decelerate') -> Path:
    """Write the motion file."""
    def named(values):
        return {name: value for name, value in zip(DIMENSIONS, values.tolist())
                if np.isfinite(value)}

    path.write_text(yaml.safe_dump({
        'control_rate_hz': CONTROL_RATE_HZ, 'safe_action': safe_action, 'stop_s': STOP_S,
        'deadline_s': DEADLINE_S, 'neutral': NEUTRAL,
        'limits': {'velocity': named(VELOCITY), 'acceleration': named(ACCELERATION),
                   'jerk': named(JERK)},
        'first_step': {'shoulder': 0.05, 'elbow': 0.05},
        'remedies': {kind: 'clamp' for kind in ('velocity', 'acceleration', 'jerk',
                                                'first_step')},
        'outputs': [
            {'type': 'joint_trajectory', 'topic': TOPICS['trajectory'],
             'dimensions': ['shoulder']},
            {'type': 'forward_command', 'topic': TOPICS['forward'],
             'dimensions': ['elbow', 'grip']},
            {'type': 'twist', 'topic': TOPICS['twist'], 'axes': {'angular.z': 'turn'},
             'frame_id': 'tool'}]}))
    return path
