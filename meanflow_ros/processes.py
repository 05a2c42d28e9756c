"""Worker processes that never outlive the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

STOP_TIMEOUT_S = 10


@contextlib.contextmanager
def running(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Start the processes for the length of the block; whatever ends it ends them all."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(timeout=STOP_TIMEOUT_S)
            process.kill()
            process.join()
