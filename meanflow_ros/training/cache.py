"""Training pairs on disk, decoded once from recordings; `pairs` reads them.

A cache is built under another name and renamed when it is whole, so that it is complete or
absent. A fingerprint of everything that went in decides whether an existing one is used again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import queue
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.core.schema import to_plain
from meanflow_ros.processes import running
from meanflow_ros.training.data_config import DataConfig, find_instruction_file
from meanflow_ros.training.episode import Skipped
from meanflow_ros.training.pairs import FORMAT, INDEX, NUMBERS, PairDataset, read_index
from meanflow_ros.training.recordings import parts_of, read_episodes

log = logging.getLogger('meanflow_ros.training')

REASONS_SHOWN = 10
WORKER_CHECK_S = 0.5
Progress = Callable[[str, int, str | None], None]


def fingerprint(paths: Sequence[Path], robot: RobotSpec, data: DataConfig, size: int) -> str:
    """Return a digest of the recordings (path, size, mtime) and of how they are read."""
    recordings = []
    for path in map(Path, paths):
        files = [path] if path.is_file() else sorted(p for p in path.rglob('*') if p.is_file())
        if data.instruction_file:
            with contextlib.suppress(ValueError):  # reading names it
                files.append(find_instruction_file(data.instruction_file, path))
        recordings.append([str(path.resolve())] + [
            [str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    document = json.dumps([FORMAT, recordings, to_plain(robot), to_plain(data), size])
    return hashlib.sha256(document.encode()).hexdigest()


def build_cache(paths: Sequence[Path | str], robot: RobotSpec, data: DataConfig, size: int,
                directory: Path | str, workers: int = 1,
                progress: Progress | None = None) -> None:
    """Decode the recordings into the cache `directory`, unless it holds just that already.

    workers: processes that read and write; with one, it happens here. progress: called for each
    episode with its name, its count of rows, and the reason if it is skipped. Another process
    that builds the same cache is waited for. ValueError if nothing is usable, with the reasons,
    or if `directory` holds something else; OSError if the disk is full; RuntimeError if a worker
    dies. Whatever happens, no half cache stays behind as `directory`.
    """
    directory = Path(directory).absolute()
    paths = sorted(map(Path, paths))
    digest = fingerprint(paths, robot, data, size)
    progress = progress or _no_progress
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f'.{directory.name}.partial')
    with _sole_builder(partial):
        if _is_current(directory, digest):
            return
        try:
            _build(paths, robot, data, size, partial, workers, progress, digest)
            if directory.exists():
                shutil.rmtree(directory)
            partial.rename(directory)
        except OSError as error:
            raise _explained(error, directory) from error


def _no_progress(name: str, rows: int, reason: str | None) -> None:
    pass


def _explained(error: OSError, directory: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(error.errno, f'the disk is full, the cache {directory} was not written; '
                                    f'choose another place for it or a smaller image_size')
    return error


def _is_current(directory: Path, digest: str) -> bool:
    """Whether the cache is there and made from the same; ValueError if it is no cache at all."""
    if not directory.exists() or not any(directory.iterdir()):
        return False
    index = read_index(directory)
    return index['format'] == FORMAT and index['fingerprint'] == digest


@contextlib.contextmanager
def _sole_builder(partial: Path) -> Iterator[None]:
    """Own the directory `partial`, empty; wait for a process that owns it.

    The lock lies on the directory itself and ends with its process, however that ends.
    """
    while True:
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info('waiting for the process that builds %s', partial)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if not _is_same(partial, handle):
                continue  # it was renamed or removed while we waited
            for entry in partial.iterdir():
                entry.unlink()
            try:
                yield
            finally:
                if _is_same(partial, handle):
                    shutil.rmtree(partial, ignore_errors=True)
            return
        finally:
            os.close(handle)


def _is_same(path: Path, handle: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def open_cache(directory: Path | str) -> PairDataset:
    """Open a cache; ValueError if it is none, or damaged."""
    return PairDataset(Path(directory))


# Writing


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One share of one recording; `number` gives its place in the order of the episodes."""

    number: int
    path: Path
    part: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What every writer needs to know."""

    robot: RobotSpec
    data: DataConfig
    size: int
    directory: Path


class _ShardWriter:
    """Appends episodes to the files of one writer; numbers and pictures apart."""

    def __init__(self, plan: _Plan, shard: int):
        self._plan, self._shard, self._rows = plan, shard, 0
        self._files = {name: open(plan.directory / f'{name}-{shard:03d}.raw', 'wb')
                       for name in ('pictures', *NUMBERS)}

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def write(self, job: _Job) -> Iterator[dict]:
        """Write a job's episodes; yield the index entry of each, or of one that is skipped."""
        plan = self._plan
        for number, episode in enumerate(read_episodes(job.path, plan.robot, plan.data, plan.size,
                                                       job.part)):
            entry = {'name': episode.name, 'order': [job.number, number, job.part[0]]}
            if isinstance(episode, Skipped):
                yield {**entry, 'reason': episode.reason}
                continue
            self._files['pictures'].write(np.ascontiguousarray(episode.pictures).data)
            for name, dtype in NUMBERS.items():
                values = np.ascontiguousarray(getattr(episode, name), dtype)
                self._files[name].write(values.tobytes())
            for file in self._files.values():
                file.flush()
            yield {**entry, 'shard': self._shard, 'first_row': self._rows, 'rows': len(episode),
                   'instructions': _runs(episode.instructions)}
            self._rows += len(episode)


def _runs(instructions: Sequence[str]) -> list[list]:
    """Return [instruction, count] for each run of equal instructions."""
    runs: list[list] = []
    for text in instructions:
        if runs and runs[-1][0] == text:
            runs[-1][1] += 1
        else:
            runs.append([text, 1])
    return runs


def _build(paths, robot, data, size, partial: Path, workers: int, progress: Progress,
           digest: str) -> None:
    jobs = [(path, (part, parts_of(path, workers)))
            for path in paths for part in range(parts_of(path, workers))]
    jobs = [_Job(number=number, path=path, part=part) for number, (path, part) in enumerate(jobs)]
    plan = _Plan(robot=robot, data=data, size=size, directory=partial)
    workers = max(1, min(workers, len(jobs)))
    entries = []
    for entry in _entries_here(plan, jobs) if workers == 1 else _entries(plan, jobs, workers):
        progress(entry['name'], entry.get('rows', 0), entry.get('reason'))
        entries.append(entry)
    entries.sort(key=lambda entry: (entry['order'][0], entry['order'][1]))
    _write_index(plan, entries, digest)


def _entries_here(plan: _Plan, jobs: Sequence[_Job]) -> Iterator[dict]:
    with _ShardWriter(plan, 0) as writer:
        for job in jobs:
            yield from writer.write(job)


def _entries(plan: _Plan, jobs: Sequence[_Job], workers: int) -> Iterator[dict]:
    """Yield the index entries as `workers` processes make them."""
    context = multiprocessing.get_context('spawn')
    waiting, results = context.Queue(), context.Queue()
    for job in jobs:
        waiting.put(job)
    for _ in range(workers):
        waiting.put(None)
    processes = [context.Process(target=_work, args=(plan, shard, waiting, results), daemon=True)
                 for shard in range(workers)]
    working = workers
    with running(processes):
        while working:
            try:
                kind, value = results.get(timeout=WORKER_CHECK_S)
            except queue.Empty:
                failed = [p.exitcode for p in processes if p.exitcode]
                if failed:
                    raise RuntimeError(f'a worker has ended with exit code {failed[0]}; if it '
                                       f'ran out of memory, use fewer workers') from None
                continue
            if kind == 'entry':
                yield value
            elif kind == 'error':
                raise value
            working -= kind == 'done'


def _work(plan: _Plan, shard: int, waiting, results) -> None:
    """Be a worker process: Ctrl-C is the parent's, and a parent that is gone ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parent = multiprocessing.parent_process()
    torch.set_num_threads(1)
    try:
        with _ShardWriter(plan, shard) as writer:
            for job in iter(waiting.get, None):
                for entry in writer.write(job):
                    if not parent.is_alive():
                        return
                    results.put(('entry', entry))
        results.put(('done', None))
    except (OSError, ValueError) as error:
        results.put(('error', error))


def _write_index(plan: _Plan, entries: Sequence[dict], digest: str) -> None:
    """Bring the numbers of all shards into the order of the episodes, then write the index."""
    used = [entry for entry in entries if 'reason' not in entry]
    skipped = [[entry['name'], entry['reason']] for entry in entries if 'reason' in entry]
    if not used:
        more = len(skipped) - REASONS_SHOWN
        raise ValueError('there is no usable episode: ' + '; '.join(
            f'{name}: {reason}' for name, reason in skipped[:REASONS_SHOWN])
            + (f'; and {more} more' if more > 0 else ''))
    robot, directory = plan.robot, plan.directory
    chunk = [robot.horizon, robot.action_space.size]
    shapes = {'states': [len(robot.state_names)], 'chunks': chunk, 'executed': chunk,
              'mask': [robot.horizon]}
    for name, dtype in NUMBERS.items():
        row = int(np.prod(shapes[name])) * np.dtype(dtype).itemsize
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(open(directory / f'{name}.raw', 'wb'))
            source = functools.cache(lambda shard, name=name: stack.enter_context(
                open(directory / f'{name}-{shard:03d}.raw', 'rb')))
            for entry in used:
                file = source(entry['shard'])
                file.seek(entry['first_row'] * row)
                target.write(file.read(entry['rows'] * row))
    for path in directory.glob('*-[0-9][0-9][0-9].raw'):
        if not path.name.startswith('pictures-'):
            path.unlink()
    texts = sorted({text for entry in used for text, _ in entry['instructions']})
    number = {text: at for at, text in enumerate(texts)}
    with open(directory / 'episode_of_row.raw', 'wb') as episodes, \
            open(directory / 'instruction_index.raw', 'wb') as instructions:
        for at, entry in enumerate(used):
            episodes.write(np.full(entry['rows'], at, np.int32).tobytes())
            for text, count in entry['instructions']:
                instructions.write(np.full(count, number[text], np.int32).tobytes())
    index = {
        'format': FORMAT, 'fingerprint': digest, 'size': plan.size,
        'cameras': list(robot.camera_names), 'shapes': shapes, 'instructions': texts,
        'episodes': [[e['name'], e['shard'], e['first_row'], e['rows']] for e in used],
        'skipped': skipped}
    with open(directory / INDEX, 'w', encoding='utf-8') as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())
