"""Chunks to steps, as the robot would have executed them: motion, timeline, control period.

The recorded commands go through the same timeline, chunk by chunk, so that an executed step is
compared with what the recording commanded for the very same times; so do the number and the stamp
of the observation, which tells what every executed step came from, in every mode of the timeline.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, ActionChunk, TimedActions
from meanflow_ros.core.guard import Rejected
from meanflow_ros.core.timeline import (
    Mode, OpenLoop, Prefix, RealTime, RecedingHorizon, TemporalEnsemble, Timeline,
    steps_still_due)
from meanflow_ros.evaluation.replay.driving import Drive, Driving
from meanflow_ros.evaluation.replay.episode import ACCEPTED, DISCARDED


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A chunk that is ready at `done_ns`, for the observation with this state (P,).

    epoch: how many halts there were before the observation, None if the chunk counts after any.
    prefix: what it continues, None outside of real-time chunking. reference: (T, A), recorded:
    (T,); see EpisodeReplay.
    """

    chunk: ActionChunk
    done_ns: int
    state: np.ndarray
    reference: np.ndarray
    recorded: np.ndarray
    epoch: int | None = None
    prefix: Prefix | None = None


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What the node hears beside chunks, by the time (ns) of each, ascending.

    halts: (when, why) everything planned is forgotten. felt: (when, state (P,)). unneeded: when
    an observation was there for which no chunk was wanted.
    """

    halts: Sequence[tuple[int, str]] = ()
    felt: Sequence[tuple[int, np.ndarray]] = ()
    unneeded: Sequence[int] = ()

    def events(self) -> list[tuple]:
        """Return (when, order among those of one time, what to call of _Run, with what)."""
        return [*((when, 0, _Run.halt, why) for when, why in self.halts),
                *((when, 1, _Run.feel, state) for when, state in self.felt),
                *((when, 3, _Run.pass_over, None) for when in self.unneeded)]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """M steps of control; the fields are those of EpisodeReplay. outcome, expired: per chunk."""

    executed: np.ndarray
    expected: np.ndarray
    tick_recorded: np.ndarray
    source: np.ndarray
    step: np.ndarray
    age_s: np.ndarray
    missed: np.ndarray
    outcome: list[str]
    expired: np.ndarray
    interventions: Counter[str]


def control_ticks(start_ns: int, end_ns: int, period_s: float) -> np.ndarray:
    """Return the times (M,) int64 of control from `start_ns` to `end_ns`, one per period."""
    count = int(np.floor((end_ns - start_ns) / (period_s * NANOSECONDS) + 1e-9)) + 1
    return start_ns + np.rint(np.arange(count) * period_s * NANOSECONDS).astype(np.int64)


def execute(ready: Sequence[Ready], heard: Heard, ticks_ns: np.ndarray,
            driving: Driving) -> Steps:
    """Run chunks, in the order in which they were ready, through the node's motion."""
    run = _Run(driving, int(ticks_ns[0]) if len(ticks_ns) else 0)
    outcome, expired = [''] * len(ready), np.zeros(len(ready), np.int64)
    rows = np.full((len(ticks_ns), run.width), np.nan)
    missed = np.zeros(len(ticks_ns), bool)
    events = sorted([*heard.events(), *((each.done_ns, 2, _Run.add, (number, each))
                                        for number, each in enumerate(ready))],
                    key=lambda event: event[:2])
    following = 0
    for index, now_ns in enumerate(ticks_ns.tolist()):
        while following < len(events) and events[following][0] <= now_ns:
            when, _, call, what = events[following]
            result = call(run, when, what)
            if call is _Run.add:
                outcome[what[0]], expired[what[0]] = result
            following += 1
        row = run.at(now_ns)
        if row is not None:
            rows[index] = row
        missed[index] = row is None and run.begun
    return run.steps(rows, ticks_ns, missed, outcome, expired)


class _Run:
    """The node's motion, and a timeline of the action, the recorded one, and where they come from.

    begun: a chunk has come since the start or the last halt.
    """

    def __init__(self, driving: Driving, origin_ns: int):
        robot, mode = driving.robot, driving.mode
        self._size, self._origin_ns = robot.action_space.size, origin_ns
        self._drive = Drive(driving, stopped=self._forget)
        period_ns = round(robot.period_s * NANOSECONDS)
        self._timeline = Timeline(period_ns=period_ns, mode=mode)
        self._newest = None       # a mean of chunks has no one source: the newest is named
        if isinstance(mode, TemporalEnsemble):
            self._newest = Timeline(period_ns=period_ns, mode=RecedingHorizon())
        self.width = 2 * self._size + 4
        self.begun = False

    def add(self, now_ns: int, numbered: tuple[int, Ready]) -> tuple[str, int]:
        """Give a chunk that the guard lets pass to the timeline; return the outcome, expired."""
        number, ready = numbered
        steps = len(ready.chunk.actions)
        motion = self._drive.motion
        try:
            safe = self._drive.accept(ready.chunk, now_ns, epoch=ready.epoch, state=ready.state,
                                      prefix=ready.prefix)
        except Rejected as error:
            return error.kind, steps if error.kind == 'expired' else 0
        if safe is None:
            return 'late' if ready.epoch in (None, motion.timeline.epoch) else DISCARDED, 0
        safe = safe.timed
        kept = slice(steps - len(safe.actions), None)
        stamp_s = (ready.chunk.stamp_ns - self._origin_ns) / NANOSECONDS
        wide = TimedActions(stamp_ns=safe.stamp_ns, due_ns=safe.due_ns, actions=np.column_stack(
            [safe.actions, ready.reference[kept], ready.recorded[kept],
             np.arange(steps)[kept], np.full(len(safe.actions), stamp_s),
             np.full(len(safe.actions), number)]))
        self._timeline.add(wide, now_ns=now_ns, prefix=ready.prefix)
        if self._newest is not None:
            self._newest.add(wide)
        self.begun = True
        return ACCEPTED, steps - len(safe.actions)

    def feel(self, now_ns: int, state: np.ndarray) -> None:
        """Note the measured state."""
        self._drive.feel(now_ns, state)

    def pass_over(self, now_ns: int, _) -> None:
        """Note that an observation was there that was not needed: inputs live."""
        self._drive.wants(now_ns)

    def halt(self, now_ns: int, why: str) -> None:
        self._drive.halt(now_ns, why)
        self._forget()
        self.begun = False

    def _forget(self) -> None:
        for timeline in (self._timeline, self._newest):
            if timeline is not None:
                timeline.clear()

    def at(self, now_ns: int) -> np.ndarray | None:
        self._drive.pass_to(now_ns)
        row = self._timeline.at(now_ns)
        if row is not None and self._newest is not None:
            row = np.append(row[:-1], self._newest.at(now_ns)[-1])
        return row

    def steps(self, rows: np.ndarray, ticks_ns: np.ndarray, missed: np.ndarray,
              outcome: list[str], expired: np.ndarray) -> Steps:
        size = self._size
        recorded, step, stamp_s, number = rows[:, 2 * size:].T
        due = np.isfinite(number)
        return Steps(
            executed=rows[:, :size], expected=rows[:, size:2 * size],
            tick_recorded=due & (np.nan_to_num(recorded) > 1 - 1e-9),
            source=np.where(due, np.rint(np.nan_to_num(number)), -1).astype(np.int64),
            step=np.where(due, np.floor(np.nan_to_num(step) + 1e-6), -1).astype(np.int64),
            age_s=(ticks_ns - self._origin_ns) / NANOSECONDS - stamp_s, missed=missed,
            outcome=outcome, expired=expired,
            interventions=self._drive.motion.guard.interventions)


class Foresight:
    """The motion while the replay goes on, for modes in which it decides what is inferred."""

    def __init__(self, driving: Driving):
        self._drive, self._robot = Drive(driving), driving.robot

    def wants(self, now_ns: int, lead_ns: int) -> bool:
        """Whether a chunk that takes `lead_ns` would be of use."""
        self._drive.pass_to(now_ns)
        timeline = self._drive.motion.timeline
        timeline.at(now_ns)
        return timeline.wants_chunk(now_ns, lead_ns)

    def pass_over(self, now_ns: int) -> None:
        """Note that an observation is there that is not needed."""
        self._drive.wants(now_ns)

    def feel(self, now_ns: int, state: np.ndarray) -> None:
        """Note the measured state (P,)."""
        self._drive.feel(now_ns, state)

    def prefix(self, stamp_ns: int) -> Prefix | None:
        """Return what will be executed while a chunk of this observation is made."""
        timeline = self._drive.motion.timeline
        if not isinstance(timeline.mode, RealTime):
            return None
        offset_ns = round(self._robot.first_step * self._robot.period_s * NANOSECONDS)
        return timeline.prefix(stamp_ns + offset_ns)

    def add(self, chunk: ActionChunk, done_ns: int, *, epoch: int, state: np.ndarray,
            prefix: Prefix | None) -> None:
        """Take a chunk that is ready."""
        with contextlib.suppress(Rejected):
            self._drive.accept(chunk, done_ns, epoch=epoch, state=state, prefix=prefix)

    def assume(self, chunk: ActionChunk, done_ns: int, *, epoch: int,
               prefix: Prefix | None) -> None:
        """Take a chunk in place of one that is not known yet, as if the guard let it pass."""
        self._drive.pass_to(done_ns)
        timed = steps_still_due(chunk, now_ns=done_ns)
        if timed is not None:
            self._drive.motion.timeline.add(timed, now_ns=done_ns, epoch=epoch, prefix=prefix)

    def halt(self, now_ns: int, why: str) -> None:
        """Forget everything planned."""
        self._drive.halt(now_ns, why)


def decides_what_is_inferred(mode: Mode) -> bool:
    """Whether an observation can be chosen, or answered, only when the chunk before is known."""
    return isinstance(mode, (OpenLoop, RealTime))
