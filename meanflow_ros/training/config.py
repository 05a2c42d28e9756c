"""TrainConfig: everything that decides a training run, from YAML and the command line."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.core.dit import H_PLACES
from meanflow_ros.core.policy import read_robot
from meanflow_ros.core.schema import check_keys, read_dataclass

LOSSES = ('meanflow', 'rf')
PRESETS = ('tiny', 'large')


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Rates are per optimiser step; sizes in samples.

    noise_samples: draws of (noise, t, r) per observation and step; the encoder runs once for all.
    data_proportion: share of draws with r = t. one_step_proportion: share with t = 1, r = 0.
    """

    robot: RobotSpec
    preset: str = 'tiny'
    image_size: int = 128
    prompt: str = '{instruction}'
    loss: str = 'meanflow'
    h_in: str = 'adaln'
    max_frequency: float = 10.0
    data_proportion: float = 0.5
    one_step_proportion: float = 0.1
    noise_samples: int = 4
    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 5e-4
    warmup_steps: int = 300
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    ema: float = 0.999
    dropout: float = 0.0
    shift_pixels: float = 2.0
    colour: float = 0.15
    seed: int = 0

    def __post_init__(self):
        for name, choices in (('loss', LOSSES), ('preset', PRESETS), ('h_in', H_PLACES)):
            if getattr(self, name) not in choices:
                raise ValueError(f'{name} must be one of {choices}, got {getattr(self, name)!r}')
        for name in ('steps', 'batch_size', 'noise_samples'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}')
        for name in ('data_proportion', 'one_step_proportion', 'ema'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must be in [0, 1], got {getattr(self, name)}')


def _overridable() -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(TrainConfig) if field.name != 'robot']


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--learning-rate` and its like for every field but the robot."""
    group = parser.add_argument_group('overrides of the configuration file')
    kinds = {'int': int, 'float': float, 'str': str}
    for field in _overridable():
        group.add_argument('--' + field.name.replace('_', '-'), type=kinds[str(field.type)],
                           metavar=str(field.type).upper(), help=f'default {field.default}')


def read_train_config(path: Path, arguments: argparse.Namespace | None = None) -> TrainConfig:
    """Read a training YAML; fields given on the command line win. ValueError names what is off."""
    with open(path, encoding='utf-8') as file:
        document = yaml.safe_load(file)
    check_keys(document, ['robot'], [field.name for field in _overridable()], str(path))
    document = {**document, 'robot': read_robot(document['robot'])}
    for field in _overridable():
        value = getattr(arguments, field.name, None)
        if value is not None:
            document[field.name] = value
    return read_dataclass(TrainConfig, document, str(path))
