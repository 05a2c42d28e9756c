"""TrainConfig: everything that decides a training run, from YAML and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.core.dit import H_PLACES
from meanflow_ros.core.meanflow import LOSSES
from meanflow_ros.core.normalize import METHODS
from meanflow_ros.core.policy import read_robot
from meanflow_ros.core.schema import MAX_YAML_BYTES, check_keys, read_dataclass, read_yaml
from meanflow_ros.core.times import PAIRS, SINGLE
from meanflow_ros.training.data_config import DataConfig

PRESETS = ('tiny', 'large')
FREEZE = ('none', 'vision', 'encoder')
PRECISIONS = ('float32', 'mixed', 'bfloat16')


def _option(default, text: str, choices=None):
    """Return a field that is also a command-line option, with its help."""
    return field(default=default, metadata={'help': text, 'choices': choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Rates are per optimiser step; sizes in samples. ValueError names a bad field."""

    robot: RobotSpec
    data: DataConfig = field(default_factory=DataConfig)

    preset: str = _option('tiny', 'sizes of the network', PRESETS)
    image_size: int = _option(128, 'side of the pictures that the encoder sees, pixels')
    prompt: str = _option('{instruction}', 'template of the prompt')
    h_in: str = _option('adaln', 'where h = t - r enters', H_PLACES)
    max_frequency: float = _option(10.0, 'of the time embedding, rad per unit of t')
    dropout: float = _option(0.0, 'in the action network')
    initial: str = _option('', 'checkpoint directory to start from')
    florence: str = _option('', 'Florence-2 weights for the encoder: a directory or a hub name')
    freeze: str = _option('none', 'what of the encoder is not trained', FREEZE)

    loss: str = _option('meanflow', 'objective', tuple(LOSSES))
    dpm_h_step: float = _option(0.1, 'dpm: step in t as a share of h')
    central_step: float = _option(5e-3, 'central: half of the difference in t')
    stop_target: bool | None = _option(None, 'stop-gradient on the target; only dpm defaults to '
                                             'false, as its document has it')
    stop_weight: bool | None = _option(None, 'stop-gradient on the weight; only dpm defaults to '
                                             'false, as its document has it')
    weight_eps: float = _option(0.01, 'eps of the adaptive weight (error + eps)^-p')
    weight_power: float = _option(1.0, 'p of the adaptive weight')
    time_sampling: str = _option('', "distribution of the times; '' for sorted (rf: uniform)",
                                 ('', *PAIRS, *SINGLE))
    data_proportion: float = _option(0.75, 'share of samples with r = t')
    one_step_proportion: float = _option(0.0, 'share of samples with t = 1, r = 0')
    guidance: float = _option(1.0, 'scale of classifier-free guidance inside training')
    guidance_mix: float = _option(0.0, 'share of the conditional prediction in the guided target')
    condition_dropout: float = _option(0.0, 'share of observations without condition')
    max_prefix: int = _option(0, 'steps of a chunk that may be given as a clean prefix, for '
                                 'real-time chunking; half of the samples have none, the others '
                                 '1 to this many')
    dispersive: float = _option(0.0, 'weight of the dispersive term')
    dimension_weights: tuple[float, ...] = _option((), 'weight of each action dimension')

    steps: int = _option(6000, 'optimiser steps')
    batch_size: int = _option(128, 'observations in a step, over all processes')
    accumulate: int = _option(1, 'parts that a batch is computed in, one after the other')
    noise_samples: int = _option(4, 'draws of (noise, t, r) per observation; encoded once')
    learning_rate: float = _option(5e-4, 'peak learning rate')
    warmup: float = _option(0.05, 'share of the steps in which the rate rises')
    hold: float = _option(0.1, 'share of the steps at the peak; then a cosine')
    initial_rate: float = _option(0.1, 'first learning rate, as a share of the peak')
    final_rate: float = _option(0.002, 'last learning rate, as a share of the peak')
    weight_decay: float = _option(0.05, 'of matrices; norms, biases and embeddings have none')
    clip_norm: float = _option(1.0, 'largest norm of the gradient')
    ema: float = _option(0.999, 'decay of the averaged weights, which are what is saved')
    precision: str = _option('bfloat16', 'on a GPU; mixed keeps the action network in float32',
                             PRECISIONS)
    activation_checkpointing: bool = _option(False, "recompute the encoder's activations: less "
                                                    'memory, more time')
    compile: bool = _option(False, 'torch.compile the networks')

    normalization: str = _option('quantile', '1 % to 99 %, or mean and 3 deviations', METHODS)
    shift_pixels: float = _option(2.0, 'largest random shift of a picture')
    colour: float = _option(0.15, 'largest random change of brightness and contrast')
    validation: float = _option(0.05, 'share of the episodes held out')
    validate_every: int = _option(1000, 'steps between validations')
    save_every: int = _option(1000, 'steps between checkpoints')
    seed: int = _option(0, 'of weights, batches, noise and augmentation')

    def __post_init__(self):
        for option in options():
            choices, value = option.metadata['choices'], getattr(self, option.name)
            if choices and value not in choices:
                raise ValueError(f'{option.name} must be one of {choices}, got {value!r}')
        for name in ('steps', 'batch_size', 'noise_samples', 'accumulate', 'validate_every',
                     'save_every'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}')
        for name in ('data_proportion', 'one_step_proportion', 'ema', 'condition_dropout',
                     'warmup', 'hold', 'initial_rate', 'final_rate'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must be in [0, 1], got {getattr(self, name)}')
        for name in ('learning_rate', 'dpm_h_step', 'central_step', 'weight_eps', 'clip_norm'):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name} must be finite and above 0, got {getattr(self, name)}')
        if not 0 <= self.max_prefix < self.robot.horizon:
            raise ValueError(f'max_prefix must be 0 to {self.robot.horizon - 1}, less than the '
                             f'horizon, got {self.max_prefix}')
        if not 0 <= self.validation < 1:
            raise ValueError(f'validation must be in [0, 1), got {self.validation}')
        if self.warmup + self.hold > 1:
            raise ValueError(f'warmup and hold are shares of one run and together at most 1, '
                             f'got {self.warmup} and {self.hold}')
        if self.batch_size % self.accumulate:
            raise ValueError(f'batch_size must be a multiple of accumulate, '
                             f'got {self.batch_size} and {self.accumulate}')
        fitting = SINGLE if self.loss in ('rf', 'l1') else PAIRS
        if self.time_sampling and self.time_sampling not in fitting:
            raise ValueError(f'time_sampling {self.time_sampling!r} is not for loss '
                             f'{self.loss!r}, use one of {tuple(fitting)}')
        if self.guided and self.loss == 'l1':
            raise ValueError('guidance needs a flow: loss l1 has none')
        if self.guided and not self.condition_dropout:
            raise ValueError('guidance needs condition_dropout above 0, 0.1 for example')
        if not 0 <= self.guidance_mix < 1:
            raise ValueError(f'guidance_mix must be in [0, 1), got {self.guidance_mix}')
        weights = self.dimension_weights
        if weights and (len(weights) != self.robot.action_space.size or min(weights) < 0
                        or not 0 < sum(weights) < math.inf):
            raise ValueError(f'dimension_weights must be {self.robot.action_space.size} numbers '
                             f'of at least 0, not all 0, got {list(weights)}')

    @property
    def guided(self) -> bool:
        """Whether the loss sees a guided velocity in place of v."""
        return self.guidance != 1 or self.guidance_mix != 0

    @property
    def repeats_dropout(self) -> bool:
        """Whether calls are subtracted from each other, which must then have the same dropout."""
        return self.dropout > 0 and self.loss in ('dpm', 'central')


def options() -> list[dataclasses.Field]:
    """Return the fields that the command line can override."""
    return [field for field in dataclasses.fields(TrainConfig) if 'help' in field.metadata]


def _flag(text: str) -> bool:
    if text.lower() in ('true', 'yes', '1'):
        return True
    if text.lower() in ('false', 'no', '0'):
        return False
    raise argparse.ArgumentTypeError(f'true or false, got {text!r}')


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(',') if part)


_KINDS = {'int': (int, 'INT'), 'float': (float, 'FLOAT'), 'str': (str, 'TEXT'),
          'bool': (_flag, 'BOOL'), 'bool | None': (_flag, 'BOOL'),
          'tuple[float, ...]': (_numbers, 'N,N,...')}


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--learning-rate` and its like for every field but `robot` and `data`."""
    group = parser.add_argument_group('overrides of the configuration file')
    for option in options():
        kind, metavar = _KINDS[str(option.type)]
        text = option.metadata['help'].replace('%', '%%')
        if option.metadata['choices']:
            text += ': ' + ', '.join(filter(None, option.metadata['choices']))
        if option.default not in (None, '', ()):
            text += f' (default {option.default})'.replace('%', '%%')
        group.add_argument('--' + option.name.replace('_', '-'), type=kind, metavar=metavar,
                           help=text)


def read_train_config(path: Path, arguments: argparse.Namespace | None = None) -> TrainConfig:
    """Read a training YAML; fields given on the command line win. ValueError names what is off."""
    try:
        document = read_yaml(path, MAX_YAML_BYTES)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    names = [option.name for option in options()]
    check_keys(document, ['robot'], ['data', *names], str(path))
    document = {**document, 'robot': read_robot(document['robot'])}
    if 'data' in document:
        document['data'] = read_dataclass(DataConfig, document['data'], f'{path}: data')
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None:
            document[name] = value
    return read_dataclass(TrainConfig, document, str(path))
