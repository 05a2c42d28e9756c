"""A checkpoint, on this machine: which device and numbers, ready to act, and how it runs."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import torch

from meanflow_ros.core.contract import Observation
from meanflow_ros.core.policy import DTYPES
from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions, multiplies_bfloat16

WARM_UP_RUNS = 5


def load(path: Path | str, *, device: str = 'auto', dtype: str = 'auto',
         options: RuntimeOptions = RuntimeOptions(), robot: str = '') -> FastPolicy:
    """Read a checkpoint as the node does; ValueError if it is for another robot than `robot`.

    device, dtype: see choose_device and choose_dtype. robot: '' for any.
    """
    chosen = choose_device(device)
    policy = FastPolicy.load(path, device=chosen, dtype=choose_dtype(dtype, chosen),
                             options=options)
    if robot and robot != policy.robot.robot:
        raise ValueError(f'checkpoint {path} is for robot {policy.robot.robot!r}, '
                         f'this node is for {robot!r}')
    return policy


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device; ValueError if it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == 'auto':
        return torch.device('cuda' if count else 'cpu')
    device = torch.device(name)
    if device.type == 'cuda' and (device.index or 0) >= count:
        raise ValueError(f'device {name!r} was asked for but PyTorch sees {count} CUDA GPUs; '
                         f'use device:=auto or device:=cpu')
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto`, `float32` or `bfloat16` into a dtype; auto is bfloat16 where that is fast.

    ValueError for any other name.
    """
    if name == 'auto':
        name = 'bfloat16' if multiplies_bfloat16(device) else 'float32'
    if name not in DTYPES:
        raise ValueError(f'dtype must be auto or one of {", ".join(DTYPES)}, got {name!r}')
    return DTYPES[name]


def warm_up(policy: FastPolicy, sampler_steps: int) -> list[float]:
    """Make everything ready that the first chunk needs; return latencies after that, seconds.

    sampler_steps: NFE, 0 for the checkpoint's own.
    """
    robot = policy.robot
    images = {camera.name: np.zeros((camera.height, camera.width, 3), np.uint8)
              for camera in robot.cameras}
    observation = Observation(stamp_ns=0, images=images, instruction='warm up',
                              state=np.zeros(len(robot.state_names)))
    steps = sampler_steps or policy.config.sampler_steps
    policy.warm_up(observation, [steps])
    latencies = []
    for _ in range(WARM_UP_RUNS):
        start = time.perf_counter()
        policy.act(observation, steps=steps)
        latencies.append(time.perf_counter() - start)
    return latencies


def how_it_runs(policy: FastPolicy) -> dict[str, str]:
    """Return why chunks are not computed by a CUDA graph, compiled blocks, our kernels or fp8."""
    return {what: why or 'yes' for what, why in (
        ('CUDA graph', policy.why_eager), ('compiled', policy.why_not_compiled),
        ('kernels', policy.why_no_kernels), ('fp8', policy.why_not_fp8),
        ('action network as one kernel', policy.why_not_one_kernel))}


def memory_mib(device: torch.device) -> float:
    """Return the memory that this process holds where the network runs, MiB."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
