"""Batches on the device, gathered ahead of the step that needs them."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from meanflow_ros.training.pairs import Batch, PairDataset

RESIDENT_SHARE = 0.25
UPLOAD_ROWS = 1024
Rows = Callable[[int], np.ndarray]


class Loader:
    """An endless iterator of the batches of step start_step, start_step + 1, ...; close() it.

    rows: step -> rows of the dataset (B,); it is called once for each step, in order, in the
    caller's thread. A batch depends on its rows alone. ahead: how many batches are gathered
    before they are asked for, by `threads` threads. resident: whether all pictures are held on
    the device, so that nothing but row numbers is copied in a step; None does so if they take
    less than a quarter of the GPU's free memory, and not on a CPU. What goes wrong in a thread
    is raised by `next`.
    """

    def __init__(self, dataset: PairDataset, rows: Rows, device: torch.device | str,
                 start_step: int = 0, ahead: int = 3, threads: int = 2,
                 resident: bool | None = None):
        if ahead < 1 or threads < 1:
            raise ValueError(f'ahead and threads must be at least 1, got {ahead} and {threads}')
        device = torch.device(device)
        if resident is None:
            resident = _fits(dataset, device)
        self.resident = resident
        source = _Resident if resident else _Streamed if device.type == 'cuda' else _Host
        self._gather = source(dataset, device).gather
        self._rows, self._step = rows, start_step
        self._ready: deque[Future] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix='loader')
        try:
            for _ in range(ahead):
                self._submit()
        except BaseException:
            self.close()
            raise

    def _submit(self) -> None:
        rows = np.asarray(self._rows(self._step), np.int64)
        self._ready.append(self._pool.submit(self._gather, rows))
        self._step += 1

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if not self._ready:
            raise StopIteration
        batch = self._ready.popleft().result()
        self._submit()
        return batch() if callable(batch) else batch

    def close(self) -> None:
        """End the threads; the iterator ends too."""
        self._ready.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _fits(dataset: PairDataset, device: torch.device) -> bool:
    if device.type != 'cuda':
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return dataset.picture_bytes <= RESIDENT_SHARE * free


class _Host:
    """Batches of CPU tensors, from the memory map."""

    def __init__(self, dataset: PairDataset, device: torch.device):
        self.gather = dataset.gather


class _Streamed:
    """Batches copied to a GPU on a stream of their own, from page-locked buffers used again."""

    def __init__(self, dataset: PairDataset, device: torch.device):
        self._dataset, self._device = dataset, device
        self._stream = torch.cuda.Stream(device)
        self._free: deque[tuple[Batch, torch.cuda.Event]] = deque()  # buffer, end of its copy
        self._lock = threading.Lock()

    def gather(self, rows: np.ndarray) -> Callable[[], Batch]:
        host = self._buffer(len(rows))
        self._dataset.gather_into(rows, host)
        with torch.cuda.stream(self._stream):
            on_device = Batch(**{name: tensor.to(self._device, non_blocking=True)
                                 for name, tensor in host.tensors().items()})
            copied = self._stream.record_event()
        with self._lock:
            self._free.append((host, copied))
        return functools.partial(_hand_over, on_device, copied)

    def _buffer(self, rows: int) -> Batch:
        with self._lock:
            host, copied = self._free.popleft() if self._free else (None, None)
        if host is None or len(host.mask) != rows:
            return self._dataset.empty_batch(rows, pin=True)
        copied.synchronize()
        return host


def _hand_over(batch: Batch, arrived: torch.cuda.Event) -> Batch:
    """Make the consumer's stream wait for the copy, and keep its memory until it is used."""
    stream = torch.cuda.current_stream(batch.mask.device)
    stream.wait_event(arrived)
    for tensor in batch.tensors().values():
        tensor.record_stream(stream)
    return batch


class _Resident:
    """Batches gathered on the device, where the whole dataset lies."""

    def __init__(self, dataset: PairDataset, device: torch.device):
        rows = len(dataset)
        self._all = Batch(**{name: torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype,
                                               device=device)
                             for name, tensor in dataset.empty_batch(0).tensors().items()})
        for start in range(0, rows, UPLOAD_ROWS):
            part = dataset.gather(np.arange(start, min(start + UPLOAD_ROWS, rows)))
            for name, tensor in part.tensors().items():
                self._all.tensors()[name][start:start + UPLOAD_ROWS] = tensor
        self._device = device

    def gather(self, rows: np.ndarray) -> Callable[[], Batch]:
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._all.mask):
            raise IndexError(f'rows must be 0 to {len(self._all.mask) - 1}')
        return functools.partial(self._select, torch.from_numpy(rows))

    def _select(self, rows: torch.Tensor) -> Batch:
        if self._device.type == 'cuda':
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        return Batch(**{name: tensor[rows] for name, tensor in self._all.tensors().items()})
