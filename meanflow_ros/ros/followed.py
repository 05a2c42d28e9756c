"""Where the controllers of trajectories are: what they were told, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS
from meanflow_ros.core.guard import Guard, Rejected

_LAG_S = 0.2            # by which a joint and its state follow late, at its largest velocity
_ASTRAY_S = 2.0         # so long it must stay there before it begins anew from there
_STIRS = 0.1            # share of what a joint may lag; more is motion and no noise
_BEGINS = 0.5           # share of it that a trajectory may be ahead to begin anew without a jump


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a trajectory begins: the motion now, and what the new one goes on from, at `begin_ns`.

    now, begin: position and velocity (2, D). begin_ns is the lead ahead, or now. goes_on: every
    joint follows the last trajectory until then.
    """

    now: np.ndarray
    begin_ns: int
    begin: np.ndarray
    goes_on: bool


class Followed:
    """What is known of the controllers of trajectories; see the module's first lines.

    felt: (A,) measured positions, NaN where nothing is. astray: (A,) by which a joint may lag.
    compares: whether a joint may be elsewhere than where it was sent; if not, it is there.
    """

    def __init__(self, outputs: Sequence, guard: Guard, astray: np.ndarray, compares: bool = True):
        self._outputs = [output for output in outputs if not output.streams]
        self.guard, self._astray, self._compares = guard, astray, compares
        self.felt = np.full(len(astray), np.nan)
        self._astray_ns: int | None = None
        # Topic -> where (D,) its controller stood at its first trajectory, until it moves.
        self._stood: dict[str, np.ndarray] = {}
        self._ended_ns: dict[str, int] = {}   # topic -> when its end was seen
        self._known: dict[str, dict[bytes, tuple[str, str]]] = {}   # topic -> its subscribers ever
        self._restarted: set[str] = set()                           # topics

    def feel(self, felt: np.ndarray) -> None:
        """Note the measured positions (A,)."""
        self.felt = felt
        for output in self._outputs:
            stood = self._stood.get(output.config.topic)
            if stood is not None and (np.abs(felt[output.columns] - stood)
                                      > _STIRS * self._astray[output.columns]).any():
                del self._stood[output.config.topic]

    def watch(self, now_ns: int) -> None:
        """Note since when trajectories have ended: after a step of the clock that is not long."""
        for output in self._outputs:
            if output.end_ns is None or now_ns <= output.end_ns:
                self._ended_ns.pop(output.config.topic, None)
            else:
                self._ended_ns.setdefault(output.config.topic, now_ns)

    def _look(self) -> None:
        """Notice controllers that were started again: another subscription of a known node."""
        for output in self._outputs:
            now, topic = output.subscribers(), output.config.topic
            known = self._known.setdefault(topic, {})
            if any(name in known.values() for gid, name in now.items() if gid not in known):
                self._restarted.add(topic)
            known.update(now)

    def is_unsure(self, output, now_ns: int) -> bool:
        """Whether a controller that was started again may not know its last trajectory.

        Nor may it have been another node of that name: so nothing is sent until that trajectory
        has ended, and the next one begins where the robot is measured.
        """
        if output.config.topic not in self._restarted:
            return False
        if output.set_point(now_ns) is None or now_ns - output.end_ns > _LAG_S * NANOSECONDS:
            self._restarted.discard(output.config.topic)
            output.forget()
            return False
        return True

    def tolerance(self, output) -> np.ndarray:
        """Return how far (D,) a joint may be from its set-point: it and its state lag behind."""
        columns = output.columns
        if not self._compares:
            return np.full(len(columns), np.inf)
        return self._astray[columns] + _LAG_S * self.guard.limits.velocity[columns]

    def require(self, now_ns: int) -> None:
        """Rejected while a joint is measured far from where its controller was sent.

        Either it does not follow or its state is wrong. If it stays there, that is where it is:
        but nowhere outside its limits, where no way begins.
        """
        self._look()
        for output in self._outputs:
            if self.is_unsure(output, now_ns):
                self.guard.interventions['astray'] += 1
                raise Rejected('astray', f'the controller of {output.config.topic!r} has been '
                                         f'started again: its last trajectory has yet to end')
            told = output.set_point(now_ns)
            if told is None:
                self._require_inside(output, ~np.isnan(self.felt[output.columns]))
                continue
            away = np.abs(self.felt[output.columns] - told[0])
            far = away > self.tolerance(output)
            if not far.any():
                continue
            self._require_inside(output, far)
            worst = int(np.argmax(np.nan_to_num(away / self.tolerance(output))))
            if self._astray_ns is None or now_ns < self._astray_ns:
                self._astray_ns = now_ns
            if not self._stays_astray(now_ns):
                self.guard.interventions['astray'] += 1
                raise Rejected('astray', f'{output.config.dimensions[worst]!r} is '
                                         f'{away[worst]:.4g} away from where it was sent')
            return
        self._astray_ns = None

    def start(self, output, now_ns: int, *, stopping: bool = False) -> Start | None:
        """Return how the next trajectory of a controller begins; None if that is unknown.

        It goes on from where the last trajectory leads by the end of its lead, so that it does
        not matter when within that time it arrives; a stop does so always. It begins at rest where
        it is measured: a joint that has long been measured too far from its trajectory, and a
        robot whose last trajectory ended some time ago. So do, and at once, the first trajectory,
        and that of a robot that should have moved since and has not been seen to, if it is near: a
        controller that has just started takes late what it was sent, and would jump to what has
        gone on ahead of it.
        """
        measured = self._measured(output, now_ns, stopping)
        now, begin_ns = self._at(output, now_ns, measured), now_ns
        if now is None:
            return None
        told = output.set_point(now_ns) is not None
        if told and (stopping or not self._begins_anew(output, now_ns)):
            begin_ns += output.lead_ns
        return Start(now=now, begin_ns=begin_ns, goes_on=told and not measured.any(),
                     begin=self._at(output, begin_ns, measured) if told else now)

    def note_start(self, output, now_ns: int) -> None:
        """Note where a controller stands that is sent its first trajectory."""
        if self._compares and output.set_point(now_ns) is None:
            self._stood[output.config.topic] = self.felt[output.columns].copy()

    def _at(self, output, at_ns: int, measured: np.ndarray) -> np.ndarray | None:
        columns, limits = output.columns, self.guard.limits
        still = np.stack([self.felt[columns], np.zeros(len(columns))])
        told = output.set_point(at_ns)
        if told is None:
            if not self.guard.is_inside(self.felt)[columns].all():
                return None
            told = still
        position, velocity = np.where(measured, still, told)
        return np.stack([np.clip(position, limits.lower[columns], limits.upper[columns]),
                         velocity])

    def _measured(self, output, now_ns: int, stopping: bool) -> np.ndarray:
        """Return (D,) bool: the joints that count as standing where they are measured."""
        felt, told = self.felt[output.columns], output.set_point(now_ns)
        if stopping or told is None or not self._compares:
            return np.zeros(len(felt), bool)
        if (self._begins_anew(output, now_ns)
                or now_ns - self._ended_ns.get(output.config.topic, now_ns)
                > _LAG_S * NANOSECONDS):
            return ~np.isnan(felt)
        return self._stays_astray(now_ns) & (np.abs(felt - told[0]) > self.tolerance(output))

    def _begins_anew(self, output, now_ns: int) -> bool:
        """Whether a robot has not been seen to move that should have, and is near."""
        told = output.set_point(now_ns)
        if told is None or output.config.topic not in self._stood:
            return False
        away = np.abs(self.felt[output.columns] - told[0]) / self._astray[output.columns]
        return bool((away <= _BEGINS).all() and (away > _STIRS).any())

    def _stays_astray(self, now_ns: int) -> bool:
        return (self._astray_ns is not None
                and now_ns - self._astray_ns >= _ASTRAY_S * NANOSECONDS)

    def _require_inside(self, output, which: np.ndarray) -> None:
        """Rejected if a joint of these (D,) is measured outside its limits."""
        looked_at = np.zeros(len(self.felt), bool)
        looked_at[output.columns] = which
        try:
            self.guard.require_inside(self.felt, looked_at)
        except Rejected as error:
            self._astray_ns = None
            self.guard.interventions[error.kind] += 1
            raise
