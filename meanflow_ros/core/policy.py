"""Policy: Observation -> ActionChunk, and the self-describing checkpoint directory.

A checkpoint is `policy.yaml` (all that a robot must know, read strictly), `model.safetensors`
and `tokenizer.json`. Nothing is unpickled and no code is loaded.
"""

from __future__ import annotations

import contextlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meanflow_ros.core import meanflow
from meanflow_ros.core.contract import (
    ActionChunk, ActionSpace, CameraSpec, Observation, RobotSpec, clean_instruction)
from meanflow_ros.core.dit import ActionDiT, Conditioning, DiTConfig
from meanflow_ros.core.encoder import EncoderConfig, FlorenceEncoder
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.prefix import checked_prefix, known_steps
from meanflow_ros.core.schema import check_keys, read_dataclass, read_yaml, to_plain
from meanflow_ros.core.storage import replaced_directory

FORMAT = 1
FILES = ('policy.yaml', 'model.safetensors', 'tokenizer.json', 'README.md')
MAX_STEPS = 64
SMALL_FILE_BYTES = 2**26
MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES = 2**22, 2**26
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be used; the message names what is wrong."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Everything in policy.yaml.

    prompt: template with `{instruction}`. sampler: one of meanflow.SAMPLERS, what the network's
    output is: average velocity, instantaneous velocity (euler), or the action itself (regression).
    sampler_steps: default NFE. relative_to: for each action dimension the state whose measured
    value is added to it, '' for none; empty if no dimension is relative. max_prefix: steps of a
    chunk that may be given as a prefix, 0 for a network that was not trained for it. training:
    free text on how it was made.
    """

    robot: RobotSpec
    action_normalizer: Normalizer
    state_normalizer: Normalizer | None
    encoder: EncoderConfig
    dit: DiTConfig
    prompt: str = '{instruction}'
    sampler_steps: int = 1
    sampler: str = 'average'
    relative_to: tuple[str, ...] = ()
    max_prefix: int = 0
    training: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self):
        space = self.robot.action_space
        if self.dit.action_spaces.get(space.name) != space.size:
            raise ValueError(f'dit.action_spaces must hold {space.name!r} with {space.size} '
                             f'dimensions, got {dict(self.dit.action_spaces)}')
        states = len(self.robot.state_names)
        if self.dit.state_sizes.get(space.name, 0) != states:
            raise ValueError(f'dit.state_sizes must give {space.name!r} the {states} states of '
                             f'the robot, got {dict(self.dit.state_sizes)}')
        if (self.state_normalizer.low.size if self.state_normalizer else 0) != states:
            raise ValueError(f'state_normalizer must have the {states} states of the robot')
        normalizer = self.action_normalizer
        if normalizer.low.size != space.size:
            raise ValueError(f'action_normalizer must have {space.size} dimensions, '
                             f'got {normalizer.low.size}')
        if self.relative_to and len(self.relative_to) != space.size:
            raise ValueError(f'relative_to must name a state or "" for each of {space.size} '
                             f'dimensions, got {list(self.relative_to)}')
        unknown = set(self.relative_to) - {'', *self.robot.state_names}
        if unknown:
            raise ValueError(f'relative_to names {sorted(unknown)[0]!r}, which is no state of the '
                             f'robot: {list(self.robot.state_names)}')
        absolute = np.array([not name for name in self.relative_to] or [True] * space.size)
        outside = absolute & ((normalizer.low < space.lower - 1e-9)
                              | (normalizer.high > space.upper + 1e-9))
        if outside.any():
            name = space.dimensions[int(np.argmax(outside))]
            raise ValueError(f'action_normalizer of {name!r} reaches outside its limits')
        if _template_fields(self.prompt) != {'instruction'}:
            raise ValueError(f'prompt must contain {{instruction}} and no other field, '
                             f'got {self.prompt!r}')
        if self.sampler not in meanflow.SAMPLERS:
            raise ValueError(f'sampler must be one of {list(meanflow.SAMPLERS)}, '
                             f'got {self.sampler!r}')
        if not 1 <= self.sampler_steps <= MAX_STEPS:
            raise ValueError(f'sampler_steps must be 1 to {MAX_STEPS}, got {self.sampler_steps}')
        if not 0 <= self.max_prefix < self.robot.horizon:
            raise ValueError(f'max_prefix must be 0 to {self.robot.horizon - 1}, less than the '
                             f'horizon, got {self.max_prefix}')


def _template_fields(template: str) -> set[str]:
    """Return the names in braces; ValueError for unbalanced braces."""
    try:
        return {name + spec for _, name, spec, _ in string.Formatter().parse(template)
                if name is not None}
    except ValueError as error:
        raise ValueError(f'prompt {template!r} is not a template: {error}') from None


class PolicyNetwork(nn.Module):
    """Encoder and DiT as one module: what is trained, saved and loaded."""

    def __init__(self, config: PolicyConfig, tokenizer: Tokenizer):
        super().__init__()
        self.encoder = FlorenceEncoder(config.encoder, tokenizer)
        self.dit = ActionDiT(config.dit, self.encoder.width)
        self.space_index = self.dit.spaces.index(config.robot.action_space.name)

    def condition(self, pixels: Tensor, ids: Tensor, mask: Tensor | None,
                  state: Tensor | None) -> Conditioning:
        """Encode a batch: pixels (B, C, 3, S, S), ids and mask (B, L), state (B, P)."""
        context, mask = self.encoder(pixels, ids, mask)
        space = torch.full((len(pixels),), self.space_index, device=pixels.device)
        return self.dit.condition(context, mask, state, space)

    def velocity(self, conditioning: Conditioning, x: Tensor | None = None,
                 given: Tensor | None = None) -> meanflow.Velocity:
        """Return u(z, t=, h=, rows=) for these observations, or for the slice `rows` of them.

        given: (B, T) bool, the steps of x (B, T, A) that are known, see `meanflow.with_prefix`.
        """
        def u(z: Tensor, *, t: Tensor, h: Tensor, rows: slice | None = None) -> Tensor:
            own = slice(None) if rows is None else rows
            some = conditioning if rows is None else conditioning.select(rows)
            return self.dit(z, t=t, h=h, conditioning=some,
                            given=None if given is None else given[own])
        return u if given is None else meanflow.with_prefix(u, x, given)


class Policy:
    """A trained network with everything needed to run it on a robot."""

    def __init__(self, config: PolicyConfig, network: PolicyNetwork, *,
                 dtype: torch.dtype = torch.float32):
        self.config = config
        self.network = network.eval().requires_grad_(False)
        self.dtype = dtype

    @property
    def robot(self) -> RobotSpec:
        """Return the robot that this policy was trained for."""
        return self.config.robot

    @property
    def device(self) -> torch.device:
        """Return the device that the network is on."""
        return next(self.network.parameters()).device

    @classmethod
    def create(cls, config: PolicyConfig, tokenizer: Tokenizer) -> 'Policy':
        """Make a policy with random weights."""
        return cls(config, PolicyNetwork(config, tokenizer))

    def noise(self, stamp_ns: int, seed: int) -> Tensor:
        """Draw the start of the flow (1, T, A) from the seed and the observation's stamp."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + stamp_ns) % 2**63)
        return torch.randn(1, self.robot.horizon, self.network.dit.action_size,
                           generator=generator)

    def act(self, observation: Observation, *, steps: int | None = None, seed: int = 0,
            noise: Tensor | None = None, prefix: np.ndarray | None = None) -> ActionChunk:
        """Return the chunk for an observation; the same input and seed give the same chunk.

        steps: NFE of the sampler, the checkpoint's own by default. noise: (1, T, A) in place of
        the seeded draw. prefix: (n, A) first steps of the chunk, in physical units; the rest
        continues them, and they come back as they are. Raises ValueError for a missing camera, a
        state of the wrong size, or a prefix of the wrong shape or longer than `max_prefix`.
        """
        return self.act_batch([observation], steps=steps, seeds=[seed], noise=noise,
                              prefixes=[prefix])[0]

    @torch.inference_mode()
    def act_batch(self, observations: Sequence[Observation], *, steps: int | None = None,
                  seeds: Sequence[int], noise: Tensor | None = None,
                  prefixes: Sequence[np.ndarray | None] = ()) -> list[ActionChunk]:
        """Return the chunk of each of B observations, all of one picture size.

        seeds: of the noise, one per observation. noise: (B, T, A) in place of the seeded draws.
        prefixes: one per observation, None or no steps for none. Raises ValueError as `act` does.
        """
        prefixes = [checked_prefix(prefix, self.robot, self.config.max_prefix)
                    for prefix in prefixes or [None] * len(observations)]
        pixels, ids, mask, state = self._inputs(observations)
        if noise is None:
            noise = torch.cat([self.noise(observation.stamp_ns, seed)
                               for observation, seed in zip(observations, seeds)])
        sampler = meanflow.SAMPLERS[self.config.sampler]
        with self._autocast():
            conditioning = self.network.condition(pixels, ids, mask, state)
            given = ()
            if any(map(len, prefixes)):
                given = [value.to(self.device) for value in self.known_steps(
                    prefixes, observations)]
            actions = sampler(self.network.velocity(conditioning, *given), noise.to(self.device),
                              steps=steps or self.config.sampler_steps)
        return [self.chunk(row, observation, prefix) for row, observation, prefix in zip(
            actions.double().cpu().numpy(), observations, prefixes)]

    def known_steps(self, prefixes: Sequence[np.ndarray],
                    observations: Sequence[Observation]) -> tuple[Tensor, Tensor]:
        """Return what `PolicyNetwork.velocity` takes: x (B, T, A) and which steps are given."""
        return known_steps(
            prefixes, np.stack([self._origin(observation) for observation in observations]),
            self.config.action_normalizer, horizon=self.robot.horizon,
            size=self.network.dit.action_size)

    def _origin(self, observation: Observation) -> np.ndarray:
        """Return what relative actions (A,) are relative to; 0 where they are not."""
        names = self.config.relative_to or [''] * self.robot.action_space.size
        return np.array([observation.state[self.robot.state_names.index(name)] if name else 0.0
                         for name in names])

    def _inputs(self, observations: Sequence[Observation]) -> tuple:
        """Return what the network takes: pixels, token ids, their mask, normalised states."""
        for name in self.robot.camera_names:
            if any(name not in observation.images for observation in observations):
                raise ValueError(f'the observation has no picture of camera {name!r}')
        encoder = self.network.encoder
        pixels = torch.stack([encoder.preprocess(np.stack([o.images[name] for o in observations]))
                              for name in self.robot.camera_names], dim=1)  # (B, C, 3, S, S)
        ids, mask = encoder.tokenize([self.config.prompt.format(
            instruction=clean_instruction(o.instruction)) for o in observations])
        return pixels, ids, mask, self._normalized_states(observations)

    def _normalized_states(self, observations: Sequence[Observation]) -> Tensor | None:
        names = self.robot.state_names
        if not names:
            return None
        for state in (observation.state for observation in observations):
            if state is None or state.shape != (len(names),):
                raise ValueError(f'the observation must have {len(names)} states {list(names)}, '
                                 f'got {None if state is None else state.shape}')
        values = self.config.state_normalizer.apply(np.stack([o.state for o in observations]))
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def chunk(self, actions: np.ndarray, observation: Observation,
              prefix: Sequence = ()) -> ActionChunk:
        """Turn the sampler's output (T, A) in [-1, 1] into physical units, relative ones too.

        prefix: (n, A) the first steps, which stand as they were given.
        """
        return self.physical_chunk(self.config.action_normalizer.invert(
            actions[:, :self.robot.action_space.size]), observation, prefix)

    def physical_chunk(self, actions: np.ndarray, observation: Observation,
                       prefix: Sequence = ()) -> ActionChunk:
        """Return the chunk of actions (T, A) in physical units, which it changes: see `chunk`."""
        robot = self.robot
        if self.config.relative_to:
            actions += self._origin(observation)
        if len(prefix):
            actions[:len(prefix)] = prefix
        return ActionChunk(actions=actions, stamp_ns=observation.stamp_ns,
                           period_s=robot.period_s, first_step=robot.first_step)

    def _autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def save(self, directory: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the checkpoint; weights are stored as `dtype` (bfloat16 halves the size).

        The directory is made beside its final name and then renamed, so that it is whole or
        absent; a checkpoint that exists is replaced. ValueError if it holds anything else.
        """
        directory = Path(directory).absolute()
        others = sorted(path.name for path in directory.glob('*') if path.name not in FILES)
        if others:
            raise ValueError(f'{directory} holds {others[0]!r}, which is no part of a checkpoint: '
                             f'choose a directory of its own')
        weights = {name: value.detach().to('cpu', dtype).contiguous()
                   for name, value in self.network.state_dict().items()}
        document = {'format': FORMAT, **to_plain(self.config)}
        with replaced_directory(directory) as partial:
            save_file(weights, partial / 'model.safetensors')
            (partial / 'model.safetensors').chmod(0o644)  # save_file makes it private
            self.network.encoder.tokenizer.save(str(partial / 'tokenizer.json'))
            with open(partial / 'policy.yaml', 'w', encoding='utf-8') as file:
                yaml.safe_dump(document, file, sort_keys=False, default_flow_style=None, width=99)

    @classmethod
    def load(cls, directory: Path | str, *, device: str | torch.device = 'cpu',
             dtype: torch.dtype = torch.float32, as_stored: bool = False) -> 'Policy':
        """Read a checkpoint; CheckpointError names the file and the key that is wrong.

        as_stored: leave the weights as they are in the file, which may stay mapped. Such a policy
        cannot act: it is for who makes something else of the weights.
        """
        directory = Path(directory)
        if not directory.is_dir():
            wrong = 'is no directory' if directory.exists() else 'does not exist'
            raise CheckpointError(f'checkpoint directory {directory} {wrong}; a checkpoint is the '
                                  f'directory that holds policy.yaml')
        for name in FILES[:3]:
            if not (directory / name).is_file():
                raise CheckpointError(f'checkpoint {directory} has no {name}')
        if len({(directory / name).resolve().parent for name in FILES[:3]}) > 1:
            raise CheckpointError(f'a link in checkpoint {directory} leads away from the other '
                                  f'files: put the file itself there')
        config = read_config(directory / 'policy.yaml')
        if (directory / 'tokenizer.json').stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f'{directory / "tokenizer.json"} is larger than '
                                  f'{MAX_TOKENIZER_BYTES} bytes')
        try:
            tokenizer = Tokenizer.from_file(str(directory / 'tokenizer.json'))
        except Exception as error:  # tokenizers raises a bare Exception for any bad file
            raise CheckpointError(f'{directory / "tokenizer.json"}: {error}') from None
        try:
            with NoRandomWeights():
                network = PolicyNetwork(config, tokenizer)
        except Exception as error:  # bad sizes raise errors of many kinds, transformers' own too
            raise CheckpointError(f'{directory / "policy.yaml"}: no network can be built '
                                  f'from these sizes: {error}') from None
        _load_weights(network, directory / 'model.safetensors', as_stored=as_stored)
        return cls(config, network.to(device), dtype=dtype)


class NoRandomWeights(TorchDispatchMode):
    """Networks made in here keep the memory that they got as it is: weights are to be read.

    It stands below torch.nn.init, which hides from a TorchFunctionMode what it calls.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return function(*args, **(kwargs or {}))
        return args[0] if isinstance(args[0], Tensor) else torch.empty(*args, **(kwargs or {}))


def _load_weights(network: nn.Module, path: Path, *, as_stored: bool) -> None:
    """Fill the network; CheckpointError for a truncated file, a wrong key or shape, or NaN.

    as_stored: give it the file's own tensors instead, float32 or bfloat16.
    """
    try:
        # load_file of safetensors 0.8 leaks 64 bytes a tensor; whole, a small file costs little.
        small = path.stat().st_size <= SMALL_FILE_BYTES
        weights = load(path.read_bytes()) if small else load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'{path} cannot be read, it may be truncated: {error}') from None
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(f'{path}: ' + '; '.join(
            f'{len(names)} {what} tensors, the first is {names[0]!r}'
            for names, what in ((missing, 'missing'), (unknown, 'unknown')) if names))
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise CheckpointError(f'{path}: tensor {name!r} has shape {tuple(value.shape)}, '
                                  f'policy.yaml asks for {tuple(own[name].shape)}')
        if value.dtype not in DTYPES.values():
            weights[name] = value = value.float()
        # A NaN is the least and the largest of all: 20 times as fast as isfinite, in no memory.
        if value.numel() and not all(map(torch.isfinite, value.aminmax())):
            raise CheckpointError(f'{path}: tensor {name!r} holds NaN or infinite weights')
    network.load_state_dict(weights, assign=as_stored)


def read_config(path: Path) -> PolicyConfig:
    """Read policy.yaml strictly; CheckpointError names the field that is wrong."""
    try:
        return _parse_config(read_yaml(path, MAX_CONFIG_BYTES))
    except ValueError as error:
        raise CheckpointError(f'{path}: {error}') from None


def read_robot(mapping) -> RobotSpec:
    """Build a RobotSpec from the `robot` section of a YAML file; ValueError names the field."""
    check_keys(mapping, ['cameras', 'action_space'], mapping, 'robot')
    if not isinstance(mapping['cameras'], (list, tuple)):
        raise ValueError(f'robot.cameras must be a list, got {mapping["cameras"]!r}')
    cameras = tuple(read_dataclass(CameraSpec, camera, f'robot.cameras[{i}]')
                    for i, camera in enumerate(mapping['cameras']))
    space = read_dataclass(ActionSpace, mapping['action_space'], 'robot.action_space')
    return read_dataclass(RobotSpec, {**mapping, 'cameras': cameras, 'action_space': space},
                          'robot')


def _parse_config(document) -> PolicyConfig:
    required = ['format', 'robot', 'action_normalizer', 'state_normalizer', 'encoder', 'dit']
    optional = ['prompt', 'sampler', 'sampler_steps', 'relative_to', 'max_prefix', 'training']
    check_keys(document, required, optional, 'policy.yaml')
    if document['format'] != FORMAT:
        raise ValueError(f'format {document["format"]!r} is not supported, this version '
                         f'reads format {FORMAT}')
    fields = {key: value for key, value in document.items() if key != 'format'}
    fields['robot'] = read_robot(fields['robot'])
    for key, cls in (('action_normalizer', Normalizer), ('state_normalizer', Normalizer),
                     ('encoder', EncoderConfig), ('dit', DiTConfig)):
        if fields[key] is not None or key != 'state_normalizer':
            fields[key] = read_dataclass(cls, fields[key], key)
    return read_dataclass(PolicyConfig, fields, 'policy.yaml')
