"""How smooth the commands of an episode were, above all where one chunk gave way to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import ActionSpace
from meanflow_ros.core.timeline import value_at

DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """Changes of an episode's commands from one control step to the next, and their jerk.

    A change is the largest over the dimensions, as a share of the dimension's range; grippers are
    left out, since they switch. seams: at the steps where another chunk was followed than before.
    inside: at all others. replaced: at seams, from what the chunk before had for that step to what
    was commanded. jerk: (root mean square over steps and dimensions of the third derivative of
    position, unit/s^3; how many values it is of).
    """

    seams: tuple[float, ...]
    inside: tuple[float, ...]
    replaced: tuple[float, ...]
    jerk: tuple[float, int]


class Recorder:
    """Takes down the commands of an episode, and which chunk they follow."""

    def __init__(self, space: ActionSpace, period_s: float):
        self._space, self._period_s = space, period_s
        self._arm = np.array([name not in space.gripper for name in space.dimensions])
        self._commands: list[np.ndarray] = []
        self._followed: list[int | None] = []
        self._instead: list[np.ndarray | None] = []
        self._last = None

    def note(self, command: np.ndarray, followed, now_ns: int) -> None:
        """Note a command (A,) and the TimedActions that it follows, None for a robot at rest."""
        before = self._last
        self._instead.append(None if before is None or before is followed else value_at(
            before, now_ns, round(self._period_s * 1e9)))
        self._commands.append(command)
        self._followed.append(None if followed is None else id(followed))
        self._last = followed

    def result(self) -> Smoothness:
        """Return what the episode was like; the first chunk's begin is no seam."""
        space, arm = self._space, self._arm
        commands, span = np.array(self._commands)[:, arm], (space.upper - space.lower)[arm]
        change = (np.abs(np.diff(commands, axis=0)) / span).max(axis=1)
        pairs = list(zip(self._followed, self._followed[1:]))
        begun = np.cumsum([one is not None for one in self._followed])[:-1] > 0
        seam = np.array([a != b for a, b in pairs], bool) & begun
        inside = np.array([a == b and a is not None for a, b in pairs], bool)
        replaced = [(np.abs(command - instead[arm]) / span).max()
                    for command, instead in zip(commands, self._instead) if instead is not None]
        rates = space.is_rate[arm]
        jerk = np.concatenate([
            (np.diff(commands[:, rates], n=2, axis=0) / self._period_s ** 2).ravel(),
            (np.diff(commands[:, ~rates], n=3, axis=0) / self._period_s ** 3).ravel()])
        rms = float(np.sqrt(np.mean(jerk ** 2))) if jerk.size else 0.0
        return Smoothness(seams=_short(change[seam]), inside=_short(change[inside]),
                          replaced=_short(replaced), jerk=(rms, jerk.size))


def _short(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), DIGITS) for value in values)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and max in %, empty without values."""
    if not len(values):
        return {}
    p50, p99 = np.percentile(values, [50, 99])
    return {name: round(100 * float(value), 2)
            for name, value in (('p50', p50), ('p99', p99), ('max', np.max(values)))}


def pooled(episodes: Sequence[Smoothness]) -> dict[str, object]:
    """Return the percentiles of the changes of all episodes, and the jerk of all their steps."""
    counts = np.array([episode.jerk[1] for episode in episodes])
    squares = np.array([episode.jerk[0] for episode in episodes]) ** 2
    return {**{name: percentiles([value for episode in episodes
                                  for value in getattr(episode, name)])
               for name in ('seams', 'inside', 'replaced')},
            'count': sum(len(episode.seams) for episode in episodes),
            'jerk_rms': float(np.sqrt((squares * counts).sum() / max(1, counts.sum())))}
