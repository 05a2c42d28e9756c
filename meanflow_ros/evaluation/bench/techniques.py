"""The rows of the comparison: FLOWER's manner first, then one technique more in each row."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from meanflow_ros.core.contract import Observation
from meanflow_ros.core.policy import Policy
from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions
from meanflow_ros.evaluation.bench.flower import (
    STEPS, FlowerPath, compile_blocks, hold_weights_as)

Act = Callable[[Observation], object]


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A row: what is run, and with how many network evaluations.

    name: 'flower ...' for the path in FLOWER's manner, 'fast ...' for FastPolicy. policy: the
    FastPolicy behind it, or None.
    """

    name: str
    nfe: int
    act: Act
    policy: FastPolicy | None = None


def flower_rows(policy: Policy, example: Observation, *, compiled: bool,
                backend: str = 'inductor') -> Iterator[Technique]:
    """Yield the path in FLOWER's manner: eager, graphed, compiled, and both.

    policy: a rectified flow; its weights are put into its dtype and its blocks are compiled.
    """
    hold_weights_as(policy.network, policy.dtype)
    for is_compiled in (False, True)[:1 + compiled]:
        if is_compiled:
            compile_blocks(policy.network, backend=backend)
        for graphed in (False, True)[:1 + (policy.device.type == 'cuda')]:
            path = FlowerPath(policy)
            path.prepare(example, graph=graphed)
            words = ['compiled'] * is_compiled + ['graphed'] * graphed
            yield Technique(name=f'flower {" and ".join(words) or "eager"}', nfe=STEPS,
                            act=path.act)
            path = None


def own_rows(policy: Policy, example: Observation, nfe: Sequence[int], *, compiled: bool,
             options: RuntimeOptions) -> Iterator[Technique]:
    """Yield Policy and FastPolicy: eager, then FastPolicy graphed, compiled, and both."""
    for steps in sorted({STEPS, nfe[0]}, reverse=True):
        yield Technique(name='policy eager', nfe=steps, act=_at(policy, steps))
    gpu = policy.device.type == 'cuda'
    for is_compiled in (False, True)[:1 + compiled]:
        for graphed in (False, True) if gpu else (False,):
            if is_compiled and gpu and not graphed:
                continue   # waits for Python: no faster than the row before
            fast = FastPolicy(policy, options=RuntimeOptions(
                dtype=options.dtype, compile=is_compiled, graphs=graphed,
                compile_cache=options.compile_cache, threads=options.threads))
            fast.warm_up(example, nfe)
            words = ['compiled'] * is_compiled + ['graphed'] * graphed
            for steps in nfe if graphed or not gpu else nfe[:1]:
                yield Technique(name=f'fast {" and ".join(words) or "eager"}', nfe=steps,
                                act=_at(fast, steps), policy=fast)
            fast.close()
            fast = None
            release()


def _at(policy: Policy, steps: int) -> Act:
    return lambda observation: policy.act(observation, steps=steps)


def release() -> None:
    """Give memory that nothing uses back to the device."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
