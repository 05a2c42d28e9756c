"""The rows of the comparison: FLOWER's manner first, then one technique more in each row."""

from __future__ import annotations

import dataclasses
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
    FastPolicy behind it, or None. detailed: whether its stages are measured and its
    chunks checked.
    """

    name: str
    nfe: int
    act: Act
    policy: FastPolicy | None = None
    detailed: bool = False


def flower_rows(policy: Policy, example: Observation, *, compiled: bool,
                wanted: Callable[[str], bool]) -> Iterator[Technique]:
    """Yield the path in FLOWER's manner: eager, graphed, compiled, and both.

    policy: a rectified flow; its weights are put into its dtype and its blocks are compiled.
    wanted: whether a row of this name is.
    """
    hold_weights_as(policy.network, policy.dtype)
    for is_compiled in (False, True)[:1 + compiled]:
        if is_compiled:
            compile_blocks(policy.network)
        for graphed in (False, True)[:1 + (policy.device.type == 'cuda')]:
            words = ['compiled'] * is_compiled + ['graphed'] * graphed
            name = f'flower {" and ".join(words) or "eager"}'
            if wanted(name):
                path = FlowerPath(policy)
                path.prepare(example, graph=graphed)
                yield Technique(name=name, nfe=STEPS, act=path.act)
                path = None


def own_rows(policy: Policy, example: Observation, nfe: Sequence[int], *, compiled: bool,
             fp8: bool, options: RuntimeOptions,
             wanted: Callable[[str], bool]) -> Iterator[Technique]:
    """Yield Policy and FastPolicy: eager, then FastPolicy graphed, compiled, and with kernels.

    fp8: a row more with it; RuntimeError says why if it cannot be had.
    """
    for steps in sorted({STEPS, nfe[0]}, reverse=True) if wanted('policy eager') else ():
        yield Technique(name='policy eager', nfe=steps, act=_at(policy, steps))
    gpu = policy.device.type == 'cuda'
    plain = dataclasses.replace(options, graphs=False, compile=False, kernels=False)
    rows = {'fast eager': plain}
    if gpu:
        rows['fast graphed'] = dataclasses.replace(plain, graphs=True)
    if compiled:
        rows['fast compiled' + ' and graphed' * gpu] = dataclasses.replace(
            plain, graphs=gpu, compile=True)
    if gpu:
        rows['fast graphed with kernels'] = dataclasses.replace(plain, graphs=True, kernels=True)
    if fp8:
        rows['fast graphed with kernels and fp8' if gpu else 'fast fp8'] = dataclasses.replace(
            plain, graphs=gpu, kernels=gpu, fp8=True)
    for name, chosen in rows.items():
        if not wanted(name):
            continue
        fast = FastPolicy(policy, options=chosen)
        fast.warm_up(example, nfe)
        if chosen.fp8 and fast.why_not_fp8:
            fast.close()
            raise RuntimeError(f'{name}: {fast.why_not_fp8}')
        for steps in nfe if chosen.graphs or not gpu else nfe[:1]:
            yield Technique(name=name, nfe=steps, act=_at(fast, steps), policy=fast,
                            detailed=not gpu or chosen.compile or chosen.kernels)
        fast.close()
        fast = None
        release()


def _at(policy: Policy, steps: int) -> Act:
    return lambda observation: policy.act(observation, steps=steps)


def release() -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
