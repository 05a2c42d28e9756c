"""Which times a loss is trained at: named distributions of (t, r), drawn for a whole batch.

Convention: t = 1 is noise, 0 <= r <= t <= 1. The samples that need a derivative (r < t) come
first, so that a loss can leave the others out of it; observations are drawn independently, so
which of them comes first says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BETA_CUTOFF = 0.999


@dataclass(frozen=True, kw_only=True)
class Times:
    """t and r, each (B,) float32; samples `moving` and later have r = t."""

    t: Tensor
    r: Tensor
    moving: int


def _logit_normal(batch: int, mean: float, std: float, generator) -> Tensor:
    return torch.sigmoid(torch.randn(batch, generator=generator) * std + mean)


def uniform(batch: int, generator: torch.Generator) -> Tensor:
    """Draw stratified uniform times (B,): one shift of B equal spacings, as FLOWER's `uniform`."""
    shift = torch.rand(1, generator=generator)
    spaced = (shift + torch.arange(batch) / batch) % (1 - 1e-5)
    return spaced[torch.randperm(batch, generator=generator)]


def logit_normal(batch: int, generator: torch.Generator) -> Tensor:
    """Draw sigmoid(N(0, 1)), FLOWER's `ln` (Esser et al. 2024, arXiv 2403.03206)."""
    return _logit_normal(batch, 0.0, 1.0, generator).clamp(max=BETA_CUTOFF)


def beta(batch: int, generator: torch.Generator) -> Tensor:
    """Draw from Beta(1.5, 1), as pi-zero does: more often near noise (arXiv 2410.24164)."""
    return (torch.rand(batch, generator=generator) ** (1 / 1.5)).clamp(max=BETA_CUTOFF)


def high_noise(batch: int, generator: torch.Generator) -> Tensor:
    """Draw for one Euler step: t = 1 for half of the samples, Beta(4, 1) for the others.

    One step asks the network at t = 1 alone; the others keep several steps usable.
    """
    t = torch.rand(batch, generator=generator) ** (1 / 4)
    return torch.where(torch.rand(batch, generator=generator) < 0.5, 1.0, t)


def sorted_logit_normal(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw two independent sigmoid(N(-0.4, 1)), sorted (arXiv 2505.13447, section 4.3)."""
    a, b = _logit_normal(2 * batch, -0.4, 1.0, generator).view(2, batch)
    return torch.maximum(a, b), torch.minimum(a, b)


def published_v1(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw t = sigmoid(N(-0.6, 1.6)), r = min(t, sigmoid(N(-4, 1.6))): the published v1.

    Gsunshine/py-meanflow, with the settings of its best CIFAR-10 run: r is mostly near 0.
    """
    t = _logit_normal(batch, -0.6, 1.6, generator)
    return t, torch.minimum(t, _logit_normal(batch, -4.0, 1.6, generator))


SINGLE = {'uniform': uniform, 'logit_normal': logit_normal, 'beta': beta,
          'high_noise': high_noise}
PAIRS = {'sorted': sorted_logit_normal, 'v1': published_v1}


def sample_single(name: str, batch: int, generator: torch.Generator) -> Times:
    """Draw times with r = t from one of SINGLE."""
    t = SINGLE[name](batch, generator)
    return Times(t=t, r=t, moving=0)


def sample_pairs(name: str, batch: int, generator: torch.Generator, *,
                 data_proportion: float = 0.75, one_step_proportion: float = 0.0) -> Times:
    """Draw (t, r) from one of PAIRS.

    The last round(data_proportion * B) samples get r = t. The first round(one_step_proportion
    * B) get (1, 0), the pair that one-step inference asks for and that the samplers almost
    never give; they never take more than what has r < t.
    """
    t, r = PAIRS[name](batch, generator)
    moving = batch - round(data_proportion * batch)
    one_step = min(round(one_step_proportion * batch), moving)
    index = torch.arange(batch)
    t = torch.where(index < one_step, 1.0, t)
    r = torch.where(index < one_step, 0.0, torch.where(index < moving, r, t))
    return Times(t=t, r=r, moving=moving)
