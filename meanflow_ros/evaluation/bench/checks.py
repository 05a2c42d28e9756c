"""Whether the fast path gives the right chunks: agreement, repeats, and what switches leave."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from meanflow_ros.core.contract import Observation
from meanflow_ros.core.policy import Policy
from meanflow_ros.core.runtime import FastPolicy



def difference(a: Policy, b: Policy, observations: list[Observation], steps: int) -> float:
    """Return the largest difference of two policies' chunks in normalised units."""
    apply = a.config.action_normalizer
    return max(float(np.abs(_raw(apply, a.act(o, steps=steps).actions)
                            - _raw(apply, b.act(o, steps=steps).actions)).max())
               for o in observations)


def _raw(normalizer, actions: np.ndarray) -> np.ndarray:
    """Return actions in normalised units, without clipping."""
    return (actions - normalizer.low) / (normalizer.high - normalizer.low) * 2 - 1


def repeats_differ(policy: Policy, observations: list[Observation], *, rounds: int) -> int:
    """Return how many of `rounds` repeated chunks are not the first one's bits."""
    first = [policy.act(o, seed=5).actions.tobytes() for o in observations]
    return sum(policy.act(observations[i % len(first)], seed=5).actions.tobytes()
               != first[i % len(first)] for i in range(rounds))


def switches(policy: FastPolicy, observations: list[Observation],
             nfe: list[int], *, count: int) -> dict[str, float]:
    """Change instruction and NFE `count` times; return the device memory left over, MiB."""
    def held() -> float:
        if policy.device.type != 'cuda':
            return 0.0
        torch.cuda.synchronize(policy.device)
        return torch.cuda.memory_allocated(policy.device) / 2**20

    def change(number: int) -> None:
        observation = observations[number % len(observations)]
        policy.act(dataclasses.replace(
            observation, instruction=f'{observation.instruction} {number % 97}'),
            steps=nfe[number % len(nfe)])

    for number in range(200):   # what is kept on purpose is there after that
        change(number)
    before, eager = held(), 0
    for number in range(count):
        change(number)
        eager += bool(policy.why_eager)
    return {'switches': count, 'left_over_mib': round(held() - before, 3),
            'computed_eagerly': eager}
