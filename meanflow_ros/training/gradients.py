"""The gradient of a part of a batch: as one CUDA graph where that works, step by step elsewhere.

Small networks, and forward derivatives of large ones, wait for Python and not for the GPU; a
graph takes Python out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from meanflow_ros.training.distributed import Group

WARM_UP_STEPS = 3


class Gradients:
    """Adds the gradient of a part's loss to the parameters and gives the loss.

    model: takes (batch, moving) and gives a scalar. captured: make a CUDA graph of each `moving`;
    every batch must then have the shapes of the first. group: the processes that share the
    gradients of a graph; what runs step by step is shared by the wrapper of the model.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], *, captured: bool,
                 scale: float = 1.0, group: Group | None = None):
        self._model, self._parameters, self._scale = model, parameters, scale
        self._captured, self._group = captured, group
        self._flat: Tensor | None = None
        self._graphs: dict[int, Callable[[Mapping[str, Tensor]], Tensor]] = {}

    def zero(self) -> None:
        """Set every gradient to zero in place."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def add(self, batch: Mapping[str, Tensor], moving: int, *, synchronize: bool = True) -> Tensor:
        """Return the scaled loss of the batch after its gradient was added.

        synchronize: False puts off the exchange between processes to a later part.
        """
        if not self._captured:
            return self._eager(batch, moving, synchronize)
        if moving not in self._graphs:
            before = [None if p.grad is None else p.grad.clone() for p in self._parameters]
            self._graphs[moving] = self._capture(batch, moving)
            for parameter, value in zip(self._parameters, before):
                parameter.grad.zero_() if value is None else parameter.grad.copy_(value)
        loss = self._graphs[moving](batch)
        if synchronize and self._flat is not None:
            self._group.average(self._flat)
        return loss

    def _eager(self, batch: Mapping[str, Tensor], moving: int, synchronize: bool) -> Tensor:
        with _exchange(self._model, synchronize):
            loss = self._model(batch, moving) * self._scale
            loss.backward()
        return loss.detach()

    def _capture(self, batch: Mapping[str, Tensor], moving: int):
        fixed = {name: value.clone() for name, value in batch.items()}
        # Graphs that were captured on one stream share the workspace of cuBLAS, so they must also
        # run on one: what is asked for on a stream of its own is captured there.
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._eager(fixed, moving, True)
        current.wait_stream(stream)
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._flat is None and self._group and self._group.size > 1:
            self._flat = in_one_tensor(self._parameters)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads may use the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
            value = self._eager(fixed, moving, True)

        def replay(batch: Mapping[str, Tensor]) -> Tensor:
            for name, tensor in batch.items():
                fixed[name].copy_(tensor, non_blocking=True)
            graph.replay()
            return value.clone()

        return replay


def in_one_tensor(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Make the gradients views of one tensor, which one exchange can average, and return it."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, flat.split(sizes)):
        parameter.grad = part.view_as(parameter)
    return flat


@contextlib.contextmanager
def _exchange(model: nn.Module, wanted: bool):
    """Let the processes exchange gradients in this block only if `wanted`."""
    if wanted:
        yield
    elif isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, 'set_requires_gradient_sync'):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield
