"""What lies in a folder, and its episodes: rosbag2 and LeRobot data sets alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.training.bags import read_bag_pairs
from meanflow_ros.training.data_config import DataConfig
from meanflow_ros.training.episode import Episode, Skipped

BAG_MARK, LEROBOT_MARK = 'metadata.yaml', Path('meta', 'info.json')
BAG_FILES = ('.mcap', '.db3')
LISTED = 12


def is_bag(path: Path) -> bool:
    """Whether a directory is a rosbag2."""
    return (path / BAG_MARK).is_file()


def is_lerobot(path: Path) -> bool:
    """Whether a directory is the root of a LeRobot data set."""
    return (path / LEROBOT_MARK).is_file()


def find_recordings(directory: Path | str) -> list[Path]:
    """Return every rosbag2 and every LeRobot root in or below `directory`, sorted.

    ValueError if there is none; it lists what was found.
    """
    directory = Path(directory)
    if not directory.exists():
        raise ValueError(f'{directory} does not exist')
    found, others = [], []
    for place, folders, files in os.walk(directory):
        place = Path(place)
        if is_bag(place) or is_lerobot(place):
            found.append(place)
            folders.clear()
        elif len(others) < LISTED:
            folders.sort()
            others += sorted(files)
    if not found:
        loose = [name for name in others if name.endswith(BAG_FILES)]
        raise ValueError(
            f'no rosbag2 (a directory with {BAG_MARK}) and no LeRobot data set (with '
            f'{LEROBOT_MARK}) in or below {directory}; it holds '
            f'{", ".join(others[:LISTED]) or "no file"}'
            + (f'. {loose[0]} has lost its {BAG_MARK}: `ros2 bag reindex` makes one'
               if loose else ''))
    return sorted(found)


def read_episodes(path: Path | str, robot: RobotSpec, data: DataConfig, size: int,
                  part: tuple[int, int] = (0, 1)) -> Iterator[Episode | Skipped]:
    """Yield the episodes of one recording as training pairs, one at a time.

    size: of the pictures, size x size pixels. part: (i, n) reads the i-th of n shares of the
    recording; bags have but one. Memory holds one episode, whatever the size of the recording.
    """
    path = Path(path)
    if is_lerobot(path):
        yield from _lerobot_reader()(path, robot, data, size, part)
    elif part[0] == 0:
        yield from read_bag_pairs(path, robot, data, size)


def _lerobot_reader() -> Callable[..., Iterator[Episode | Skipped]]:
    try:
        from meanflow_ros.training.lerobot import read_lerobot
    except ImportError as error:
        raise ValueError(f'LeRobot data sets need packages that are not installed ({error}): '
                         f"pip install 'meanflow_ros[lerobot]'") from None
    return read_lerobot


def parts_of(path: Path, workers: int) -> int:
    """Return into how many shares a recording may be read by `workers` processes."""
    return workers if is_lerobot(path) else 1
