"""A function that runs in a process and session of its own, to be interrupted or killed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm


def start(function, *arguments, errors: Path):
    """Fork, and call the function there with its stderr in a file; return the process.

    Its exit code is what the function returns, 130 if it lets a KeyboardInterrupt pass.
    """
    process = multiprocessing.get_context('fork').Process(
        target=_run, args=(function, arguments, errors))
    process.start()
    return process


def _run(function, arguments, errors: Path) -> None:
    gc.freeze()   # what the parent left is not to be collected here: its threads are missing
    tqdm.set_lock(threading.RLock())   # the parent's is shared: who is killed with it keeps it
    os.setsid()
    torch.set_num_threads(1)  # OpenMP's other threads do not survive a fork
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 2)
    sys.stderr = os.fdopen(2, 'w', closefd=False)
    try:
        sys.exit(function(*arguments))
    except KeyboardInterrupt:
        sys.exit(130)


def wait_until_alone(session: int, timeout_s: float = 10.0) -> None:
    """Wait until every process of a session has ended."""
    end = time.monotonic() + timeout_s
    while any(_is_of(entry.name, session) for entry in Path('/proc').iterdir()
              if entry.name.isdigit()):
        assert time.monotonic() < end, 'a worker has outlived its parent'
        time.sleep(0.05)


def _is_of(pid: str, session: int) -> bool:
    try:
        fields = Path('/proc', pid, 'stat').read_text().rpartition(')')[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[3]) == session and fields[0] != 'Z'
