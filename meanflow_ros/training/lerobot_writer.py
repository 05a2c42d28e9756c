"""The files of a LeRobot data set (version 3.0), written episode by episode.

Layout: src/lerobot/datasets of github.com/huggingface/lerobot. Memory holds one picture, the
numbers of one episode, and one row for each episode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meanflow_ros.core.contract import RobotSpec

CHUNKS_SIZE = 1000
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200
DATA_PATH = 'data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet'
VIDEO_PATH = 'videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4'
EPISODES_PATH = 'meta/episodes/chunk-000/file-000.parquet'
COUNTERS = ('frame_index', 'episode_index', 'index', 'task_index')
QUANTILES = {'q01': 0.01, 'q10': 0.1, 'q50': 0.5, 'q90': 0.9, 'q99': 0.99}
SAMPLE_ROWS = 20_000
STATISTICS_FRAMES, PIXEL_STRIDE = 8, 8
KEY_FRAME_EVERY = 2


class Picture(Protocol):
    """A picture that is read when it is needed; shape: (H, W, 3)."""

    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Return (H, W, 3) uint8 RGB."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The N frames of an episode: camera -> picture, states (N, P), actions (N, A), tasks."""

    pictures: Sequence[Mapping[str, Picture]]
    states: np.ndarray
    actions: np.ndarray
    tasks: tuple[str, ...]


class LeRobotWriter:
    """Writes episodes into the files of a data set; use it in a `with` statement."""

    def __init__(self, root: Path, robot: RobotSpec, crf: int):
        self._root, self._robot = root, robot
        self._fps = round(1 / robot.period_s)
        drift = abs(self._fps * robot.period_s - 1) * robot.horizon
        if self._fps < 1 or drift > 0.25:
            raise ValueError(f'period_s {robot.period_s:g} is not that of a whole number of '
                             f'frames per second, which LeRobot needs')
        self._videos = {camera: _VideoFiles(root, _key(camera), self._fps, crf)
                        for camera in robot.camera_names}
        self._table: pq.ParquetWriter | None = None
        self._table_file = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tasks: dict[str, int] = {}
        self._frame_count = 0
        self._statistics: dict[str, _Statistics] = {}
        self.episodes: list[dict] = []

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, *_) -> None:
        self._close_table()
        for video in self._videos.values():
            video.close()

    def write(self, frames: Frames) -> None:
        """Append an episode; ValueError, with nothing written, if its pictures vary in size."""
        self._require_one_size(frames)
        number, count = len(self.episodes), len(frames.tasks)
        row = {'episode_index': number, 'tasks': list(dict.fromkeys(frames.tasks)),
               'length': count, 'dataset_from_index': self._frame_count,
               'dataset_to_index': self._frame_count + count,
               'meta/episodes/chunk_index': 0, 'meta/episodes/file_index': 0}
        statistics = {}
        for camera, video in self._videos.items():
            statistics[_key(camera)] = one = _Statistics(3)
            every = max(1, count // STATISTICS_FRAMES)
            for at, pictures in enumerate(frames.pictures):
                picture = pictures[camera].read()
                video.write(picture, key_frame=at == 0)
                if at % every == 0:
                    one.add(picture[::PIXEL_STRIDE, ::PIXEL_STRIDE].reshape(-1, 3) / 255)
            row |= video.end_episode(count)
        row |= self._write_table(number, frames, statistics)
        for key, one in statistics.items():
            self._statistics.setdefault(key, _Statistics(one.size)).merge(one)
            row |= {f'stats/{key}/{name}': value for name, value in _shaped(key, one).items()}
        self._frame_count += count
        self.episodes.append(row)

    def _require_one_size(self, frames: Frames) -> None:
        shapes = self._shapes or {camera: picture.shape
                                  for camera, picture in frames.pictures[0].items()}
        for pictures in frames.pictures:
            for camera, picture in pictures.items():
                (height, width, _), (first_height, first_width, _) = picture.shape, shapes[camera]
                if (height, width) != (first_height, first_width):
                    raise ValueError(f'a picture of camera {camera!r} is {width}x{height}, before '
                                     f'they were {first_width}x{first_height}')
        self._shapes = shapes

    def _write_table(self, number: int, frames: Frames, statistics: dict) -> dict:
        count = len(frames.tasks)
        for task in frames.tasks:
            self._tasks.setdefault(task, len(self._tasks))
        columns = {'observation.state': frames.states} if self._robot.state_names else {}
        columns |= {
            'action': frames.actions,
            'timestamp': np.arange(count)[:, None] / self._fps,
            'frame_index': np.arange(count)[:, None],
            'episode_index': np.full((count, 1), number),
            'index': self._frame_count + np.arange(count)[:, None],
            'task_index': np.array([[self._tasks[task]] for task in frames.tasks])}
        for key, values in columns.items():
            statistics[key] = _Statistics(values.shape[1])
            statistics[key].add(values)
        table = pa.table({key: _column(values, pa.int64() if key in COUNTERS else pa.float32())
                          for key, values in columns.items()})
        path = self._root / DATA_PATH.format(**_place(self._table_file))
        if self._table and path.stat().st_size > DATA_FILE_MB * 2**20:
            self._close_table()
            self._table_file += 1
            path = self._root / DATA_PATH.format(**_place(self._table_file))
        if self._table is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._table = pq.ParquetWriter(path, table.schema)
        self._table.write_table(table)
        return {f'data/{name}': value for name, value in _place(self._table_file).items()}

    def _close_table(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None

    def finish(self) -> None:
        """Close all files and write what describes them."""
        self._close_table()
        for video in self._videos.values():
            video.close()
        path = self._root / EPISODES_PATH
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.episodes), path)
        _write_tasks(self._root / 'meta' / 'tasks.parquet', self._tasks)
        self._write_json('info', self._info())
        self._write_json('stats', {key: _shaped(key, one)
                                   for key, one in self._statistics.items()})

    def _write_json(self, name: str, document: dict) -> None:
        with open(self._root / 'meta' / f'{name}.json', 'w', encoding='utf-8') as file:
            json.dump(document, file, indent=4, ensure_ascii=False)

    def _info(self) -> dict:
        robot, count = self._robot, len(self.episodes)
        features = {}
        if robot.state_names:
            features['observation.state'] = _feature('float32', robot.state_names)
        features['action'] = _feature('float32', robot.action_space.dimensions)
        for camera, (height, width, _) in self._shapes.items():
            features[_key(camera)] = {
                'dtype': 'video', 'shape': [height, width, 3],
                'names': ['height', 'width', 'channels'],
                'info': {'video.height': height, 'video.width': width, 'video.codec': 'h264',
                         'video.pix_fmt': _pixel_format(height, width), 'video.channels': 3,
                         'video.is_depth_map': False, 'video.fps': self._fps,
                         'has_audio': False}}
        features['timestamp'] = {'dtype': 'float32', 'shape': [1], 'names': None}
        features |= {name: {'dtype': 'int64', 'shape': [1], 'names': None} for name in COUNTERS}
        return {'codebase_version': 'v3.0', 'robot_type': robot.robot, 'total_episodes': count,
                'total_frames': self._frame_count, 'total_tasks': len(self._tasks),
                'chunks_size': CHUNKS_SIZE, 'data_files_size_in_mb': DATA_FILE_MB,
                'video_files_size_in_mb': VIDEO_FILE_MB, 'fps': self._fps,
                'splits': {'train': f'0:{count}'}, 'data_path': DATA_PATH,
                'video_path': VIDEO_PATH, 'features': features}


class _VideoFiles:
    """The H.264 videos of one camera; a new file begins when one has become large."""

    def __init__(self, root: Path, key: str, fps: int, crf: int):
        self._root, self._key, self._fps, self._crf = root, key, fps, crf
        self._container = None
        self._file, self._frames, self._episode_start = 0, 0, 0

    def write(self, picture: np.ndarray, *, key_frame: bool) -> None:
        """Append a picture (H, W, 3) uint8 RGB."""
        if self._container is None:
            self._open(*picture.shape[:2])
        frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
        frame.pts, frame.time_base = self._frames, Fraction(1, self._fps)
        if key_frame:
            frame.pict_type = av.video.frame.PictureType.I
        self._container.mux(self._stream.encode(frame))
        self._frames += 1

    def _path(self) -> Path:
        return self._root / VIDEO_PATH.format(video_key=self._key, **_place(self._file))

    def _open(self, height: int, width: int) -> None:
        self._path().parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._path()), 'w')
        self._stream = self._container.add_stream('libx264', rate=self._fps, options={
            'crf': str(self._crf), 'g': str(KEY_FRAME_EVERY), 'preset': 'veryfast'})
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = _pixel_format(height, width)
        self._frames = self._episode_start = 0

    def end_episode(self, frames: int) -> dict:
        """Return where the episode lies, for its row in the table of episodes."""
        start, self._episode_start = self._episode_start, self._frames
        place = {**_place(self._file), 'from_timestamp': start / self._fps,
                 'to_timestamp': (start + frames) / self._fps}
        if self._path().stat().st_size > VIDEO_FILE_MB * 2**20:
            self.close()
            self._file += 1
        return {f'videos/{self._key}/{name}': value for name, value in place.items()}

    def close(self) -> None:
        """Write the end of the open file, if there is one."""
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._container = None


class _Statistics:
    """Running minimum, maximum, mean and deviation of rows (N, D), and a sample of bounded size.

    Quantiles are those of the sample.
    """

    def __init__(self, size: int):
        self.size, self.count = size, 0
        self._sum, self._squares = np.zeros(size), np.zeros(size)
        self._low, self._high = np.full(size, np.inf), np.full(size, -np.inf)
        self._sample = np.zeros((0, size))
        self._stride = 1

    def add(self, rows: np.ndarray) -> None:
        """Take rows (N, D)."""
        self._take(len(rows), rows.sum(0), np.square(rows, dtype=np.float64).sum(0),
                   rows.min(0), rows.max(0), rows)

    def merge(self, other: _Statistics) -> None:
        """Take what another has taken."""
        self._take(other.count, other._sum, other._squares, other._low, other._high, other._sample)

    def _take(self, count, total, squares, low, high, sample) -> None:
        self.count += count
        self._sum, self._squares = self._sum + total, self._squares + squares
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        self._sample = np.concatenate([self._sample, sample[::self._stride]])
        while len(self._sample) > SAMPLE_ROWS:
            self._sample, self._stride = self._sample[::2], self._stride * 2

    def values(self) -> dict[str, np.ndarray]:
        """Return name -> (D,), and the count (1,)."""
        mean = self._sum / self.count
        deviation = np.sqrt(np.maximum(self._squares / self.count - mean**2, 0))
        return {'min': self._low, 'max': self._high, 'mean': mean, 'std': deviation,
                'count': np.array([self.count]),
                **{name: np.quantile(self._sample, share, axis=0)
                   for name, share in QUANTILES.items()}}


def _shaped(key: str, statistics: _Statistics) -> dict[str, list]:
    """Return statistics as LeRobot stores them: (3, 1, 1) for pictures, else (D,)."""
    is_picture = key.startswith('observation.images.')
    return {name: (value[:, None, None] if is_picture and name != 'count' else value).tolist()
            for name, value in statistics.values().items()}


def _key(camera: str) -> str:
    return f'observation.images.{camera}'


def _feature(dtype: str, names: Sequence[str]) -> dict:
    return {'dtype': dtype, 'shape': [len(names)], 'names': list(names)}


def _place(file: int) -> dict[str, int]:
    return {'chunk_index': file // CHUNKS_SIZE, 'file_index': file % CHUNKS_SIZE}


def _pixel_format(height: int, width: int) -> str:
    return 'yuv444p' if height % 2 or width % 2 else 'yuv420p'   # 420 needs even sides


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return (N, D) as an Arrow column: lists of D numbers, plain numbers where D is 1."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1)).cast(kind, safe=False)
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(
        flat, values.shape[1])


def _write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """Write the tasks as pandas would a frame that is indexed by their text."""
    def column(name: str, pandas_type: str, numpy_type: str) -> dict:
        return {'name': name, 'field_name': name, 'pandas_type': pandas_type,
                'numpy_type': numpy_type, 'metadata': None}

    table = pa.table({'task_index': pa.array(list(tasks.values()), pa.int64()),
                      'task': pa.array(list(tasks), pa.string())})
    pandas = {'index_columns': ['task'], 'column_indexes': [],
              'columns': [column('task_index', 'int64', 'int64'),
                          column('task', 'unicode', 'object')],
              'creator': {'library': 'pyarrow', 'version': pa.__version__},
              'pandas_version': '2.0.0'}
    pq.write_table(table.replace_schema_metadata({'pandas': json.dumps(pandas)}), path)
