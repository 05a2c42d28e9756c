"""Export bags as a LeRobot data set (version 3.0), so that other policies can train on them.

Each episode becomes frames one period apart, from its first picture that has an action: the
picture and the state that the node would have seen then, and the action that was due. Pictures
keep their size. The data set is built under another name and renamed when it is whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from meanflow_ros.core.contract import NANOSECONDS, RobotSpec
from meanflow_ros.core.policy import read_robot
from meanflow_ros.core.schema import MAX_YAML_BYTES, read_dataclass, read_yaml
from meanflow_ros.training.bags import RecordedEpisode, read_bag
from meanflow_ros.training.data_config import DataConfig
from meanflow_ros.training.episode import Skipped, held_at, sample_actions
from meanflow_ros.training.lerobot_writer import Frames, LeRobotWriter
from meanflow_ros.training.recordings import find_recordings, is_bag

log = logging.getLogger('meanflow_ros.training')


def export(recordings: Sequence[Path], out: Path, robot: RobotSpec, data: DataConfig, *,
           crf: int = 18) -> list[Skipped]:
    """Write the episodes of bags as a LeRobot data set `out`; return what was skipped.

    crf: constant rate factor of the H.264 videos, 0 (lossless, large) to 51. ValueError if `out`
    exists, if the period is not that of a whole number of frames per second, or if nothing is
    usable. On an error or Ctrl-C nothing stays behind.
    """
    if out.exists():
        raise ValueError(f'{out} exists already, choose a new path')
    partial = out.absolute().with_name(f'.{out.name}.partial-{os.getpid()}')
    partial.mkdir(parents=True)
    skipped = []
    try:
        with LeRobotWriter(partial, robot, crf) as writer, \
                tempfile.TemporaryFile(dir=partial.parent) as file:
            spool = _Spool(file)
            for path in tqdm(recordings, 'exporting', unit='bag', file=sys.stderr):
                for recorded in read_bag(path, robot, data, spool.keep):
                    try:
                        if isinstance(recorded, Skipped):
                            raise ValueError(recorded.reason)
                        writer.write(frames_of(recorded, robot, data))
                    except ValueError as error:
                        skipped.append(Skipped(name=recorded.name, reason=str(error)))
                        log.warning('skipped %s: %s', recorded.name, error)
                    spool.clear()
            if not writer.episodes:
                raise ValueError('there is no usable episode: ' + '; '.join(
                    f'{entry.name}: {entry.reason}' for entry in skipped[:10]))
            writer.finish()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return skipped


@dataclass(frozen=True, kw_only=True)
class _SpooledPicture:
    """A picture that waits in a file, from `place` on."""

    file: BinaryIO
    place: int
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        self.file.seek(self.place)
        pixels = self.file.read(int(np.prod(self.shape)))
        return np.frombuffer(pixels, np.uint8).reshape(self.shape)


class _Spool:
    """The pictures of one episode, on disk: they may not fit into memory."""

    def __init__(self, file: BinaryIO):
        self._file, self._end = file, 0

    def keep(self, images: Mapping[str, np.ndarray]) -> dict[str, _SpooledPicture]:
        """Put pictures aside."""
        kept = {}
        for camera, picture in images.items():
            kept[camera] = _SpooledPicture(file=self._file, place=self._end, shape=picture.shape)
            self._file.seek(self._end)
            self._file.write(np.ascontiguousarray(picture).data)
            self._end += picture.nbytes
        return kept

    def clear(self) -> None:
        """Free the space of all pictures."""
        self._end = 0
        self._file.truncate(0)


def frames_of(recorded: RecordedEpisode, robot: RobotSpec, data: DataConfig) -> Frames:
    """Lay an episode on frames one period apart; ValueError if pictures stop in its middle."""
    period_ns = robot.period_s * NANOSECONDS
    stamps_ns = np.array([seen.stamp_ns for seen in recorded.observations], np.int64)
    _, known, recorded_then = sample_actions(recorded.actions, stamps_ns, robot)
    usable = np.flatnonzero(known & recorded_then)
    if not len(usable):
        raise ValueError(f'none of {len(stamps_ns)} observations has an action')
    start_ns = stamps_ns[usable[0]]
    end_ns = recorded.actions[0].end_ns() + period_ns / 2
    count = int((end_ns - start_ns) // period_ns) + 1
    times_ns = start_ns + np.rint(np.arange(count) * period_ns).astype(np.int64)
    shown = held_at(stamps_ns, times_ns, round(period_ns / 2))
    max_age_s = min(data.limits().max_age_of(f'camera/{name}') for name in robot.camera_names)
    fresh = times_ns - stamps_ns[shown] <= max_age_s * NANOSECONDS
    if not fresh.all():
        last = int(np.argmin(fresh))
        if fresh[last:].any():
            raise ValueError(f'pictures pause for more than {max_age_s:g} s (max_age_s)')
        times_ns, shown = times_ns[:last], shown[:last]
    actions, known, _ = sample_actions(recorded.actions, times_ns, robot)
    if not known.all():
        raise ValueError('an action is missing within the episode')
    seen = [recorded.observations[row] for row in shown]
    return Frames(pictures=[one.pictures for one in seen], actions=actions,
                  tasks=tuple(one.instruction for one in seen),
                  states=np.stack([np.zeros(0) if one.state is None else one.state
                                   for one in seen]))


def _read_sections(path: Path) -> tuple[RobotSpec, DataConfig]:
    document = read_yaml(path, MAX_YAML_BYTES)
    if not isinstance(document, Mapping) or 'robot' not in document:
        raise ValueError(f'{path} has no section `robot`')
    return (read_robot(document['robot']),
            read_dataclass(DataConfig, document.get('data') or {}, f'{path}: data'))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='export_lerobot',
        description='Export bags as a LeRobot data set (v3.0), so that other policies can train '
                    'on the same recordings.',
        epilog='example: export_lerobot recordings/ my_dataset --config train.yaml')
    parser.add_argument('recordings', type=Path, help='a rosbag2 directory, or a folder of them')
    parser.add_argument('out', type=Path, help='data set to write; must not exist')
    parser.add_argument('--config', type=Path, required=True,
                        help='training YAML: its sections `robot` and `data` say which topics '
                             'are read and how episodes are cut; frames are period_s apart')
    parser.add_argument('--crf', type=int, default=18, metavar='0..51',
                        help='quality of the H.264 videos, lower is better (default 18)')
    return parser.parse_args(argv)


def _interrupted(*_) -> None:
    """Interrupt once: a second Ctrl-C would interrupt the clean-up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `export_lerobot` command."""
    logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')
    arguments = _parse(argv)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupted)
        robot, data = _read_sections(arguments.config)
        bags = [path for path in find_recordings(arguments.recordings) if is_bag(path)]
        if not bags:
            raise ValueError(f'{arguments.recordings} holds LeRobot data sets, but no bag')
        skipped = export(bags, arguments.out, robot, data, crf=arguments.crf)
    except (OSError, ValueError) as error:
        print(f'export_lerobot: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('export_lerobot: interrupted, nothing was written', file=sys.stderr)
        return 130
    with open(arguments.out / 'meta' / 'info.json', encoding='utf-8') as file:
        info = json.load(file)
    print(f'{arguments.out}: {info["total_episodes"]} episodes, {info["total_frames"]} frames at '
          f'{info["fps"]} fps, {info["total_tasks"]} instructions; {len(skipped)} skipped')
    return 0


if __name__ == '__main__':
    sys.exit(main())
