"""ReplaySettings: everything that decides what a replay computes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from meanflow_ros.core.contract import NANOSECONDS, RobotSpec, clean_instruction
from meanflow_ros.core.guard import Guard
from meanflow_ros.core.limits import Limits
from meanflow_ros.core.policy import MAX_STEPS, read_config, read_robot
from meanflow_ros.core.schema import known_or_hint, read_dataclass, to_plain
from meanflow_ros.core.timeline import Mode
from meanflow_ros.evaluation.replay.driving import Driving, limits_of_file, motion_config
from meanflow_ros.evaluation.replay.latency import Latency
from meanflow_ros.ros.motion_config import read_mode
from meanflow_ros.ros.streams import IngestLimits
from meanflow_ros.training.data_config import DataConfig

CHECKPOINT, RECORDED, LIVE = 'checkpoint', 'recorded', 'live'
POLICIES = (CHECKPOINT, RECORDED)
RECEDING = 'receding_horizon'
BATCH_ON_CPU, BATCH = 8, 32   # caches are small, and many batches are shared evenly by threads


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """One replay. ValueError names a bad field.

    policy: the checkpoint's network, the recorded commands in its place, which must score no
    error, or a node that runs (live). sampler_steps: NFE, 0 for the checkpoint's own. remaps: the
    policy's name of a topic -> the bag's. start_s, duration_s: of each bag, from its first
    message; duration 0 is all. episodes: which episodes of each bag, by their order; empty is all.
    instruction: told in place of the recorded ones. batch: observations that are inferred at a
    time, 0 for a good number. threads: of a CPU, 0 for PyTorch's own choice. probe_every_s:
    seconds between probed observations, 0 for no probes. noise_seeds: seeds drawn per probed
    observation.
    swapped_instruction: what the probe says, '' for another of `known_instructions`, those of the
    recordings. execution: as the parameter of the node. motion: the motion file that the node is
    started with, '' for none. urdf: file of the robot description, '' for that of the recording,
    'none' for none. as_driven: see Driving. min_rate_hz, frozen_pictures, picture_size: as the
    parameters of the node. namespace: of the node that runs.
    """

    robot: RobotSpec
    data: DataConfig
    latency: Latency
    policy: str = CHECKPOINT
    checkpoint: str = ''
    sampler_steps: int = 0
    seed: int = 0
    device: str = 'cpu'
    dtype: str = 'float32'
    batch: int = 0
    threads: int = 0
    remaps: Mapping[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    duration_s: float = 0.0
    episodes: tuple[int, ...] = ()
    instruction: str = ''
    probe_every_s: float = 2.0
    noise_seeds: int = 4
    swapped_instruction: str = ''
    known_instructions: tuple[str, ...] = ()
    execution: str = RECEDING
    motion: str = ''
    urdf: str = ''
    as_driven: bool = False
    min_rate_hz: float = 0.0
    frozen_pictures: int = 10
    picture_size: str = 'aspect'
    namespace: str = ''

    def __post_init__(self):
        if self.policy not in (*POLICIES, LIVE):
            raise ValueError(f'policy must be one of {", ".join((*POLICIES, LIVE))}, '
                             f'got {self.policy!r}')
        if self.policy == CHECKPOINT and not self.checkpoint:
            raise ValueError('a checkpoint is needed: --checkpoint DIR')
        if not 0 <= self.sampler_steps <= MAX_STEPS:
            raise ValueError(f'sampler_steps must be 0 to {MAX_STEPS}, got {self.sampler_steps}')
        for name, least in (('batch', 0), ('threads', 0), ('noise_seeds', 2)):
            if getattr(self, name) < least:
                raise ValueError(f'{name} must be at least {least}, got {getattr(self, name)}')
        for name in ('start_s', 'duration_s', 'probe_every_s'):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f'{name} must be at least 0, got {getattr(self, name)}')
        self.limits, self.driving()
        if any(number < 0 for number in self.episodes):
            raise ValueError(f'episodes are counted from 0, got {min(self.episodes)}')
        for name in ('instruction', 'swapped_instruction'):
            if getattr(self, name):
                object.__setattr__(self, name, clean_instruction(getattr(self, name)))

    @property
    def mode(self) -> Mode:
        """Return how chunks that overlap become one sequence of actions."""
        return read_mode(self.execution)

    @property
    def at_a_time(self) -> int:
        """Return how many observations are one batch."""
        return self.batch or (BATCH_ON_CPU if self.device == 'cpu' else BATCH)

    @property
    def limits(self) -> IngestLimits:
        """Return when an input counts as missing."""
        return dataclasses.replace(
            self.data.limits(), min_rate_hz=self.min_rate_hz,
            frozen_pictures=self.frozen_pictures, picture_size=self.picture_size)

    def driving(self, described: Limits | None = None) -> Driving:
        """Return what drives the robot. described: limits of the recording's description.

        ValueError names what is wrong in the motion file or the URDF.
        """
        config = motion_config(self.motion, self.robot)
        if self.urdf:
            described = limits_of_file(self.urdf, self.robot)
        try:
            guard = config.guard_settings(self.robot, described=described,
                                          state_range=self._state_range())
            Guard(self.robot, guard)
        except ValueError as error:
            raise ValueError(f'the limits of the robot description and those of the checkpoint '
                             f'and the motion file have nothing in common: {error}; give the '
                             f'right one with --urdf FILE') from None
        return Driving(robot=self.robot, config=config, mode=self.mode, guard=guard,
                       as_driven=self.as_driven)

    def _state_range(self) -> tuple[np.ndarray, np.ndarray] | None:
        if not self.checkpoint:
            return None
        normalizer = read_config(Path(self.checkpoint, 'policy.yaml')).state_normalizer
        return None if normalizer is None else (normalizer.low, normalizer.high)

    def part_of(self, bag) -> tuple[int, int | None]:
        """Return the first time of the part of an open bag that is replayed, and where it ends."""
        start_ns = bag.start_ns + round(self.start_s * NANOSECONDS)
        return start_ns, (start_ns + round(self.duration_s * NANOSECONDS)
                          if self.duration_s else None)

    def plain(self) -> dict:
        """Return the settings as plain values."""
        return to_plain(self)

    def fingerprint(self) -> str:
        """Return a short text that is equal for settings that compute the same.

        The batch and the threads are left out: they change no result.
        """
        plain = self.plain() | {'batch': 0, 'threads': 0, 'weights': _weights(self.checkpoint),
                                'files': [_content(self.motion), _content(self.urdf)]}
        text = json.dumps(plain, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ''


def _weights(checkpoint: str) -> str:
    path = Path(checkpoint, 'model.safetensors')
    if not checkpoint or not path.is_file():
        return ''
    return _digest(path, path.stat().st_mtime_ns)


@functools.cache
def _digest(path: Path, changed_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_robot_and_data(checkpoint: Path | None, config: Path | None,
                        overrides) -> tuple[RobotSpec, DataConfig]:
    """Return the robot, and where its recordings keep what.

    The section `data` of the training YAML `config` says it, else what the checkpoint says of its
    training, else the defaults; `overrides` ('episodes=bag') win. ValueError if there is neither
    a checkpoint nor a configuration, or if they are of different robots.
    """
    if checkpoint is None and config is None:
        raise ValueError('the robot is unknown: give --checkpoint DIR or --config TRAINING.yaml')
    robot, data = None, {}
    if checkpoint is not None:
        trained = read_config(checkpoint / 'policy.yaml')
        robot = trained.robot
        data = trained.training.get('data') or {}
    if config is not None:
        document = _yaml(config)
        data = document.get('data', {})
        if 'robot' in document:
            own = read_robot(document['robot'])
            _require_same(robot, own, checkpoint, config)
            robot = robot or own
    if robot is None:
        raise ValueError(f'{config} has no section robot: give --checkpoint DIR too')
    if not isinstance(data, Mapping):
        raise ValueError(f'{config}: data must be a mapping, got {data!r}')
    return robot, read_dataclass(DataConfig, {**data, **_overrides(overrides)}, 'data')


def _yaml(path: Path) -> Mapping:
    try:
        document = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f'{path} cannot be read: {error}') from None
    if not isinstance(document, Mapping):
        raise ValueError(f'{path} must be a mapping')
    return document


def _require_same(robot: RobotSpec | None, own: RobotSpec, checkpoint, config) -> None:
    """ValueError that names the first difference of two robots."""
    if robot is None:
        return
    theirs, ours = to_plain(robot), to_plain(own)
    for key in theirs:
        if theirs[key] != ours[key]:
            raise ValueError(f'{checkpoint} is for another robot than {config}: {key} is '
                             f'{theirs[key]} in the checkpoint and {ours[key]} there')


def _overrides(texts) -> dict:
    names = [each.name for each in dataclasses.fields(DataConfig)]
    values = {}
    for text in texts:
        name, equals, value = text.partition('=')
        if not equals or name not in names:
            raise ValueError(f'--data {text}: write FIELD=VALUE ({known_or_hint(name, names)})')
        try:
            values[name] = yaml.safe_load(value) if value else ''
        except yaml.YAMLError as error:
            raise ValueError(f'--data {text}: {error}') from None
    return values
