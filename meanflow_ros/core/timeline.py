"""Which step of which chunk is due now: receding horizon by due time.

The newest chunk wins for every time that it covers; an older one serves what it does not.
"""

from __future__ import annotations

import numpy as np

from meanflow_ros.core.contract import ActionChunk, TimedActions


def steps_still_due(chunk: ActionChunk, *, now_ns: int) -> TimedActions | None:
    """Drop the steps whose due time is past; None when nothing is left."""
    due_ns = np.array([chunk.due_ns(step) for step in range(len(chunk.actions))], np.int64)
    keep = due_ns >= now_ns
    if not keep.any():
        return None
    return TimedActions(stamp_ns=chunk.stamp_ns, due_ns=due_ns[keep],
                        actions=chunk.actions[keep])


class Timeline:
    """A time-indexed buffer of chunks; `at` gives the action that is due at a time."""

    def __init__(self, *, period_ns: int):
        if period_ns < 1:
            raise ValueError(f'period_ns must be at least 1, got {period_ns}')
        self._period_ns = period_ns
        self._chunks: list[TimedActions] = []

    def add(self, chunk: TimedActions) -> None:
        """Insert a chunk; the order of arrival does not matter, the stamp does."""
        self._chunks.append(chunk)
        self._chunks.sort(key=lambda c: c.stamp_ns, reverse=True)

    def clear(self) -> None:
        """Forget every chunk."""
        self._chunks.clear()

    def at(self, now_ns: int) -> np.ndarray | None:
        """Return the action (A,) due at `now_ns`: its period covers that time; None if none is.

        Chunks that have ended are dropped.
        """
        self._chunks = [c for c in self._chunks if c.due_ns[-1] + self._period_ns > now_ns]
        for chunk in self._chunks:
            step = int(np.searchsorted(chunk.due_ns, now_ns, side='right')) - 1
            if step >= 0 and now_ns < chunk.due_ns[step] + self._period_ns:
                return chunk.actions[step]
        return None


def due_or_still(due: np.ndarray | None, last: np.ndarray) -> np.ndarray:
    """Return the action (A,) that is due; where none is, stand still and keep the gripper.

    last: the command before, (A,): velocities, and the gripper as its last dimension.
    """
    if due is not None:
        return due
    still = np.zeros_like(last)
    still[-1] = last[-1]
    return still
