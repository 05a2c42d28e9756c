"""Where the episodes of a recording begin and end: by a topic, by gaps, or each bag is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meanflow_ros.core.contract import NANOSECONDS
from meanflow_ros.training.data_config import DataConfig


@dataclass(frozen=True)
class Start:
    """An episode begins; number: its own, or None to count."""

    number: object = None


@dataclass(frozen=True)
class Stop:
    """The running episode ends. fault: why it cannot be used; note: what to know about it."""

    fault: str = ''
    note: str = ''


class Cutter:
    """Turns marks and traffic into Start and Stop. ACTIONS is the stream of the actions."""

    ACTIONS = ''

    def __init__(self, data: DataConfig):
        self._by, self._gap_ns = data.episodes, round(data.gap_s * NANOSECONDS)
        self._running = False
        self._mark: int | None = None
        self._heard_ns: dict[str, int] = {}

    def status(self, message) -> Iterator[Start | Stop]:
        """Take a DiagnosticStatus that says start, success or anything else."""
        if message.message == 'start':
            yield from self._stop(Stop(note='the next one starts before it has ended'))
            number = {pair.key: pair.value for pair in message.values}.get('episode')
            yield self._start(number)
        elif message.message == 'success':
            yield from self._stop(Stop())
        else:
            yield from self._stop(Stop(fault=f'ended with {message.message!r}'))

    def index(self, message) -> Iterator[Start | Stop]:
        """Take an Int32 that changes from episode to episode, negative between them."""
        if message.data != self._mark:
            yield from self._stop(Stop())
            self._mark = message.data
            if message.data >= 0:
                yield self._start(message.data)

    def traffic(self, stream: str, now_ns: int) -> Iterator[Start | Stop]:
        """Note that a camera or the actions go on."""
        if self._by == 'topic':
            return
        if self._by == 'gaps' and now_ns - self._heard_ns.get(stream, now_ns) > self._gap_ns:
            yield from self._stop(Stop())
            self._heard_ns.clear()
        if not self._running:
            yield self._start(None if self._by == 'gaps' else '')
        self._heard_ns[stream] = now_ns

    def paused(self, now_ns: int) -> bool:
        """Whether actions have paused for so long that the next is another episode's."""
        since_ns = now_ns - self._heard_ns.get(self.ACTIONS, now_ns)
        return self._by == 'gaps' and since_ns > self._gap_ns

    def end(self) -> Iterator[Stop]:
        """Yield what the end of the recording ends."""
        unfinished = self._by == 'topic' and self._mark is None
        yield from self._stop(Stop(note='the recording ends before the episode does'
                                   if unfinished else ''))

    def _start(self, number: object) -> Start:
        self._running = True
        return Start(number)

    def _stop(self, stop: Stop) -> Iterator[Stop]:
        if self._running:
            self._running = False
            yield stop
