"""A rosbag2 of any kind and in any state: db3 or mcap, compressed, split, unfinished, damaged.

`Bag` reads what is readable, file by file, and lists in `lost` what is not, and where. Messages
come serialised; `bag.py` turns them into objects. Formats: metadata.yaml versions 1 to 9 (up to
Kilted), zstd per file or per message, chunks of mcap in zstd or lz4.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from meanflow_ros.core.schema import MAX_YAML_BYTES, read_yaml
from meanflow_ros.ros.mcap_file import Channel, Damaged, McapFile, zstd
from meanflow_ros.ros.sqlite_file import SqliteFile

READERS = {'.mcap': McapFile, '.db3': SqliteFile}
METADATA = 'metadata.yaml'
NEWEST_VERSION = 9
_ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'   # serialised messages begin with a zero byte


@dataclass(frozen=True)
class RawMessage:
    """A message as it is stored. data: CDR with its four bytes of encapsulation."""

    topic: str
    stamp_ns: int
    type: str
    data: bytes | memoryview


def is_bag(path: Path) -> bool:
    """Whether this is a directory of a rosbag2, finished or not, or one of its files."""
    return bool(storage_files(path))


def storage_files(path: Path) -> list[Path]:
    """Return the storage files in a directory by number, or the file itself; [] if none."""
    def kind(file: Path) -> str:
        return Path(file.name.removesuffix('.zstd')).suffix

    found = [path] if path.is_file() else sorted(path.glob('*')) if path.is_dir() else []
    return sorted((file for file in found if file.is_file() and kind(file) in READERS),
                  key=lambda file: [int(part) if part.isdigit() else part
                                    for part in re.split(r'(\d+)', file.name)])


class Bag:
    """An open rosbag2; use it in a `with` statement.

    topics: topic -> Channel, sorted. counts: topic -> messages, as far as known. start_ns, end_ns:
    of the recording, None where unknown. lost: what could not be read, in words; it grows while
    messages are read. ValueError if there is nothing to read at all.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.name = self.path.name
        self.topics: dict[str, Channel] = {}
        self.counts: dict[str, int] = {}
        self.start_ns: int | None = None
        self.end_ns: int | None = None
        self.distribution = ''
        self.lost: list[str] = []
        if not self.path.exists():
            raise ValueError(f'there is no bag at {path}')
        self._scratch: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Bag:
        try:
            self._files = self._listed_files()
            if not self._files:
                raise ValueError(f'{self.path} is not a rosbag2: it has no {METADATA} and no '
                                 f'{" or ".join(READERS)} file')
            self._readers = [reader for file in self._files
                             if (reader := self._opened(file)) is not None]
            if not self._readers:
                raise ValueError(f'{self.path} cannot be read as a rosbag2: '
                                 f'{"; ".join(self.lost)}')
            self._describe()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for reader in getattr(self, '_readers', []):
            reader.close()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def messages(self, topics: Collection[str] | None = None, start_ns: int | None = None,
                 stop_ns: int | None = None) -> Iterator[RawMessage]:
        """Yield the messages of `topics` (all by default) in [start_ns, stop_ns) by time.

        The files of a split bag come one after the other. Messages of one stamp come in the
        order in which they were written.
        """
        for reader in self._readers:
            channels = {number: channel for number, channel in reader.channels.items()
                        if topics is None or channel.topic in topics}
            if not channels:
                continue
            for stamp_ns, number, data in reader.messages(channels, start_ns, stop_ns):
                channel = channels[number]
                if data[:4] == _ZSTD_MAGIC:
                    data = self._decompressed(channel.topic, stamp_ns, data)
                    if data is None:
                        continue
                yield RawMessage(channel.topic, stamp_ns, channel.type, data)

    # Opening

    def _listed_files(self) -> list[Path]:
        """Return the files in the order of the metadata; those that are there if it is bad."""
        found = storage_files(self.path)
        metadata = self.path / METADATA
        if not self.path.is_dir():
            return found
        if not metadata.is_file():
            if found:
                self._lose(f'there is no {METADATA}: the recording was not finished')
            return found
        try:
            information = read_yaml(metadata, MAX_YAML_BYTES)['rosbag2_bagfile_information']
            version, names = information['version'], information['relative_file_paths']
            self.distribution = str(information.get('ros_distro') or '')
        except (ValueError, KeyError, TypeError) as error:
            self._lose(f'{METADATA} cannot be read ({type(error).__name__}: {error})')
            return found
        if not isinstance(version, int) or version > NEWEST_VERSION:
            self._lose(f'{METADATA} has version {version}, up to {NEWEST_VERSION} is known')
        listed = [self.path / Path(str(name)).name for name in names]
        for path in listed:
            if path not in found:
                self._lose(f'{path.name} is listed in {METADATA} and is not there')
        return [path for path in listed if path in found] or found

    def _opened(self, path: Path) -> McapFile | SqliteFile | None:
        try:
            if path.suffix == '.zstd':
                path = self._unpacked(path)
            return READERS[path.suffix](path, self._lose)
        except (Damaged, OSError) as error:
            self._lose(f'{path.name} cannot be read: {error}')
            return None

    def _unpacked(self, path: Path) -> Path:
        """Decompress a file into a scratch directory, as far as it goes."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix='bag-')
        target = Path(self._scratch.name, path.stem)
        with open(path, 'rb') as packed, open(target, 'wb') as unpacked:
            try:
                with zstd.open(packed, 'rb') as stream:
                    shutil.copyfileobj(stream, unpacked, 1 << 16)
            except (zstd.ZstdError, EOFError) as error:
                self._lose(f'{path.name} can be decompressed up to byte {unpacked.tell()} of its '
                           f'content only ({error})')
        return target

    def _describe(self) -> None:
        for reader in self._readers:
            for number, channel in reader.channels.items():
                known = self.topics.setdefault(channel.topic, channel)
                if known.type != channel.type:
                    raise ValueError(f'{self.path}: {channel.topic} holds both {known.type} and '
                                     f'{channel.type}')
                self.counts[channel.topic] = (self.counts.get(channel.topic, 0)
                                              + reader.counts.get(number, 0))
        self.topics = dict(sorted(self.topics.items()))
        self.start_ns = min((reader.start_ns for reader in self._readers
                             if reader.start_ns is not None), default=None)
        self.end_ns = max((reader.end_ns for reader in self._readers
                           if reader.end_ns is not None), default=None)

    def _decompressed(self, topic: str, stamp_ns: int, data) -> bytes | None:
        try:
            return zstd.decompress(bytes(data))
        except zstd.ZstdError as error:
            self._lose(f'a message of {topic} at {stamp_ns} cannot be decompressed ({error})')
            return None

    def _lose(self, what: str) -> None:
        if what not in self.lost:
            self.lost.append(what)


def topic_list(topics: Mapping[str, Channel]) -> str:
    """Return the topics with their types, for an error message."""
    return ', '.join(f'{topic} ({channel.type})' for topic, channel in topics.items()) or 'none'
