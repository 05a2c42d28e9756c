"""What a run has so far: one file per replayed episode, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.replay.replay_bag import BagReport
from meanflow_ros.ros.bag_files import storage_files

MARK, REPORT = 'of.txt', 'report.json'


class Parts:
    """The episodes of one bag below `directory`, made with settings of one fingerprint.

    Parts of other settings, or of another recording at the same place, are thrown away.
    """

    def __init__(self, directory: Path, bag: Path, fingerprint: str):
        self._directory = directory / key_of(bag)
        mark, text = self._directory / MARK, f'{fingerprint} {state_of(bag)}'
        if not (mark.is_file() and mark.read_text() == text):
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(parents=True)
            mark.write_text(text)

    def has(self, number: int) -> bool:
        """Whether the n-th episode is there."""
        return self._path(number).is_file()

    def save(self, episode: EpisodeReplay) -> None:
        """Keep an episode."""
        episode.save(self._path(episode.number))

    def finish(self, report: BagReport) -> None:
        """Note that the bag is done."""
        partial = self._directory / f'{REPORT}.partial'
        partial.write_text(json.dumps(asdict(report)))
        partial.replace(self._directory / REPORT)

    def report(self) -> dict | None:
        """Return the report of a bag that is done, else None."""
        path = self._directory / REPORT
        return json.loads(path.read_text()) if path.is_file() else None

    def numbers(self) -> list[int]:
        """Return the numbers of the episodes that are there, in their order."""
        return sorted(int(path.stem) for path in self._directory.glob('*.npz'))

    def episodes(self) -> Iterator[EpisodeReplay]:
        """Yield the episodes in their order, without their pictures."""
        for number in self.numbers():
            yield EpisodeReplay.load(self._path(number))

    def episode(self, number: int) -> EpisodeReplay:
        """Return one episode, with its pictures."""
        return EpisodeReplay.load(self._path(number), pictures=True)

    def files(self) -> dict[str, bytes]:
        """Return name -> content of everything, to be sent to another machine."""
        return {path.name: path.read_bytes() for path in self._directory.iterdir()
                if path.suffix in ('.npz', '.json')}

    def take(self, files: dict[str, bytes]) -> None:
        """Write what `files` returned elsewhere."""
        for name, content in files.items():
            (self._directory / Path(name).name).write_bytes(content)

    def _path(self, number: int) -> Path:
        return self._directory / f'{number:06}.npz'


def state_of(bag: Path) -> str:
    """Return a text that changes when a file of the bag does."""
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
             for path in storage_files(bag)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def key_of(bag: Path) -> str:
    """Return a directory name for a bag: its own, made unique by its place."""
    place = hashlib.sha256(str(bag.resolve()).encode()).hexdigest()[:8]
    return f'{re.sub(r"[^A-Za-z0-9_.-]", "_", bag.name)[:60]}-{place}'
