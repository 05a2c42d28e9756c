"""The random numbers of a training step: all of them follow from (seed, step) alone.

They are drawn on the CPU for the whole batch and then shared out, so that a run goes on bit for
bit after an interruption and does not depend on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meanflow_ros.core.times import PAIRS, sample_pairs, sample_single
from meanflow_ros.training.config import TrainConfig

CHANGES = ('shift', 'gain', 'bias')
_ROWS, _NOISE = 0, 1   # streams of their own, so that a change in one leaves the other alone


def _generator(config: TrainConfig, step: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(((config.seed * 2 + stream) << 32) + step)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of each batch this is: observations index, index + count, index + 2 count, ..."""

    index: int = 0
    count: int = 1

    def of(self, values):
        """Return this part of what has one row per observation."""
        return values[self.index::self.count]


def draw_rows(config: TrainConfig, step: int, rows: np.ndarray, share: Share) -> np.ndarray:
    """Return the rows of the data set that `share` of the batch of `step` holds."""
    pick = torch.randint(len(rows), (config.batch_size,), generator=_generator(
        config, step, _ROWS))
    return rows[share.of(pick.numpy())]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Noise, times and changes of the pictures, for B observations with N draws each.

    e: (N * B, T, A), draw by draw. t, r: (N * B,); samples `moving` and later have r = t.
    prefix: (N * B,) int64, how many steps are given; None if that is always 0. dropped: (B,)
    bool, the condition is left out. shift: (B, C, 2) in pixels of the encoder's
    picture; gain: (B, C, 3), bias: (B, C), as `augment` takes them.
    """

    e: Tensor
    t: Tensor
    r: Tensor
    dropped: Tensor
    shift: Tensor
    gain: Tensor
    bias: Tensor
    moving: int
    prefix: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return everything but `moving`, which is the same in every step."""
        prefix = {} if self.prefix is None else {'prefix': self.prefix}
        return prefix | {name: getattr(self, name) for name in ('e', 't', 'r', 'dropped',
                                                                *CHANGES)}


def draw_changes(config: TrainConfig, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random CHANGES of the pictures of `count` observations, on the generator's device."""
    cameras = len(config.robot.cameras)

    def signed(*shape):
        return torch.rand(*shape, generator=generator, device=generator.device) * 2 - 1

    return {'shift': signed(count, cameras, 2) * config.shift_pixels,
            'gain': 1 + signed(count, cameras, 3) * config.colour,
            'bias': signed(count, cameras) * config.colour * 128}


def draw_prefixes(longest: int, count: int, generator: torch.Generator) -> Tensor:
    """Return lengths of prefixes (count,): 0 for half of them on average, else 1 to `longest`."""
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    return lengths * (torch.rand(count, generator=generator) < 0.5)


def draw(config: TrainConfig, step: int, share: Share) -> Draws:
    """Return the random numbers of `share` of the batch of `step`."""
    generator = _generator(config, step, _NOISE)
    batch, draws = config.batch_size, config.noise_samples
    name = config.time_sampling
    if config.loss in ('rf', 'l1'):
        times = sample_single(name or 'uniform', draws * batch, generator)
    else:
        times = sample_pairs(name or next(iter(PAIRS)), draws * batch, generator,
                             data_proportion=config.data_proportion,
                             one_step_proportion=config.one_step_proportion)
    e = torch.randn(draws * batch, config.robot.horizon, config.robot.action_space.size,
                    generator=generator)
    changes = draw_changes(config, batch, generator)
    dropped = torch.rand(batch, generator=generator) < config.condition_dropout
    prefix = (draw_prefixes(config.max_prefix, draws * batch, generator) if config.max_prefix
              else None)

    def own(values: Tensor) -> Tensor:                             # (N * B, ...) -> (N * b, ...)
        return values.view(draws, batch, *values.shape[1:])[
            :, share.index::share.count].flatten(0, 1).contiguous()

    return Draws(e=own(e), t=own(times.t), r=own(times.r),
                 prefix=None if prefix is None else own(prefix),
                 dropped=share.of(dropped).contiguous(),
                 **{name: share.of(values).contiguous() for name, values in changes.items()},
                 moving=int((own(torch.arange(draws * batch)) < times.moving).sum()))
