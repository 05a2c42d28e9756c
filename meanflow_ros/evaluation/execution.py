"""How chunks that come late become commands: the node's guard and timeline, on simulated time."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, ActionChunk, Observation, RobotSpec
from meanflow_ros.core.guard import Guard, Rejected
from meanflow_ros.core.timeline import Prefix, RealTime, RecedingHorizon, Timeline
from meanflow_ros.ros.motion_config import EXECUTION, read_mode

NAIVE, REAL_TIME = 'naive', 'real_time'
EXECUTIONS = f'{EXECUTION} | {REAL_TIME} | {NAIVE}'


class Execution:
    """Follows chunks that arrive `delay_steps` of their own steps after their picture.

    The first is there at once: a robot that stands still can wait for it.

    kind: an execution mode of the node; `real_time` alone takes the delay as its prefix. `naive`
    is what the node does not offer: from the moment it arrives the newest chunk is followed from
    its step 0 on, whatever its picture's stamp. One chunk is asked for at a time, as the node's
    one thread does. picture_ns: from picture to picture.
    """

    def __init__(self, spec: RobotSpec, kind: str, *, delay_steps: int, picture_ns: int):
        self._first_ns = round(spec.first_step * spec.period_s * NANOSECONDS)
        period_ns = round(spec.period_s * NANOSECONDS)
        self._delay_ns, self._naive = delay_steps * period_ns, kind == NAIVE
        mode = (RecedingHorizon() if self._naive else
                RealTime(delay_steps=delay_steps) if kind == REAL_TIME else read_mode(kind))
        self.guard = Guard(spec)
        self.timeline = Timeline(period_ns=period_ns, mode=mode)
        # What waits for the next picture has to ask for a chunk at the last one that is in time.
        self._lead_ns = -(-self._delay_ns // picture_ns) * picture_ns
        self._coming: tuple[int, ActionChunk, Prefix | None] | None = None
        self._whole: dict[int, tuple[ActionChunk, int]] = {}   # by stamp, with its picture's
        self._prefix: Prefix | None = None
        self._begun = False

    def receive(self, now_ns: int) -> None:
        """Take the chunk that has arrived by now, if the guard lets it pass."""
        if self._coming is None or now_ns < self._coming[0]:
            return
        (_, chunk, prefix), self._coming = self._coming, None
        pictured_ns = chunk.stamp_ns
        if self._naive:
            chunk = dataclasses.replace(chunk, stamp_ns=now_ns - self._first_ns)
        self._whole[chunk.stamp_ns] = chunk, pictured_ns
        with contextlib.suppress(Rejected):
            self.timeline.add(self.guard.check(chunk, now_ns=now_ns).timed, now_ns=now_ns,
                              prefix=prefix)

    def planned(self, now_ns: int) -> tuple[np.ndarray, int] | None:
        """Return what the chunk that is followed had for its steps before now, and since when.

        (j, A) its own first steps, and the stamp of its picture; None if none is followed.
        """
        if self.timeline.followed is None:
            return None
        chunk, pictured_ns = self._whole[self.timeline.followed.stamp_ns]
        before = sum(chunk.due_ns(step) < now_ns for step in range(len(chunk.actions)))
        return chunk.actions[:before], pictured_ns + self._first_ns

    def wants_chunk(self, now_ns: int) -> bool:
        """Whether to ask for a chunk now: none is on its way, and the mode has use of it."""
        return self._coming is None and self.timeline.wants_chunk(now_ns, self._lead_ns)

    def ask(self, observation: Observation) -> np.ndarray:
        """Return the prefix (n, A) that a chunk for this observation is to continue."""
        self._prefix = None
        if isinstance(self.timeline.mode, RealTime):
            self._prefix = self.timeline.prefix(observation.stamp_ns + self._first_ns)
        return np.zeros((0, 0)) if self._prefix is None else self._prefix.actions

    def answer(self, chunk: ActionChunk, now_ns: int) -> None:
        """Let the chunk that was asked for at `now_ns` arrive when its delay is over."""
        self._coming = now_ns + self._delay_ns * self._begun, chunk, self._prefix
        self._begun = True
        self.receive(now_ns)
