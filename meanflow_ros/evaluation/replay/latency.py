"""How long an inference takes in the replay: fixed, measured here, or recorded elsewhere."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, Observation, RobotSpec

UNITS_S = {'ns': 1e-9, 'us': 1e-6, 'ms': 1e-3, 's': 1.0}
MEASURED = 'measured'
WARM_UP, RUNS = 3, 15
LONGEST_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Inference times to draw from. values_s: one or more, each 0 to LONGEST_S.

    source: where they come from, in words. One value is a fixed latency.
    """

    values_s: tuple[float, ...]
    source: str

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


def measured(act: Callable, robot: RobotSpec, instruction: str) -> Latency:
    """Time single inferences on this machine, after a warm-up, with pictures of noise."""
    random = np.random.default_rng(0)
    observation = Observation(
        stamp_ns=0, instruction=instruction or 'measure', state=np.zeros(len(robot.state_names)),
        images={camera.name: random.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
                for camera in robot.cameras})
    values = []
    for _ in range(WARM_UP + RUNS):
        start = time.perf_counter()
        act([observation], [0])
        values.append(time.perf_counter() - start)
    return Latency(values_s=tuple(values[WARM_UP:]), source=f'measured here, {RUNS} inferences')
