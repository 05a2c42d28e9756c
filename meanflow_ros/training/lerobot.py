"""LeRobot data sets on disk, versions 3.0, 2.1 and 2.0, read without the lerobot package.

A frame is an observation, and the action of a frame was due at its time. Version 3 keeps many
episodes in a file, version 2 one; pictures are in videos or, encoded, in the table. Layout:
src/lerobot/datasets of github.com/huggingface/lerobot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.ros.from_messages import compressed_image
from meanflow_ros.training.data_config import DataConfig
from meanflow_ros.training.episode import Episode, Skipped, make_relative, resize_picture

VERSIONS = ('v2.0', 'v2.1', 'v3.0')
DRIFT_FRAMES = 0.25


@dataclass(frozen=True, kw_only=True)
class _EpisodeFiles:
    """Where an episode lies; videos: feature -> (file, second of its first frame in it)."""

    number: int
    length: int
    table: Path
    videos: Mapping[str, tuple[Path, float]]


def read_lerobot(path: Path, robot: RobotSpec, data: DataConfig, size: int,
                 part: tuple[int, int] = (0, 1)) -> Iterator[Episode | Skipped]:
    """Yield the episodes of a LeRobot data set as training pairs; see `read_episodes`."""
    try:
        source = _Source(path, robot, data, size)
        episodes = source.episodes()
    except (ValueError, OSError, KeyError, pa.ArrowException) as error:
        if part[0] == 0:
            yield Skipped(name=path.name, reason=_text(error))
        return
    index, count = part
    for files in episodes[index * len(episodes) // count:(index + 1) * len(episodes) // count]:
        name = f'{path.name} episode {files.number}'
        try:
            yield source.read(name, files)
        except (ValueError, OSError, KeyError, pa.ArrowException) as error:
            yield Skipped(name=name, reason=_text(error))


def _text(error: Exception) -> str:
    return f'there is no {error}' if isinstance(error, KeyError) else str(error)


class _Source:
    """One data set and how its features become what the robot's policy needs."""

    def __init__(self, path: Path, robot: RobotSpec, data: DataConfig, size: int):
        data.require_cameras(robot)
        self._path, self._robot, self._data, self._size = path, robot, data, size
        with open(path / 'meta' / 'info.json', encoding='utf-8') as file:
            self._info = json.load(file)
        version = self._info.get('codebase_version')
        if version not in VERSIONS:
            raise ValueError(f'version {version!r} of LeRobot data sets cannot be read, only '
                             f'{", ".join(VERSIONS)}')
        self._is_v3 = version == 'v3.0'
        self._fps = float(self._info['fps'])
        self._features = self._info['features']
        self._stride = self._frames_per_step()
        self._cameras = [self._camera_feature(name) for name in robot.camera_names]
        self._action = self._columns(data.lerobot_action, robot.action_space.dimensions)
        self._state = (self._columns(data.lerobot_state, robot.state_names)
                       if robot.state_names else None)
        self._instructions = data.instructions_of(path)
        self._tasks = self._read_tasks()
        self._table: tuple[Path, pa.Table] | None = None

    def _frames_per_step(self) -> int:
        """Return how many frames lie between the steps of a chunk; ValueError if not a whole."""
        robot = self._robot
        frames = self._fps * robot.period_s
        drift = abs(frames - round(frames)) * (robot.horizon + robot.first_step)
        if round(frames) < 1 or drift > DRIFT_FRAMES:
            raise ValueError(
                f'{self._fps:g} fps do not fit the period of {robot.period_s:g} s: a step of the '
                f'chunk must take a whole number of frames, it takes {frames:.3f}; use period_s: '
                f'{max(1, round(frames)) / self._fps:.6g}')
        return round(frames)

    def _camera_feature(self, camera: str) -> str:
        feature = self._data.lerobot_images.get(camera, f'observation.images.{camera}')
        pictures = [key for key, value in self._features.items()
                    if value['dtype'] in ('video', 'image')]
        if feature not in pictures:
            raise ValueError(f'there are no pictures {feature!r} for camera {camera!r}, there '
                             f'are {", ".join(pictures) or "none"}; map them by lerobot_images')
        return feature

    def _columns(self, feature: str, wanted: Sequence[str]) -> tuple[str, list[int]]:
        """Return the feature and which of its numbers are `wanted`."""
        if feature not in self._features:
            raise ValueError(f'there is no feature {feature!r}, there are '
                             f'{", ".join(self._features)}')
        size = int(np.prod(self._features[feature]['shape']))
        names = _flat_names(self._features[feature].get('names'))
        if len(names) == size and set(wanted) <= set(names):
            return feature, [names.index(name) for name in wanted]
        if names and not self._data.lerobot_by_position:
            raise ValueError(f'feature {feature!r} has the names {names}, the robot has '
                             f'{list(wanted)}: name them alike, or set lerobot_by_position')
        if size != len(wanted):
            raise ValueError(f'feature {feature!r} has {size} numbers, the robot has '
                             f'{len(wanted)}: {list(wanted)}')
        return feature, list(range(size))

    def _read_tasks(self) -> dict[int, str]:
        if not self._is_v3:
            return {task['task_index']: task['task']
                    for task in _json_lines(self._path / 'meta' / 'tasks.jsonl')}
        table = pq.read_table(self._path / 'meta' / 'tasks.parquet')
        (text,) = [name for name in table.column_names if name != 'task_index']
        return dict(zip(table['task_index'].to_pylist(), table[text].to_pylist()))

    def episodes(self) -> list[_EpisodeFiles]:
        """Return where each episode lies, in their order."""
        rows = self._episode_rows() if self._is_v3 else list(
            _json_lines(self._path / 'meta' / 'episodes.jsonl'))
        found = [self._files(row) for row in rows]
        if not found:
            raise ValueError('the data set has no episode')
        return sorted(found, key=lambda files: files.number)

    def _episode_rows(self) -> list[dict]:
        rows = []
        for file in sorted((self._path / 'meta' / 'episodes').glob('*/*.parquet')):
            names = [name for name in pq.read_schema(file).names if name.startswith(
                ('episode_index', 'length', 'data/', 'videos/'))]
            rows += pq.read_table(file, columns=names).to_pylist()
        return rows

    def _files(self, row: Mapping) -> _EpisodeFiles:
        number, info = row['episode_index'], self._info
        chunk = number // info.get('chunks_size', 1000)
        videos = {}
        for key in self._cameras:
            if self._features[key]['dtype'] == 'video':
                where = ({'chunk_index': row[f'videos/{key}/chunk_index'],
                          'file_index': row[f'videos/{key}/file_index']} if self._is_v3
                         else {'episode_chunk': chunk, 'episode_index': number})
                start_s = row[f'videos/{key}/from_timestamp'] if self._is_v3 else 0.0
                videos[key] = (
                    self._path / info['video_path'].format(video_key=key, **where), start_s)
        where = ({'chunk_index': row['data/chunk_index'], 'file_index': row['data/file_index']}
                 if self._is_v3 else {'episode_chunk': chunk, 'episode_index': number})
        return _EpisodeFiles(number=number, length=row['length'], videos=videos,
                             table=self._path / info['data_path'].format(**where))

    # One episode

    def read(self, name: str, files: _EpisodeFiles) -> Episode:
        """Read and pair an episode; ValueError, OSError or KeyError for whatever is broken."""
        table, start = self._rows_of(files)
        count, robot = len(table), self._robot
        actions = _matrix(table, *self._action)
        states = _matrix(table, *self._state) if self._state else np.zeros((count, 0))
        for what, values in (('actions', actions), ('states', states)):
            if not np.isfinite(values).all():
                raise ValueError(f'{what} are not finite')
        instructions = self._instructions_of(name, table)
        steps = (robot.first_step + np.arange(robot.horizon)) * self._stride
        due = np.arange(count)[:, None] + steps                                # (N, T)
        used = int((due[:, 0] < count).sum())
        if not used:
            raise ValueError(f'{count} frames are too few for first_step {robot.first_step}')
        due, states = due[:used], states[:used]
        pictures = np.stack([self._pictures(key, files, start, used) for key in self._cameras],
                            axis=1)
        chunks = make_relative(actions[np.minimum(due, count - 1)], states,
                               self._data.relative_to(robot), robot.state_names)
        return Episode(name=name, instructions=tuple(instructions[:used]), pictures=pictures,
                       states=states, chunks=chunks, mask=due < count)

    def _rows_of(self, files: _EpisodeFiles) -> tuple[pa.Table, int]:
        """Return an episode's rows without the pictures, and where they begin in the file."""
        if self._table is None or self._table[0] != files.table:
            columns = ['episode_index', 'frame_index', 'task_index', self._action[0]]
            columns += [self._state[0]] if self._state else []
            self._table = files.table, pq.read_table(files.table,
                                                     columns=list(dict.fromkeys(columns)))
        table = self._table[1]
        rows = np.flatnonzero(table['episode_index'].to_numpy() == files.number)
        if len(rows) != files.length or np.any(np.diff(rows) != 1):
            raise ValueError(f'{files.table.name} has {len(rows)} rows of it, expected '
                             f'{files.length} in a row')
        table = table.slice(rows[0], len(rows))
        if np.any(table['frame_index'].to_numpy() != np.arange(len(rows))):
            raise ValueError('frames are missing: frame_index does not count from 0')
        return table, int(rows[0])

    def _instructions_of(self, name: str, table: pa.Table) -> list[str]:
        if self._instructions is not None:
            return [self._instructions.of(self._path.name, name)] * len(table)
        texts = [self._tasks.get(task, '').strip() for task in table['task_index'].to_pylist()]
        if not all(texts):
            raise ValueError(f'task {table["task_index"][texts.index("")]} has no text')
        return texts

    def _pictures(self, key: str, files: _EpisodeFiles, start: int, count: int) -> np.ndarray:
        frames = (video_frames(*files.videos[key], count, self._fps) if key in files.videos
                  else self._table_frames(key, files.table, start, count))
        return np.stack([resize_picture(frame, self._size) for frame in frames])

    def _table_frames(self, key: str, path: Path, start: int, count: int) -> Iterator[np.ndarray]:
        """Yield pictures that are stored, encoded, in the rows from `start` on."""
        with pq.ParquetFile(path) as file:
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < start + count and first + rows > start:
                    column = file.read_row_group(group, columns=[key])[key]
                    low, high = max(start - first, 0), min(start + count - first, rows)
                    for cell in column.slice(low, high - low).to_pylist():
                        yield self._decoded(cell)
                first += rows

    def _decoded(self, cell: Mapping) -> np.ndarray:
        data = cell.get('bytes') or (self._path / cell['path']).read_bytes()
        return compressed_image(SimpleNamespace(data=data, format='in the table'))


def video_frames(path: Path, start_s: float, count: int, fps: float) -> Iterator[np.ndarray]:
    """Yield `count` RGB frames (H, W, 3) uint8 of a video, from second `start_s` on.

    ValueError or OSError (of PyAV) if a frame is missing or the file cannot be decoded.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = 'NONE'   # one process per core decodes already
        container.seek(round((start_s + 0.25 / fps) / stream.time_base), stream=stream)
        number = 0
        for frame in container.decode(stream):
            at = round((frame.time - start_s) * fps)
            if at > number:
                break
            if at == number:
                yield frame.to_ndarray(format='rgb24')
                number += 1
                if number == count:
                    return
        raise ValueError(f'{path.name} has no frame at {start_s + number / fps:.3f} s')


def _matrix(table: pa.Table, feature: str, columns: Sequence[int]) -> np.ndarray:
    """Return columns of a feature as (N, D) float64."""
    values = table[feature].combine_chunks()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    if len(numbers) % len(table):
        raise ValueError(f'feature {feature!r} has rows of different lengths')
    return numbers.reshape(len(table), -1)[:, columns]


def _flat_names(names) -> list[str]:
    """Return the names of a feature, which LeRobot stores as a list or as a mapping to lists."""
    if isinstance(names, Mapping):
        values = list(names.values())
        return _flat_names(values[0] if len(values) == 1 else list(names))
    return [str(name) for name in names or ()]


def _json_lines(path: Path) -> Iterator[dict]:
    with open(path, encoding='utf-8') as file:
        yield from (json.loads(line) for line in file if line.strip())
