"""Training pairs on disk, decoded once, and read back through memory maps.

A cache is a directory of raw arrays and one index.json, written last. It is built under another
name and renamed when it is whole, so that a cache is complete or absent. A fingerprint of
everything that went in decides whether an existing one is used again.
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
from meanflow_ros.training.data_config import DataConfig, find_instruction_file
from meanflow_ros.training.episode import Skipped
from meanflow_ros.training.recordings import find_recordings, parts_of, read_episodes  # noqa: F401

log = logging.getLogger('meanflow_ros.training')

FORMAT = 1
INDEX = 'index.json'
SAMPLE_ROWS = 200_000
REASONS_SHOWN = 10
NUMBERS = {'states': np.float32, 'chunks': np.float32, 'mask': np.bool_}
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
    index = _read_index(directory)
    return index['format'] == FORMAT and index['fingerprint'] == digest


def _read_index(directory: Path) -> dict:
    try:
        with open(directory / INDEX, encoding='utf-8') as file:
            index = json.load(file)
        if not isinstance(index, dict) or not {'format', 'fingerprint'} <= index.keys():
            raise ValueError(f'{INDEX} is of another kind')
    except (OSError, ValueError) as error:
        raise ValueError(f'{directory} is not a cache of training pairs ({error}), choose '
                         f'another directory') from None
    return index


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
    running = workers
    try:
        for process in processes:
            process.start()
        while running:
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
            running -= kind == 'done'
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join(timeout=10)
                process.kill()
                process.join()


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
    shapes = {'states': [len(robot.state_names)],
              'chunks': [robot.horizon, robot.action_space.size], 'mask': [robot.horizon]}
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


# Reading


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B training pairs, in physical units.

    pictures: (B, C, S, S, 3) uint8. state: (B, P) float32. chunk: (B, T, A) float32.
    mask: (B, T) float32, 0 where the recording had ended. instruction: (B,) int64, index into
    `PairDataset.instructions`.
    """

    pictures: torch.Tensor
    state: torch.Tensor
    chunk: torch.Tensor
    mask: torch.Tensor
    instruction: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return field name -> tensor."""
        return dict(vars(self))


def open_cache(directory: Path | str) -> PairDataset:
    """Open a cache; ValueError if it is none, or damaged."""
    return PairDataset(Path(directory))


class PairDataset:
    """N training pairs of a cache, in the order of the episodes; memory-mapped, read-only.

    instructions: every text once, sorted. instruction_index: (N,) int32. states: (N, P) float32.
    chunks: (N, T, A) float32. mask: (N, T) bool. episode_of_row: (N,) int32, index into
    `episode_names`. skipped: (name, reason) of what could not be used.
    """

    def __init__(self, directory: Path):
        index = _read_index(directory)
        if index['format'] != FORMAT:
            raise ValueError(f'{directory} has format {index["format"]!r}, this version reads '
                             f'{FORMAT}: build it again')
        self.fingerprint: str = index['fingerprint']
        self.instructions: list[str] = index['instructions']
        self.episode_names: list[str] = [episode[0] for episode in index['episodes']]
        self.skipped: list[tuple[str, str]] = [tuple(pair) for pair in index['skipped']]
        self._shard_of_episode, first_in_shard, self._rows_of_episode = np.array(
            [episode[1:] for episode in index['episodes']], np.int64).T
        self._first_row = np.cumsum(self._rows_of_episode) - self._rows_of_episode
        self._to_shard = first_in_shard - self._first_row
        self._length = int(self._rows_of_episode.sum())
        size, cameras = index['size'], len(index['cameras'])
        self.picture_shape = (cameras, size, size, 3)

        def mapped(name: str, dtype, shape: Sequence[int], rows: int) -> np.ndarray:
            return _map(directory / f'{name}.raw', dtype, (rows, *shape))

        self.states, self.chunks, self.mask = (
            mapped(name, dtype, index['shapes'][name], self._length)
            for name, dtype in NUMBERS.items())
        self.episode_of_row = mapped('episode_of_row', np.int32, (), self._length)
        self.instruction_index = mapped('instruction_index', np.int32, (), self._length)
        self._pictures = {
            int(shard): mapped(f'pictures-{shard:03d}', np.uint8, self.picture_shape, int(
                self._rows_of_episode[self._shard_of_episode == shard].sum()))
            for shard in np.unique(self._shard_of_episode)}

    def __len__(self) -> int:
        return self._length

    @property
    def picture_bytes(self) -> int:
        """Return the bytes that all pictures take."""
        return self._length * int(np.prod(self.picture_shape))

    def gather_into(self, rows: np.ndarray, batch: Batch) -> None:
        """Fill a batch of CPU tensors with `rows` (B,)."""
        rows = np.asarray(rows, np.int64)
        episodes = self.episode_of_row[rows]
        self._gather_pictures(rows, episodes, batch.pictures.numpy())
        batch.state.numpy()[:] = self.states[rows]
        batch.chunk.numpy()[:] = self.chunks[rows]
        batch.mask.numpy()[:] = self.mask[rows]
        batch.instruction.numpy()[:] = self.instruction_index[rows]

    def _gather_pictures(self, rows, episodes, pictures: np.ndarray) -> None:
        shards = self._shard_of_episode[episodes]
        places = rows + self._to_shard[episodes]
        for at, (shard, place) in enumerate(zip(shards.tolist(), places.tolist())):
            pictures[at] = self._pictures[shard][place]

    def gather(self, rows: np.ndarray) -> Batch:
        """Return `rows` (B,) as CPU tensors; IndexError for a row that there is not."""
        batch = self.empty_batch(len(rows))
        self.gather_into(rows, batch)
        return batch

    def empty_batch(self, rows: int, *, pin: bool = False) -> Batch:
        """Return uninitialised CPU tensors for `rows` pairs, page-locked if `pin`."""
        def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((rows, *shape), dtype=dtype, pin_memory=pin)

        return Batch(
            pictures=empty(self.picture_shape, torch.uint8),
            state=empty(self.states.shape[1:], torch.float32),
            chunk=empty(self.chunks.shape[1:], torch.float32),
            mask=empty(self.mask.shape[1:], torch.float32),
            instruction=empty((), torch.int64))

    def split(self, validation_share: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows for training and for validation, by whole episodes.

        Every episode of the validation share lies evenly in the sorted order; the same cache
        gives the same split. ValueError for a share outside [0, 1), or that leaves nothing to
        train on.
        """
        if not 0 <= validation_share < 1:
            raise ValueError(f'the validation share must be in [0, 1), got {validation_share}')
        count = len(self.episode_names)
        held_out = round(count * validation_share)
        if validation_share > 0 and count > 1:
            held_out = min(max(held_out, 1), count - 1)
        chosen = np.zeros(count, bool)
        if held_out:
            chosen[((np.arange(held_out) + 0.5) * count / held_out).astype(int)] = True
        is_validation = chosen[self.episode_of_row]
        return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)

    def sample(self, rows: np.ndarray | None = None,
               limit: int = SAMPLE_ROWS) -> tuple[np.ndarray, np.ndarray]:
        """Return states (M, P) and actions (K, A), evenly chosen, for statistics.

        rows: which to choose from, all by default. M is at most `limit`; the actions are those
        steps of the chosen chunks that were recorded, at most `limit` of them.
        """
        count = self._length if rows is None else len(rows)
        chosen = np.unique(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))
        chosen = chosen if rows is None else np.asarray(rows)[chosen]
        some = max(1, -(-len(chosen) * self.mask.shape[1] // limit))
        actions = self.chunks[chosen[::some]][self.mask[chosen[::some]]]
        return self.states[chosen], actions


def _map(path: Path, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Map a raw file; ValueError if its size is not that of `shape`."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise ValueError(f'the cache is damaged, delete it: {error}') from None
    if actual != expected:
        raise ValueError(f'the cache is damaged, delete it: {path} has {actual} bytes, '
                         f'expected {expected}')
    if expected == 0:
        return np.zeros(shape, dtype)
    return np.asarray(np.memmap(path, dtype, mode='r', shape=shape))
