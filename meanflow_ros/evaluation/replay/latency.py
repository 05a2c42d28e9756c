"""How long an inference takes in the replay: fixed, measured here, or recorded elsewhere."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from meanflow_ros.core.contract import NANOSECONDS
from meanflow_ros.core.loading import how_it_runs, load, warm_up
from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions
from meanflow_ros.evaluation.bench.device import host_ms
from meanflow_ros.evaluation.bench.subjects import observations

UNITS_S = {'ns': 1e-9, 'us': 1e-6, 'ms': 1e-3, 's': 1.0}
MEASURED = 'measured'
FEWEST, MOST, MEASURE_S = 5, 100, 5.0      # inferences that are timed, and for how long
LONGEST_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Inference times to draw from. values_s: one or more, each 0 to LONGEST_S.

    source: where they come from, in words. runtime: how the network that was timed ran, if it was
    timed here. One value is a fixed latency.
    """

    values_s: tuple[float, ...]
    source: str
    runtime: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        values = np.array(self.values_s, np.float64)
        if values.ndim != 1 or not values.size:
            raise ValueError(f'latency ({self.source}): there is no value')
        if not (np.isfinite(values) & (values >= 0) & (values <= LONGEST_S)).all():
            raise ValueError(f'latency ({self.source}): every value must be 0 to {LONGEST_S:g} s, '
                             f'got {values[~((values >= 0) & (values <= LONGEST_S))][0]}')

    def typical_ns(self) -> int:
        """Return the median, which the node would use to plan ahead."""
        return round(float(np.median(self.values_s)) * NANOSECONDS)

    def draws(self, *seed: int) -> Callable[[], int]:
        """Return a function that draws a latency in ns; the same seed gives the same draws."""
        nanoseconds = np.rint(np.array(self.values_s) * NANOSECONDS).astype(np.int64)
        if len(nanoseconds) == 1:
            return lambda: int(nanoseconds[0])
        random = np.random.default_rng(seed)
        return lambda: int(random.choice(nanoseconds))


def fixed(text: str) -> Latency | None:
    """Read '80ms', '0.08s' or '0'; None if it is no duration."""
    match = re.fullmatch(r'([0-9]*\.?[0-9]+)\s*(ns|us|ms|s)', text.strip())
    if text.strip() in ('0', '0.0'):
        return Latency(values_s=(0.0,), source='fixed: none')
    if not match:
        return None
    return Latency(values_s=(float(match[1]) * UNITS_S[match[2]],), source=f'fixed: {text}')


def from_file(path: Path) -> Latency:
    """Read the latencies that `bench` has written; ValueError if they are not there."""
    try:
        document = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise ValueError(f'--latency {path}: it is no duration (80ms), not {MEASURED!r}, and '
                         f'there is no such file') from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'latency file {path} cannot be read: {error}') from None
    values = document.get('latencies_ms') if isinstance(document, dict) else document
    if not isinstance(values, list) or not all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise ValueError(f'latency file {path} must hold a list of numbers, latencies_ms')
    return Latency(values_s=tuple(value / 1e3 for value in values), source=f'file: {path.name}')


def measured(checkpoint: str, *, device: str = 'auto', dtype: str = 'auto', threads: int = 0,
             steps: int = 0, instruction: str = '') -> Latency:
    """Time single inferences on this machine, of the network as the node would run it.

    After a warm-up, on pictures of noise: MOST of them, or as many as MEASURE_S allows. device,
    dtype, threads: as the node's parameters. steps: NFE, 0 for the checkpoint's own.
    """
    policy = load(checkpoint, device=device, dtype=dtype, options=RuntimeOptions(threads=threads))
    try:
        steps = steps or policy.config.sampler_steps
        warm_up(policy, steps)
        observation = dataclasses.replace(observations(policy.robot, 1)[0],
                                          instruction=instruction or 'measure')
        values_ms = host_ms(lambda: policy.act(observation, steps=steps), MOST, warm_up=0,
                            limit_s=MEASURE_S, fewest=FEWEST)
        runtime = runtime_of(policy, steps)
    finally:
        policy.close()
    return Latency(values_s=tuple(value / 1e3 for value in values_ms), runtime=runtime, source=(
        f'measured here, the network alone on {runtime["device"]} in {runtime["dtype"]}, '
        f'{len(values_ms)} inferences'))


def runtime_of(policy: FastPolicy, steps: int) -> dict[str, str]:
    """Return where, in which numbers and how a policy runs, in words."""
    on_cpu = {'threads': str(torch.get_num_threads())} if policy.device.type == 'cpu' else {}
    return {'device': str(policy.device), 'dtype': str(policy.dtype).removeprefix('torch.'),
            'NFE': str(steps), **on_cpu, **how_it_runs(policy)}
