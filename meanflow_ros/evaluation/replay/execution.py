"""Chunks to steps, as the robot would have executed them: guard, timeline, control period.

The recorded commands go through the same timeline, chunk by chunk, so that an executed step is
compared with what the recording commanded for the very same times; so do the number and the stamp
of the observation, which tells what every executed step came from, in every mode of the timeline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, ActionChunk, RobotSpec, TimedActions
from meanflow_ros.core.guard import Guard, GuardSettings, Rejected
from meanflow_ros.core.timeline import (
    Mode, OpenLoop, Prefix, RealTime, RecedingHorizon, TemporalEnsemble, Timeline)
from meanflow_ros.evaluation.replay.episode import ACCEPTED


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A chunk that is ready at `done_ns`, for the observation with this state (P,).

    prefix: what it continues, None outside of real-time chunking. reference: (T, A), recorded:
    (T,); see EpisodeReplay.
    """

    chunk: ActionChunk
    done_ns: int
    state: np.ndarray
    reference: np.ndarray
    recorded: np.ndarray
    prefix: Prefix | None = None


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


def execute(ready: Sequence[Ready], halts: Sequence[tuple[int, str]], ticks_ns: np.ndarray, *,
            robot: RobotSpec, mode: Mode, guard: GuardSettings | None = None) -> Steps:
    """Run chunks, in the order in which they were ready, through guard and timeline.

    halts: (when, why) everything planned is forgotten, ascending.
    """
    run = _Run(robot, mode, guard, int(ticks_ns[0]) if len(ticks_ns) else 0)
    outcome, expired = [''] * len(ready), np.zeros(len(ready), np.int64)
    rows = np.full((len(ticks_ns), run.width), np.nan)
    missed = np.zeros(len(ticks_ns), bool)
    events = sorted([*((when, 0, why) for when, why in halts),
                     *((each.done_ns, 1, number) for number, each in enumerate(ready))],
                    key=lambda event: event[:2])
    following = 0
    for index, now_ns in enumerate(ticks_ns.tolist()):
        while following < len(events) and events[following][0] <= now_ns:
            when, is_chunk, what = events[following]
            if is_chunk:
                outcome[what], expired[what] = run.add(ready[what], what)
            else:
                run.halt(what)
            following += 1
        row = run.at(now_ns)
        if row is not None:
            rows[index] = row
        missed[index] = row is None and run.begun
    return run.steps(rows, ticks_ns, missed, outcome, expired)


class _Run:
    """One timeline for the action, the recorded one, and where they come from, side by side.

    begun: a chunk has come since the start or the last halt.
    """

    def __init__(self, robot: RobotSpec, mode: Mode, guard: GuardSettings | None, origin_ns: int):
        self._robot, self._size, self._origin_ns = robot, robot.action_space.size, origin_ns
        self._guard = Guard(robot, guard)
        period_ns = round(robot.period_s * NANOSECONDS)
        self._timeline = Timeline(period_ns=period_ns, mode=mode)
        self._newest = None       # a mean of chunks has no one source: the newest is named
        if isinstance(mode, TemporalEnsemble):
            self._newest = Timeline(period_ns=period_ns, mode=RecedingHorizon())
        self.width = 2 * self._size + 4
        self.begun = False

    def add(self, ready: Ready, number: int) -> tuple[str, int]:
        """Give a chunk that the guard lets pass to the timeline; return the outcome, expired."""
        steps = len(ready.chunk.actions)
        try:
            safe = self._guard.check(ready.chunk, now_ns=ready.done_ns,
                                     **measured(ready.chunk, ready.state, self._robot)).timed
        except Rejected as error:
            return error.kind, steps if error.kind == 'expired' else 0
        kept = slice(steps - len(safe.actions), None)
        stamp_s = (ready.chunk.stamp_ns - self._origin_ns) / NANOSECONDS
        wide = TimedActions(stamp_ns=safe.stamp_ns, due_ns=safe.due_ns, actions=np.column_stack(
            [safe.actions, ready.reference[kept], ready.recorded[kept],
             np.arange(steps)[kept], np.full(len(safe.actions), stamp_s),
             np.full(len(safe.actions), number)]))
        if not self._timeline.add(wide, now_ns=ready.done_ns, prefix=ready.prefix):
            return 'late', 0
        if self._newest is not None:
            self._newest.add(wide)
        self.begun = True
        return ACCEPTED, steps - len(safe.actions)

    def halt(self, why: str) -> None:
        self._timeline.begin_epoch(why)
        if self._newest is not None:
            self._newest.clear()
        self.begun = False

    def at(self, now_ns: int) -> np.ndarray | None:
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
            outcome=outcome, expired=expired, interventions=self._guard.interventions)


class Foresight:
    """The timeline while the replay goes on, for modes in which it decides what is inferred."""

    def __init__(self, robot: RobotSpec, mode: Mode, guard: GuardSettings | None):
        self._guard = Guard(robot, guard)
        self._timeline = Timeline(period_ns=round(robot.period_s * NANOSECONDS), mode=mode)
        self._robot = robot

    def wants(self, now_ns: int, lead_ns: int) -> bool:
        """Whether a chunk that takes `lead_ns` would be of use."""
        self._timeline.at(now_ns)
        return self._timeline.wants_chunk(now_ns, lead_ns)

    def prefix(self, stamp_ns: int) -> Prefix | None:
        """Return what will be executed while a chunk of this observation is made."""
        if not isinstance(self._timeline.mode, RealTime):
            return None
        offset_ns = round(self._robot.first_step * self._robot.period_s * NANOSECONDS)
        return self._timeline.prefix(stamp_ns + offset_ns)

    def add(self, chunk: ActionChunk, done_ns: int, state: np.ndarray,
            prefix: Prefix | None) -> None:
        """Take a chunk that is ready."""
        try:
            safe = self._guard.check(chunk, now_ns=done_ns,
                                     **measured(chunk, state, self._robot))
        except Rejected:
            return
        self._timeline.add(safe.timed, now_ns=done_ns, prefix=prefix)

    def halt(self, why: str) -> None:
        """Forget everything planned."""
        self._timeline.begin_epoch(why)


def measured(chunk: ActionChunk, state: np.ndarray, robot: RobotSpec) -> dict[str, np.ndarray]:
    """Return what the guard is told of the robot: its state, and where each dimension is.

    A dimension is measured if it is a position and a state of the same name; the others begin
    where the chunk does, as in the node.
    """
    if not state.size:
        return {}
    space, start = robot.action_space, np.array(chunk.actions[0])
    for index, name in enumerate(space.dimensions):
        if name in robot.state_names and name not in space.rates:
            start[index] = state[robot.state_names.index(name)]
    return {'state': state, 'start': start} if start.shape == (space.size,) else {'state': state}


def decides_what_is_inferred(mode: Mode) -> bool:
    """Whether an observation can be chosen, or answered, only when the chunk before is known."""
    return isinstance(mode, (OpenLoop, RealTime))
