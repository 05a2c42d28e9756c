"""How smooth the commands of an episode were, above all where one chunk gave way to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import ActionSpace

DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """Changes of an episode's commands from one control step to the next, and their jerk.

    A change is the largest over the dimensions, as a share of the dimension's range; grippers are
    left out, since they switch. seams: at the steps where another chunk was followed than before.
    inside: at all others. positions: at seams, how far the path that the new chunk plans from its
    picture on is from the path that was commanded since that picture; for a rate that is a
    difference of sums, as a share of the way that a whole chunk can command. jerk: (root mean
    square over steps and dimensions of the third derivative of position, unit/s^3; how many
    values it is of).
    """

    seams: tuple[float, ...]
    inside: tuple[float, ...]
    positions: tuple[float, ...]
    jerk: tuple[float, int]


class Recorder:
    """Takes down the commands of an episode, and which chunk they follow. horizon: of a chunk."""

    def __init__(self, space: ActionSpace, period_s: float, horizon: int):
        self._period_s, self._arm = period_s, np.array(
            [name not in space.gripper for name in space.dimensions])
        self._rates = space.is_rate[self._arm]
        self._span = (space.upper - space.lower)[self._arm]
        self._way = np.where(self._rates, self._span * horizon * period_s, self._span)
        self._commands: list[np.ndarray] = []
        self._due_ns: list[int] = []
        self._followed: list[int | None] = []
        self._positions: list[float] = []

    def note(self, command: np.ndarray, stamp_ns: int | None, now_ns: int,
             planned: tuple[np.ndarray, int] | None) -> None:
        """Note a command (A,), the stamp of the chunk that it follows, and that chunk's past.

        stamp_ns: None for a robot at rest. planned: as `Execution.planned` returns it.
        """
        if self._followed and stamp_ns not in (None, self._followed[-1]):
            steps, since_ns = planned
            told = [each for each, due_ns in zip(self._commands, self._due_ns)
                    if due_ns >= since_ns]
            if told:
                self._positions.append(self._apart(steps[:, self._arm], np.array(told)))
        self._commands.append(command[self._arm])
        self._due_ns.append(now_ns)
        self._followed.append(stamp_ns)

    def _apart(self, steps: np.ndarray, told: np.ndarray) -> float:
        """Return how far the end of the planned steps (j, D) is from that of those told (k, D)."""
        way = np.abs(steps.sum(axis=0) - told.sum(axis=0)) * self._period_s
        if len(steps):
            way = np.where(self._rates, way, np.abs(steps[-1] - told[-1]))
        return float((way / self._way).max())

    def result(self) -> Smoothness:
        """Return what the episode was like; the first chunk's begin is no seam."""
        commands = np.array(self._commands)
        change = (np.abs(np.diff(commands, axis=0)) / self._span).max(axis=1)
        pairs = list(zip(self._followed, self._followed[1:]))
        begun = np.cumsum([one is not None for one in self._followed])[:-1] > 0
        seam = np.array([a != b for a, b in pairs], bool) & begun
        inside = np.array([a == b and a is not None for a, b in pairs], bool)
        jerk = np.concatenate([
            (np.diff(commands[:, self._rates], n=2, axis=0) / self._period_s ** 2).ravel(),
            (np.diff(commands[:, ~self._rates], n=3, axis=0) / self._period_s ** 3).ravel()])
        rms = float(np.sqrt(np.mean(jerk ** 2))) if jerk.size else 0.0
        return Smoothness(seams=_short(change[seam]), inside=_short(change[inside]),
                          positions=_short(self._positions), jerk=(rms, jerk.size))


def _short(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), DIGITS) for value in values)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90, p99 and max in %, empty without values."""
    if not len(values):
        return {}
    found = np.percentile(values, [50, 90, 99, 100])
    return {name: round(100 * float(value), 2)
            for name, value in zip(('p50', 'p90', 'p99', 'max'), found)}


def pooled(episodes: Sequence[Smoothness]) -> dict[str, object]:
    """Return the percentiles of the changes of all episodes, and the jerk of all their steps."""
    counts = np.array([episode.jerk[1] for episode in episodes])
    squares = np.array([episode.jerk[0] for episode in episodes]) ** 2
    return {**{name: percentiles([value for episode in episodes
                                  for value in getattr(episode, name)])
               for name in ('seams', 'inside', 'positions')},
            'count': sum(len(episode.seams) for episode in episodes),
            'jerk_rms': float(np.sqrt((squares * counts).sum() / max(1, counts.sum())))}
