"""Clocks, ceilings and graphs of the device that is measured."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

CAPTURE_WARM_UP = 3
CEILING_ROUNDS = 20
PROFILED_RUNS = 5


def describe(device: torch.device) -> dict[str, object]:
    """Return what the figures were measured on."""
    found = {'device': str(device), 'torch': torch.__version__, 'cpu': _cpu_name(),
             'python': platform.python_version(), 'threads': torch.get_num_threads()}
    if device.type == 'cuda':
        found |= {'gpu': torch.cuda.get_device_name(device), 'cuda': torch.version.cuda}
    return found


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.machine()


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Return what replays `run` as a CUDA graph on the current stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def host_ms(run: Callable[[], object], runs: int, *, warm_up: int, limit_s: float = 1e9,
            fewest: int = 20) -> list[float]:
    """Time `run` by the host's clock: `runs` times, or fewer where limit_s is over before."""
    begin = time.perf_counter()
    for _ in range(warm_up):
        run()
        if time.perf_counter() - begin > limit_s:
            break
    gc.collect()
    gc.freeze()
    values, begin = [], time.perf_counter()
    try:
        while len(values) < runs and (len(values) < fewest
                                      or time.perf_counter() - begin < limit_s):
            start = time.perf_counter()
            run()
            values.append((time.perf_counter() - start) * 1e3)
    finally:
        gc.unfreeze()
    return values


def device_ms(run: Callable[[], object], runs: int, *, warm_up: int,
              device: torch.device) -> list[float]:
    """Time `run`, which only enqueues work, by the device's clock."""
    if device.type != 'cuda':
        return host_ms(run, runs, warm_up=warm_up)
    for _ in range(warm_up):
        run()
    values = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        values.append(start.elapsed_time(end))
    return values


def summary(values_ms: list[float]) -> dict[str, float]:
    """Return the percentiles of times in ms."""
    p50, p95, p99 = np.percentile(values_ms, [50, 95, 99])
    return {'p50': round(p50, 4), 'p95': round(p95, 4), 'p99': round(p99, 4),
            'max': round(max(values_ms), 4), 'runs': len(values_ms)}


def kernels(run: Callable[[], object], device: torch.device) -> tuple[dict[str, float], str]:
    """Return how long kernels run and how many there are in one run, and a table of them."""
    if device.type != 'cuda':
        return {}, ''
    activities = [torch.profiler.ProfilerActivity.CUDA]
    run()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_RUNS):
            run()
        torch.cuda.synchronize(device)
    rows = [row for row in profile.key_averages()
            if row.device_type == torch.autograd.DeviceType.CUDA]
    rows.sort(key=lambda row: -row.self_device_time_total)
    lines = [f'{"us a run":>10} {"launches":>9} {"us each":>8}  kernel']
    lines += [f'{row.self_device_time_total / PROFILED_RUNS:10.1f} '
              f'{row.count / PROFILED_RUNS:9.1f} {row.self_device_time_total / row.count:8.2f}  '
              f'{row.key[:120]}' for row in rows]
    return ({'gpu_busy_ms': round(sum(row.self_device_time_total for row in rows)
                                  / PROFILED_RUNS / 1e3, 4),
             'kernels': round(sum(row.count for row in rows) / PROFILED_RUNS)},
            '\n'.join(lines) + '\n')


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the bandwidth of a large copy, read and written, and the rate of matrix products."""
    gpu = device.type == 'cuda'
    source = torch.empty(2**30 if gpu else 2**27, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = min(device_ms(lambda: target.copy_(source), CEILING_ROUNDS, warm_up=3, device=device))
    size = 8192 if gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = min(device_ms(lambda: a @ b, CEILING_ROUNDS, warm_up=3, device=device))
    return {'bandwidth_tb_s': round(2 * source.numel() / copy / 1e9, 4),
            'matrix_tflop_s': round(2 * size**3 / product / 1e9, 3)}
