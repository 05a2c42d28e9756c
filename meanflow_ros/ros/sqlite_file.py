"""One db3 file of rosbag2, read in constant memory; of a damaged one, the rows that are left."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from meanflow_ros.ros.mcap_file import Channel, Damaged, Message

GIVE_UP_AFTER = 40   # attempts to find a readable row, each twice as far away as the one before


@dataclass
class SqliteFile:
    """The channels and messages of a file; the fields are those of McapFile."""

    path: Path
    lose: Callable[[str], None]
    channels: dict[int, Channel] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    start_ns: int | None = None
    end_ns: int | None = None

    def __post_init__(self):
        self._scratch: tempfile.TemporaryDirectory | None = None
        try:
            self._database = sqlite3.connect(f'file:{self._readable()}?mode=ro&immutable='
                                             f'{int(self._scratch is None)}', uri=True)
            # Else SQLite opens no file that is shorter than its header says.
            self._database.execute('PRAGMA writable_schema=ON')
            self._open()
        except sqlite3.Error as error:
            self.close()
            raise Damaged(str(error)) from None
        except BaseException:
            self.close()
            raise

    def _readable(self) -> Path:
        """Return the file; with a journal of unfinished writes, a copy that may be repaired."""
        journals = [path for suffix in ('-wal', '-journal')
                    if (path := self.path.with_name(self.path.name + suffix)).is_file()
                    and path.stat().st_size]
        if not journals:
            return self.path
        self._scratch = tempfile.TemporaryDirectory(prefix='bag-')
        for path in (self.path, *journals):
            shutil.copy(path, self._scratch.name)
        copy = Path(self._scratch.name, self.path.name)
        with sqlite3.connect(copy) as database:   # opening it for writing applies the journal
            database.execute('SELECT count(*) FROM sqlite_master').fetchone()
        database.close()
        return copy

    def _open(self) -> None:
        if self.path.stat().st_size == 0:
            raise Damaged('the file is empty')
        columns = {row[1] for row in self._database.execute('PRAGMA table_info(topics)')}
        if not {'id', 'name', 'type'} <= columns:
            raise Damaged('it has no table of topics')
        qos = 'offered_qos_profiles' if 'offered_qos_profiles' in columns else "''"
        for number, topic, kind, profile in self._database.execute(
                f'SELECT id, name, type, {qos} FROM topics'):
            self.channels[number] = Channel(topic, kind, profile or '')
        try:
            self.counts = dict(self._database.execute(
                'SELECT topic_id, count(*) FROM messages GROUP BY topic_id'))
            self.start_ns, self.end_ns = self._database.execute(
                'SELECT min(timestamp), max(timestamp) FROM messages').fetchone()
        except sqlite3.Error:
            self.counts = {}    # damage shows, and is told, when the messages are read

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, '_database'):
            self._database.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def messages(self, channels: Collection[int], start_ns: int | None,
                 stop_ns: int | None) -> Iterator[Message]:
        """Yield the messages of these channels in [start_ns, stop_ns) in the order of time."""
        numbers = ','.join(str(int(number)) for number in channels) or 'NULL'
        where = (f'topic_id IN ({numbers}) AND timestamp >= {int(start_ns or 0)} '
                 f'AND timestamp < {2**63 - 1 if stop_ns is None else int(stop_ns)}')
        newest = (-1, -1)
        try:
            for number, time_ns, row, data in self._database.execute(
                    f'SELECT topic_id, timestamp, id, data FROM messages WHERE {where} '
                    f'ORDER BY timestamp, id'):
                newest = time_ns, row
                yield time_ns, number, memoryview(data)
        except sqlite3.Error as error:
            self.lose(f'{self.path.name}: rows cannot be read in order ({error}); those that '
                      f'are left are read one by one')
            yield from self._rows(where, newest)

    def _rows(self, where: str, newest: tuple[int, int]) -> Iterator[Message]:
        """Yield the rows that can be read and come after `newest` (time, row), by their number."""
        following, step, failures = 1, 1, 0
        while failures < GIVE_UP_AFTER:
            try:
                for number, time_ns, row, data in self._database.execute(
                        f'SELECT topic_id, timestamp, id, data FROM messages NOT INDEXED '
                        f'WHERE {where} AND id >= {following} ORDER BY id'):
                    following, step, failures = row + 1, 1, 0
                    if (time_ns, row) > newest:
                        yield time_ns, number, memoryview(data)
                return
            except sqlite3.Error:
                following, step, failures = following + step, 2 * step, failures + 1
        self.lose(f'{self.path.name}: no row can be read from number {following - step} on')
