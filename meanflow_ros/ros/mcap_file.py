"""One mcap file, read in constant memory, whatever state it is in.

With its index the chunks are merged by time and a bad chunk is left out alone. Without one
(unfinished, truncated) the records are read from the start, as far as they go. What could not be
read is told to `lose`. Format: https://mcap.dev/spec, version 0.
"""

from __future__ import annotations

import heapq
import io
import struct
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lz4.frame

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b'\x89MCAP0\r\n'
FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK = 0x02, 0x03, 0x04, 0x05, 0x06
CHUNK_INDEX, STATISTICS, DATA_END = 0x08, 0x0B, 0x0F
LAST_OPCODE = 0x0F
FOOTER_BYTES = 9 + 20 + len(MAGIC)
CHUNK_HEAD = struct.Struct('<QQQI')
MAX_CHUNK_BYTES = 1 << 30
REORDER_BYTES = 32 << 20      # how much of an unindexed file is held to bring it into order
SEARCH_BYTES = 1 << 20
Lose = Callable[[str], None]
Message = tuple[int, int, memoryview]   # time in ns, channel id, serialised message


class Damaged(ValueError):
    """Bytes that are not what the format says."""


@dataclass(frozen=True)
class Channel:
    """A topic as a file knows it. qos: as rosbag2 stores it, YAML."""

    topic: str
    type: str
    qos: str = ''


@dataclass(frozen=True)
class _Chunk:
    start_ns: int
    end_ns: int
    offset: int
    length: int
    channels: frozenset[int]


@dataclass
class McapFile:
    """The channels and messages of a file. start_ns, end_ns: of its messages, None if unknown."""

    path: Path
    lose: Lose
    channels: dict[int, Channel] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    start_ns: int | None = None
    end_ns: int | None = None

    def __post_init__(self):
        self._schemas: dict[int, str] = {0: ''}
        self._chunks: list[_Chunk] = []
        self._file = open(self.path, 'rb')
        self._size = self.path.stat().st_size
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def messages(self, channels: Collection[int], start_ns: int | None,
                 stop_ns: int | None) -> Iterator[Message]:
        """Yield the messages of these channels in [start_ns, stop_ns) in the order of time."""
        read = self._indexed if self._chunks else self._scanned
        low, high = start_ns or 0, 2**64 if stop_ns is None else stop_ns
        for time_ns, channel, data in read(frozenset(channels), low, high):
            if low <= time_ns < high:
                yield time_ns, channel, data

    # Opening

    def _open(self) -> None:
        if self._size == 0:
            raise Damaged('the file is empty')
        if self._file.read(len(MAGIC)) != MAGIC:
            raise Damaged('it does not begin like an mcap file')
        try:
            self._read_summary()
        except (Damaged, struct.error, UnicodeDecodeError, IndexError) as error:
            self.lose(f'{self.path.name} has no index ({error}); it is read from its start')
            self._chunks.clear()
            self.counts.clear()
            self._find_channels()

    def _read_summary(self) -> None:
        if self._size < 2 * len(MAGIC) + FOOTER_BYTES:
            raise Damaged('the file ends too early')
        self._file.seek(self._size - FOOTER_BYTES)
        footer = self._file.read(FOOTER_BYTES)
        if footer[-len(MAGIC):] != MAGIC or footer[0] != FOOTER:
            raise Damaged('the recording was not finished, or the file is cut off')
        (summary,) = struct.unpack_from('<Q', footer, 9)
        if summary == 0:
            return self._find_channels()
        if not len(MAGIC) <= summary < self._size:
            raise Damaged('its index lies outside of the file')
        self._file.seek(summary)
        data = self._file.read(self._size - FOOTER_BYTES - summary)
        for opcode, content in _records(data, summary):
            self._note(opcode, content)
            if opcode == CHUNK_INDEX:
                self._chunks.append(_chunk_index(content))
            elif opcode == STATISTICS:
                self._read_statistics(content)
        if not self.channels:
            self._find_channels()
        if self._chunks and self.start_ns is None:
            self.start_ns = min(chunk.start_ns for chunk in self._chunks)
            self.end_ns = max(chunk.end_ns for chunk in self._chunks)

    def _note(self, opcode: int, content: memoryview) -> None:
        if opcode == SCHEMA:
            (number,) = struct.unpack_from('<H', content)
            self._schemas[number] = _string(content, 2)[0]
        elif opcode == CHANNEL:
            number, schema = struct.unpack_from('<HH', content)
            topic, at = _string(content, 4)
            _, at = _string(content, at)
            (size,) = struct.unpack_from('<I', content, at)
            self.channels[number] = Channel(topic, self._schemas.get(schema, ''),
                                            _pairs(content[at + 4:at + 4 + size]).get(
                                                'offered_qos_profiles', ''))

    def _read_statistics(self, content: memoryview) -> None:
        total, _, _, _, _, _, start_ns, end_ns, size = struct.unpack_from('<QHIIIIQQI', content)
        if total:
            self.start_ns, self.end_ns = start_ns, end_ns
        at = struct.calcsize('<QHIIIIQQI')
        self.counts = {channel: count for channel, count in struct.iter_unpack(
            '<HQ', content[at:at + size])}

    def _find_channels(self) -> None:
        """Read through the file for its channels, counts and times, without keeping messages."""
        for number, time_ns, _ in self._in_order_of_writing(quiet=True):
            self.counts[number] = self.counts.get(number, 0) + 1
            self.start_ns = time_ns if self.start_ns is None else min(self.start_ns, time_ns)
            self.end_ns = time_ns if self.end_ns is None else max(self.end_ns, time_ns)

    # With an index

    def _indexed(self, channels: frozenset[int], low: int, high: int) -> Iterator[Message]:
        waiting = sorted((chunk for chunk in self._chunks if chunk.start_ns < high
                          and chunk.end_ns >= low and (not chunk.channels
                                                       or chunk.channels & channels)),
                         key=lambda chunk: (chunk.start_ns, chunk.offset), reverse=True)
        heap: list[tuple[int, int, int]] = []
        opened: dict[int, list[Message]] = {}
        while waiting or heap:
            while waiting and (not heap or waiting[-1].start_ns <= heap[0][0]):
                chunk = waiting.pop()
                messages = self._chunk_messages(chunk, channels)
                if messages:
                    opened[chunk.offset] = messages
                    heapq.heappush(heap, (messages[0][0], chunk.offset, 0))
            if not heap:
                continue
            _, offset, index = heapq.heappop(heap)
            messages = opened[offset]
            yield messages[index]
            messages[index] = None
            if index + 1 < len(messages):
                heapq.heappush(heap, (messages[index + 1][0], offset, index + 1))
            else:
                del opened[offset]

    def _chunk_messages(self, chunk: _Chunk, channels: frozenset[int]) -> list[Message]:
        """Return the messages of a chunk by time; what cannot be read is lost, and told."""
        found: list[Message] = []
        try:
            self._file.seek(chunk.offset)
            head = self._file.read(9)
            if len(head) < 9 or head[0] != CHUNK:
                raise Damaged('there is no chunk where the index says')
            content = self._file.read(chunk.length - 9)
            for opcode, record in _records(_unpacked(memoryview(content)), chunk.offset):
                if opcode == MESSAGE:
                    number, time_ns, data = _message(record)
                    if number in channels:
                        found.append((time_ns, number, data))
        except (Damaged, struct.error) as error:
            self.lose(f'{self.path.name}: a chunk at byte {chunk.offset}, '
                      f'{_seconds(chunk.start_ns, self.start_ns)} to '
                      f'{_seconds(chunk.end_ns, self.start_ns)} s, is damaged ({error}); '
                      f'{len(found)} of its messages could be read')
        found.sort(key=lambda message: message[0])
        return found

    # Without

    def _scanned(self, channels: frozenset[int], low: int, high: int) -> Iterator[Message]:
        """Bring the file's messages into order, as far as `REORDER_BYTES` of them reach."""
        heap: list[tuple[int, int, int, memoryview]] = []
        held = 0
        for count, (number, time_ns, data) in enumerate(self._in_order_of_writing()):
            if number not in channels:
                continue
            heapq.heappush(heap, (time_ns, count, number, bytes(data)))
            held += len(data)
            while held > REORDER_BYTES:
                time_ns, _, number, data = heapq.heappop(heap)
                held -= len(data)
                yield time_ns, number, memoryview(data)
        while heap:
            time_ns, _, number, data = heapq.heappop(heap)
            yield time_ns, number, memoryview(data)

    def _in_order_of_writing(self, quiet: bool = False) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (channel, time, data) from the file's start to where it cannot be read."""
        lose = (lambda _: None) if quiet else self.lose
        at = len(MAGIC)
        while at < self._size:
            self._file.seek(at)
            head = self._file.read(9)
            if len(head) < 9:
                break
            opcode, length = head[0], int.from_bytes(head[1:], 'little')
            most = max(self._size, MAX_CHUNK_BYTES) if opcode == CHUNK else self._size
            if not 1 <= opcode <= LAST_OPCODE or length > most:
                found = self._next_chunk(at + 1)
                lose(f'{self.path.name}: nothing can be read from byte {at} to '
                     f'{"its end" if found is None else f"byte {found}"}')
                if found is None:
                    return
                at = found
                continue
            if opcode in (FOOTER, DATA_END):
                return
            whole = at + 9 + length <= self._size
            if opcode in (SCHEMA, CHANNEL, MESSAGE, CHUNK):
                content = memoryview(self._file.read(length))
                yield from self._record(opcode, content, at, whole, lose)
            elif not whole:
                lose(f'{self.path.name} ends within a record at byte {at}')
            at += 9 + length

    def _record(self, opcode: int, content: memoryview, at: int, whole: bool,
                lose: Lose) -> Iterator[tuple[int, int, memoryview]]:
        count = 0
        try:
            if not whole and opcode != CHUNK:
                raise Damaged('the file ends within it')
            records = ([(opcode, content)] if opcode != CHUNK
                       else _records(_unpacked(content, whole), at))
            for inner, record in records:
                self._note(inner, record)
                if inner == MESSAGE:
                    count += 1
                    yield _message(record)
            if not whole:
                raise Damaged('the file ends within it')
        except (Damaged, struct.error, UnicodeDecodeError) as error:
            lose(f'{self.path.name}: a {"chunk" if opcode == CHUNK else "record"} at byte {at} '
                 f'is damaged ({error}); {count} of its messages could be read')

    def _next_chunk(self, start: int) -> int | None:
        """Return where the next compressed chunk begins, None if there is none."""
        marks = [struct.pack('<I', len(name)) + name for name in (b'zstd', b'lz4')]
        before = 9 + CHUNK_HEAD.size
        for base in range(start, self._size, SEARCH_BYTES):
            self._file.seek(base)
            window = self._file.read(SEARCH_BYTES + 64)
            for at in sorted(found for mark in marks for found in _positions(window, mark)):
                offset = base + at - before
                self._file.seek(max(offset, 0))
                head = self._file.read(before)
                length = int.from_bytes(head[1:9], 'little')
                if offset >= start and head[0] == CHUNK and length <= self._size - offset:
                    return offset
        return None


def _positions(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def _records(data, offset: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (opcode, content) of consecutive records; Damaged where they end early."""
    view, at = memoryview(data), 0
    while at < len(view):
        if at + 9 > len(view):
            raise Damaged('a record is cut off')
        opcode, length = view[at], int.from_bytes(view[at + 1:at + 9], 'little')
        if not 1 <= opcode <= LAST_OPCODE or at + 9 + length > len(view):
            raise Damaged(f'a record is cut off or broken {at} bytes after byte {offset}')
        yield opcode, view[at + 9:at + 9 + length]
        at += 9 + length


def _unpacked(content: memoryview, whole: bool = True) -> bytes | memoryview:
    """Return the records of a chunk; of one that is cut off, those that are there."""
    start_ns, end_ns, size, checksum = CHUNK_HEAD.unpack_from(content)
    if size > MAX_CHUNK_BYTES:
        raise Damaged(f'it claims {size} bytes')
    compression, at = _string(content, CHUNK_HEAD.size)
    (length,) = struct.unpack_from('<Q', content, at)
    packed = content[at + 8:at + 8 + length]
    if compression not in _DECOMPRESSORS:
        raise Damaged(f'unknown compression {compression[:20]!r}')
    data = _DECOMPRESSORS[compression](packed)
    if whole and len(data) == size and checksum and zlib.crc32(data) != checksum:
        raise Damaged('its checksum is wrong')
    return data


def _zstd(packed: memoryview) -> bytes:
    return _as_far_as_it_goes(zstd.ZstdDecompressor(), packed, zstd.ZstdError)


def _lz4(packed: memoryview) -> bytes:
    return _as_far_as_it_goes(lz4.frame.LZ4FrameDecompressor(), packed, RuntimeError)


def _as_far_as_it_goes(decompressor, packed: memoryview, kind: type[Exception],
                       step: int = 1 << 16) -> bytes:
    """Decompress until the data end or break: the records that are whole can still be read."""
    parts = io.BytesIO()
    try:
        for at in range(0, len(packed), step):
            parts.write(decompressor.decompress(bytes(packed[at:at + step])))
            if parts.tell() > MAX_CHUNK_BYTES:
                raise Damaged('it unpacks to more than it may')
    except kind as error:
        if not parts.tell():
            raise Damaged(f'it cannot be decompressed: {error}') from None
    return parts.getvalue()


_DECOMPRESSORS = {'': lambda packed: packed, 'zstd': _zstd, 'lz4': _lz4}


def _message(content: memoryview) -> tuple[int, int, memoryview]:
    number, _, time_ns, _ = struct.unpack_from('<HIQQ', content)
    return number, time_ns, content[22:]


def _string(content: memoryview, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from('<I', content, at)
    end = at + 4 + length
    if end > len(content):
        raise Damaged('a text is cut off')
    return str(content[at + 4:end], 'utf-8'), end


def _pairs(content: memoryview) -> dict[str, str]:
    pairs, at = {}, 0
    while at < len(content):
        key, at = _string(content, at)
        pairs[key], at = _string(content, at)
    return pairs


def _chunk_index(content: memoryview) -> _Chunk:
    start_ns, end_ns, offset, length, size = struct.unpack_from('<QQQQI', content)
    at = struct.calcsize('<QQQQI')
    channels = frozenset(number for number, _ in struct.iter_unpack(
        '<HQ', content[at:at + size]))
    return _Chunk(start_ns, end_ns, offset, length, channels)


def _seconds(time_ns: int, start_ns: int | None) -> str:
    return f'{(time_ns - (start_ns or 0)) / 1e9:.3f}'
