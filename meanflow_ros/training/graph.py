"""Run a training step as one CUDA graph: small networks wait for Python, not for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 3


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture `step` and return a function that replays it and gives the tensor it returned.

    `step` takes no input, reads and writes fixed tensors, never waits for the device, and sets
    gradients to None before it computes them. It runs WARM_UP_STEPS + 1 times here.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
