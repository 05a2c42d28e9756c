"""The training pairs of a cache, read through memory maps.

A cache is a directory of raw arrays and one index.json; `cache` builds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

FORMAT = 2
INDEX = 'index.json'
NUMBERS = {'states': np.float32, 'chunks': np.float32, 'executed': np.float32,
           'mask': np.bool_}
SAMPLE_ROWS = 200_000


def read_index(directory: Path) -> dict:
    """Return the index of a cache of any format; ValueError if there is no cache."""
    try:
        with open(directory / INDEX, encoding='utf-8') as file:
            index = json.load(file)
        if not isinstance(index, dict) or not {'format', 'fingerprint'} <= index.keys():
            raise ValueError(f'{INDEX} is of another kind')
    except (OSError, ValueError) as error:
        raise ValueError(f'{directory} is not a cache of training pairs ({error}), choose '
                         f'another directory') from None
    return index


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B training pairs, in physical units.

    pictures: (B, C, S, S, 3) uint8. state: (B, P) float32. chunk, executed: (B, T, A) float32.
    mask: (B, T) float32, 0 where the recording had ended. instruction: (B,) int64, index into
    `PairDataset.instructions`.
    """

    pictures: torch.Tensor
    state: torch.Tensor
    chunk: torch.Tensor
    executed: torch.Tensor
    mask: torch.Tensor
    instruction: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return field name -> tensor."""
        return dict(vars(self))


class PairDataset:
    """N training pairs of a cache, in the order of the episodes; memory-mapped, read-only.

    instructions: every text once, sorted. instruction_index: (N,) int32. states: (N, P) float32.
    chunks, executed: (N, T, A) float32. mask: (N, T) bool. episode_of_row: (N,) int32, index into
    `episode_names`. skipped: (name, reason) of what could not be used.
    """

    def __init__(self, directory: Path):
        index = read_index(directory)
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

        self.states, self.chunks, self.executed, self.mask = (
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
        batch.executed.numpy()[:] = self.executed[rows]
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
            executed=empty(self.executed.shape[1:], torch.float32),
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
