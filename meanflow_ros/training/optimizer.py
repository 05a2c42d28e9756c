"""AdamW with FLOWER's parameter groups and tri-stage schedule, and the averaged weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from meanflow_ros.core.policy import PolicyNetwork
from meanflow_ros.training.config import TrainConfig

_NO_DECAY = ('bias', 'norm', 'embed', 'null_context')


def freeze(network: PolicyNetwork, what: str) -> None:
    """Make trainable all but `what`: 'none', the 'vision' tower, or the whole 'encoder'."""
    network.requires_grad_(True)
    if what == 'vision':
        network.encoder.vision_tower.requires_grad_(False)
    elif what == 'encoder':
        network.encoder.requires_grad_(False)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trainable parameters: matrices decay; norms, biases and embeddings do not."""
    decayed, free = [], []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            plain = any(word in name.lower() for word in _NO_DECAY)
            (free if plain else decayed).append(parameter)
    return [{'params': decayed, 'weight_decay': weight_decay},
            {'params': free, 'weight_decay': 0.0}]


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW; `set_rate` gives it the learning rate of each step."""
    return torch.optim.AdamW(parameter_groups(network, config.weight_decay),
                             lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of `step` (from 0): a linear rise, a plateau, then half a cosine.

    FLOWER's tri-stage schedule; the stages are shares of the run.
    """
    peak, done = config.learning_rate, step / config.steps
    if done < config.warmup:
        return peak * (config.initial_rate + (1 - config.initial_rate) * done / config.warmup)
    fall = (done - config.warmup - config.hold) / max(1 - config.warmup - config.hold, 1e-9)
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(fall, 0.0), 1.0)))
    return peak * (config.final_rate + (1 - config.final_rate) * cosine)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of the optimiser the learning rate `rate`."""
    for group in optimizer.param_groups:
        group['lr'] = rate


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor, itself where it is not sharded."""
    return [tensor.to_local() if hasattr(tensor, 'to_local') else tensor for tensor in tensors]


class AveragedWeights:
    """The exponential moving average of the weights (EMA); young averages forget faster."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self._parameters, self._decay = list(parameters), decay
        self.values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 0)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(local(self.values), local(self._parameters), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the weights, for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        weights, averages = local(self._parameters), local(self.values)
        kept = [weight.detach().clone() for weight in weights]
        torch._foreach_copy_(weights, averages)
        torch._foreach_copy_(averages, kept)
