"""Which action of which chunk is due now, and what follows: a time-indexed buffer of chunks.

A mode says how chunks that overlap become one sequence of commands. Between two steps of a chunk
the action is interpolated; the last one holds for its period. Steps are counted as consumed when
they are handed out. Times are ROS time in nanoseconds and come from outside: nothing here reads a
clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from meanflow_ros.core.contract import ActionChunk, TimedActions

MAX_CHUNKS = 64


def steps_still_due(chunk: ActionChunk, *, now_ns: int) -> TimedActions | None:
    """Drop the steps whose due time is past; None when nothing is left.

    ValueError for times that cannot be.
    """
    return chunk.timed().after(now_ns)


def value_at(timed: TimedActions, time_ns: int, period_ns: int) -> np.ndarray | None:
    """Return the action (A,) of a chunk at a time; None where no step covers it.

    Steps that are at most a period apart (and a half, for rounding) are joined by a line; before
    a wider gap, and at the end, a step holds for its period.
    """
    step = int(np.searchsorted(timed.due_ns, time_ns, side='right')) - 1
    if step < 0:
        return None
    since = time_ns - int(timed.due_ns[step])
    if since == 0:
        return timed.actions[step]
    if step + 1 < len(timed.due_ns):
        gap = int(timed.due_ns[step + 1] - timed.due_ns[step])
        if 2 * gap <= 3 * period_ns:
            share = since / gap
            return (1 - share) * timed.actions[step] + share * timed.actions[step + 1]
    return timed.actions[step] if since < period_ns else None


def on_path(path: TimedActions, start_ns: int, since_ns: float = 0.0) -> np.ndarray:
    """Return the action (A,) of a path `since_ns` after `start_ns`, on the line between its steps.

    Before the first step and after the last they hold.
    """
    places_ns = (path.due_ns - start_ns).astype(np.float64)
    return np.array([np.interp(since_ns, places_ns, column) for column in path.actions.T])


def velocity_at(timed: TimedActions, time_ns: int, period_ns: int) -> np.ndarray:
    """Return how fast (A,) the action of a chunk changes after a time, per s; 0 where it holds."""
    step = int(np.searchsorted(timed.due_ns, time_ns, side='right')) - 1
    if 0 <= step < len(timed.due_ns) - 1:
        gap = int(timed.due_ns[step + 1] - timed.due_ns[step])
        if 2 * gap <= 3 * period_ns:
            return (timed.actions[step + 1] - timed.actions[step]) / (gap / 1e9)
    return np.zeros(timed.actions.shape[1])


@dataclass(eq=False)
class _Chunk:
    """A chunk in the buffer. from_ns: it may be used from then on. used: steps handed out."""

    timed: TimedActions
    from_ns: int
    used: set[int] = field(default_factory=set)

    def covers(self, time_ns: int, period_ns: int) -> bool:
        return self.from_ns <= time_ns and value_at(self.timed, time_ns, period_ns) is not None


class Mode(Protocol):
    """How overlapping chunks become one sequence of actions."""

    def blend(self, covering: Sequence[_Chunk], active: _Chunk | None,
              used: int) -> list[tuple[_Chunk, float]]:
        """Return chunks and weights that add up to 1.

        covering: the chunks that have an action now, newest first, at least one. active: the one
        that was followed last, if it still covers. used: steps of it that were handed out.
        """


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """A chunk is followed to its end; then the newest takes over."""

    def blend(self, covering, active, used):
        """Stay with the active chunk."""
        return [(active or covering[0], 1.0)]


@dataclass(frozen=True, kw_only=True)
class RecedingHorizon:
    """The newest chunk takes over once `steps` steps of the present one were handed out."""

    steps: int = 0

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f'steps must be at least 0, got {self.steps}')

    def blend(self, covering, active, used):
        """Take the newest, or stay."""
        return [(covering[0] if active is None or used >= self.steps else active, 1.0)]


@dataclass(frozen=True, kw_only=True)
class TemporalEnsemble:
    """The mean of all chunks that cover a time, with weights exp(-decay * rank).

    As in ACT (Zhao et al. 2023, arXiv 2304.13705), where rank 0 is the oldest chunk and decay
    0.01. newest_first: rank 0 is the newest, so that new pictures count most.
    """

    decay: float = 0.01
    newest_first: bool = False

    def __post_init__(self):
        if not 0 <= self.decay < np.inf:
            raise ValueError(f'decay must be at least 0 and finite, got {self.decay}; '
                             f'newest_first says which end of the chunks counts most')

    def blend(self, covering, active, used):
        """Weigh all."""
        ranked = covering if self.newest_first else covering[::-1]
        weights = np.exp(-self.decay * np.arange(len(ranked)))
        return list(zip(ranked, weights / weights.sum()))


@dataclass(frozen=True, kw_only=True)
class RealTime:
    """Prefix-conditioned real-time chunking: a chunk continues what is executed meanwhile.

    delay_steps: d, the steps that are given to the model as a clean prefix (`Timeline.prefix`);
    its answer is used from the step after them on, and refused when it comes later than that.
    """

    delay_steps: int

    def __post_init__(self):
        if self.delay_steps < 0:
            raise ValueError(f'delay_steps must be at least 0, got {self.delay_steps}')

    def blend(self, covering, active, used):
        """Take the newest: it may be used from the end of its prefix on."""
        return [(covering[0], 1.0)]


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The actions (n, A) that will be executed while a chunk is inferred, and until when."""

    actions: np.ndarray
    until_ns: int


class Timeline:
    """The buffer; see the module's first lines. Not thread-safe.

    mode: may be set at any time. period_ns: of the steps. discarded: chunks that were not used,
    by reason. consumed: steps handed out so far.
    """

    def __init__(self, *, period_ns: int, mode: Mode | None = None):
        if period_ns < 1:
            raise ValueError(f'period_ns must be at least 1, got {period_ns}')
        self.mode: Mode = mode or RecedingHorizon()
        self.period_ns = period_ns
        self.epoch = 0
        self.discarded: Counter[str] = Counter()
        self.consumed = 0
        self._chunks: list[_Chunk] = []      # newest first
        self._active: _Chunk | None = None
        self._ended = ''                     # why the epoch before this one ended

    @property
    def followed(self) -> TimedActions | None:
        """Return the chunk that was followed last, of an ensemble the newest; None for none."""
        return None if self._active is None else self._active.timed

    def begin_epoch(self, reason: str) -> int:
        """Forget every chunk, and those that are still being inferred; return the new epoch.

        reason: a word or two, `reset` or `instruction` for example; it names what is discarded.
        """
        self.epoch += 1
        self._ended = reason
        self.clear()
        return self.epoch

    def clear(self) -> None:
        """Forget every chunk."""
        self._chunks.clear()
        self._active = None

    def add(self, timed: TimedActions, *, now_ns: int | None = None, epoch: int | None = None,
            prefix: Prefix | None = None) -> bool:
        """Insert a chunk; False if it is discarded. The order of arrival does not matter.

        epoch: that of the observation, now's by default. prefix: what the chunk continues; with
        one, `now_ns` decides whether it has come in time.
        """
        if epoch is not None and epoch != self.epoch:
            self.discarded[self._ended] += 1
            return False
        if prefix is not None and len(prefix.actions) and now_ns > prefix.until_ns:
            self.discarded['late'] += 1
            return False
        start_ns = int(timed.due_ns[0]) if prefix is None else prefix.until_ns
        self._chunks.append(_Chunk(timed, start_ns))
        self._chunks.sort(key=lambda chunk: chunk.timed.stamp_ns, reverse=True)
        del self._chunks[MAX_CHUNKS:]
        return True

    def at(self, now_ns: int) -> np.ndarray | None:
        """Return the action (A,) that is due at `now_ns`, None if none is; ended chunks go."""
        self._chunks = [chunk for chunk in self._chunks
                        if chunk.timed.due_ns[-1] + self.period_ns > now_ns]
        parts, self._active = self._blend(now_ns, self._active)
        if not parts:
            return None
        for chunk, _ in parts:
            step = int(np.searchsorted(chunk.timed.due_ns, now_ns, side='right')) - 1
            if chunk is self._active and step not in chunk.used:
                self.consumed += 1
            chunk.used.add(step)
        return self._mixed(parts, now_ns)

    def velocity(self, now_ns: int) -> np.ndarray | None:
        """Return how fast (A,) the action that is due at `now_ns` changes, None if none is.

        Where one chunk takes over from another it is that of the new one: the step between them
        is no motion.
        """
        parts, _ = self._blend(now_ns, self._active)
        return np.sum([weight * velocity_at(chunk.timed, now_ns, self.period_ns)
                       for chunk, weight in parts], axis=0) if parts else None

    def plan(self, now_ns: int) -> TimedActions | None:
        """Return what will be handed out from `now_ns` on if no other chunk comes.

        None if that is nothing. The due times are those of the chunks that are followed.
        """
        times = sorted({int(due) for chunk in self._chunks for due in chunk.timed.due_ns
                        if due >= now_ns})
        due_ns, actions, active = [], [], self._active
        ahead: Counter[int] = Counter()
        for time_ns in times:
            parts, active = self._blend(time_ns, active, ahead)
            if active is None or time_ns not in active.timed.due_ns:
                continue
            ahead[id(active)] += 1
            due_ns.append(time_ns)
            actions.append(self._mixed(parts, time_ns))
        if not due_ns:
            return None
        return TimedActions(stamp_ns=self._chunks[0].timed.stamp_ns, due_ns=np.array(due_ns),
                            actions=np.array(actions))

    def wants_chunk(self, now_ns: int, lead_ns: int = 0) -> bool:
        """Whether a new chunk could be of use: always, but in an open loop only near its end.

        lead_ns: how long inference takes.
        """
        if not isinstance(self.mode, OpenLoop) or self._active is None:
            return True
        return int(self._active.timed.due_ns[-1]) + self.period_ns - now_ns <= lead_ns

    def prefix(self, first_due_ns: int) -> Prefix:
        """Return the steps that will be executed while a chunk with this first due time is made.

        They are those of `RealTime.delay_steps`, fewer where the buffer ends, none in other modes.
        """
        actions = []
        for step in range(getattr(self.mode, 'delay_steps', 0)):
            parts, _ = self._blend(first_due_ns + step * self.period_ns, self._active)
            if not parts:
                break
            actions.append(self._mixed(parts, first_due_ns + step * self.period_ns))
        until_ns = first_due_ns + len(actions) * self.period_ns
        return Prefix(actions=np.array(actions), until_ns=until_ns)

    def _blend(self, time_ns: int, active: _Chunk | None, ahead: Counter | None = None,
               ) -> tuple[list[tuple[_Chunk, float]], _Chunk | None]:
        """Return the chunks that make the action of a time, with weights, and the one followed."""
        covering = [chunk for chunk in self._chunks if chunk.covers(time_ns, self.period_ns)]
        if not covering:
            return [], None
        if active not in covering:
            active = None
        used = 0 if active is None else len(active.used) + (ahead or {}).get(id(active), 0)
        parts = self.mode.blend(covering, active, used)
        followed = covering[0] if len(parts) > 1 else parts[0][0]
        return parts, followed

    def _mixed(self, parts: list[tuple[_Chunk, float]], time_ns: int) -> np.ndarray:
        values = [value_at(chunk.timed, time_ns, self.period_ns) for chunk, _ in parts]
        if len(values) == 1:
            return values[0]
        return np.sum([weight * value for (_, weight), value in zip(parts, values)], axis=0)


class StopAlongPath:
    """Comes to rest on the last path: time along it slows from rate 1 to 0, the path is kept.

    rate(u) = 1 - 3 u^2 + 2 u^3 with u the share of `stop_s` that is over, so that velocity and
    acceleration are continuous; half of `stop_s` of the path is travelled. A path that is shorter
    is used up in less time. Rates are multiplied by rate(u).

    path: what would have been executed from `start_ns` on. is_rate: (A,) bool.
    """

    def __init__(self, path: TimedActions, *, start_ns: int, stop_s: float, is_rate: np.ndarray):
        if not 0 < stop_s < np.inf:
            raise ValueError(f'stop_s must be above 0 and finite, got {stop_s}')
        self._path, self._is_rate = path, is_rate
        self._start_ns = max(start_ns, int(path.due_ns[0]))
        left_ns = int(path.due_ns[-1]) - self._start_ns
        self.length_ns = max(0, min(round(stop_s * 1e9), 2 * left_ns))

    def at(self, now_ns: int) -> np.ndarray:
        """Return the command (A,): on the path, and at rest from the end of the stop on."""
        share = 1.0
        if self.length_ns:
            share = min(max((now_ns - self._start_ns) / self.length_ns, 0.0), 1.0)
        place = self.length_ns * (share - share ** 3 + share ** 4 / 2)
        action = on_path(self._path, self._start_ns, place)
        return np.where(self._is_rate, (1 - 3 * share ** 2 + 2 * share ** 3) * action, action)
