"""What the commands of the robot did: limits, and when it came to rest.

Written from the limits alone, without the guard's code; it reads the records of controller.py.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from reliability.robot import (
    ACCELERATION, CONTROL_RATE_HZ, DIMENSIONS, JERK, LOWER, UPPER, VELOCITY)

PERIOD_S = 1 / CONTROL_RATE_HZ
ROUNDING = 1e-3         # share of a limit
STOOD_S = 5 * PERIOD_S  # without a command the controllers have held so long that all stands
LATE_S = 0.3            # a message may arrive
LEAD_S = 0.05           # so late a trajectory may: lead_s of the motion file, by default
STILL = 1e-9
SET_POINT_ROOM = 1.5


def _unknown() -> np.ndarray:
    return np.full(len(DIMENSIONS) - 1, np.nan)


@dataclass
class _Command:
    """A command of the stream and how it was moving: (3,), NaN where that is not known.

    change, second: first and second differences over time. periods_s: the length of its period
    and of the one before.
    """

    at: float
    number: int
    stamp_ns: int
    values: np.ndarray
    change: np.ndarray = field(default_factory=_unknown)
    second: np.ndarray = field(default_factory=_unknown)
    periods_s: tuple[float, float] = (0.0, 0.0)


class Checker:
    """Takes records one after another. violations: what was outside, in words.

    moved: (monotonic seconds) of the last command that moved each output. commands: how many.
    worst: the largest share of a limit that was used, by limit and dimension. simulated_time: the
    robot lives by the stamps alone. offset_s: of stamps, against arrivals; None if not known.
    """

    def __init__(self, offset_s: float | None = None):
        self._offset_s = offset_s
        self.violations: deque[str] = deque(maxlen=1000)
        self.violated = 0
        self.moved = dict.fromkeys(('stream', 'trajectory'), 0.0)
        self.last_command_s = 0.0
        self.commands = 0
        self.refused: Counter[str] = Counter()
        self.worst: Counter[str] = Counter()
        self.simulated_time = False
        self._where = ''
        self._before: _Command | None = None
        self._hurries_until_s = 0.0

    def forget(self) -> None:
        """Begin anew: a new controller, or a node that knows nothing of before."""
        self._before = None

    def take(self, record: list) -> None:
        """Check one record."""
        kind, at, *rest = record
        if kind == 'c':
            self._stream(at, rest[0], rest[1], np.array(rest[2:], float))
        elif kind == 'j':
            self._trajectory(at, *rest)
        elif kind == 's':
            self._set_point(at, *rest)
        elif kind == 'h':
            self.moved['stream'] = at
        else:
            self.refused[rest[0]] += 1

    def _wrong(self, at: float, words: str) -> None:
        self.violated += 1
        self.violations.append(f'{at:.3f}: {words}{self._where}')

    def _within(self, at, what, shares, names) -> None:
        """Note shares of a limit (n,) that were used; more than 1 is a violation."""
        for name, share in zip(names, shares):
            self.worst[f'{what} {name}'] = max(self.worst[f'{what} {name}'], float(share))
            if not share <= 1 + ROUNDING:
                self._wrong(at, f'{what} of {name} is {share:.4g} x its limit')

    def _stream(self, at: float, number: int, stamp_ns: int, values: np.ndarray) -> None:
        """Check a command of elbow, grip and turn against the one before.

        A command may be late, and then moves as far as in one period: the period is what the
        stamps say, at most the nominal one. After a lost message nothing can be said, and after
        one that was held up on its way nothing but of position and velocity.
        """
        names, which = DIMENSIONS[1:], slice(1, None)
        self.commands += 1
        self.last_command_s = at
        self._within(at, 'position', np.abs(_centred(values, which)), names)
        before = self._before
        now = self._before = _Command(at, number, stamp_ns, values)
        if before is None or number != before.number + 1:
            self.refused['lost'] += before is not None
            self.moved['stream'] = at
            return
        passed_s, gap_s = (stamp_ns - before.stamp_ns) / 1e9, at - before.at
        if passed_s == 0 and np.array_equal(values, before.values):
            self._before = before         # simulated time has not gone on
            return
        self._where = f' ({gap_s:.4f} s after the last by arrival, {passed_s:.4f} s by stamp)'
        held_up = (not self.simulated_time and 0 <= passed_s <= STOOD_S
                   and gap_s - passed_s > LATE_S)
        if self.simulated_time or abs(gap_s - passed_s) < LATE_S:
            gap_s = passed_s              # the clocks agree: stamps are the better measure
        if gap_s > STOOD_S or passed_s < 0:      # positions are held, and Servo has halted
            before = _Command(before.at, before.number, before.stamp_ns,
                              before.values * [1, 1, 0], np.zeros(3), np.zeros(3))
        period_s = passed_s if 0 < passed_s < PERIOD_S else PERIOD_S
        whole_s = period_s + before.periods_s[0]
        now.periods_s = period_s, before.periods_s[0]
        now.change = (values - before.values) / period_s
        stops = np.array([1, 1, values[2] != 0])  # who says stop may have a rate end at once
        now.change, change_before = now.change * stops, before.change * stops
        now.second = 2 * (now.change - change_before) / whole_s
        if held_up:
            self.refused['held up'] += 1
            now.second = _unknown()
        jerk = 3 * (now.second - before.second * stops) / (whole_s + before.periods_s[1])
        for what, of_this, limit in (('velocity', now.change, VELOCITY), (
                'acceleration', now.second, ACCELERATION), ('jerk', jerk, JERK)):
            if np.isnan(of_this).any():       # known from the second, third, fourth command on
                continue
            limited = np.isfinite(limit[which])
            self._within(at, what, np.abs(of_this[limited]) / limit[which][limited],
                         np.array(names)[limited])
        if held_up:
            now.change = _unknown()
        if np.abs(values - before.values).max() > STILL or abs(values[2]) > STILL:
            self.moved['stream'] = at

    def _trajectory(self, at: float, stamp_ns: int, times, positions, velocities) -> None:
        """Check the points of a trajectory for the shoulder.

        After one that came later than its lead the controller hurries: nothing is said of that.
        """
        if (self._offset_s is not None and not self.simulated_time
                and at + self._offset_s - stamp_ns / 1e9 > LEAD_S):
            self.refused['trajectory: later than its lead'] += 1
            self._hurries_until_s = at + LATE_S
        self._where = ''
        times, positions = np.array(times), np.array(positions, float)
        names = DIMENSIONS[:1]
        self.commands += 1
        for point in positions:
            self._within(at, 'position', np.abs(_centred(point, slice(0, 1))), names)
        if len(times) < 2:
            return
        change = np.diff(positions, axis=0) / np.diff(times)[:, None]
        self._within(at, 'velocity', np.abs(change).max(axis=0) / VELOCITY[:1], names)
        self._within(at, 'velocity', np.abs(np.array(velocities)).max(axis=0) / VELOCITY[:1],
                     names)
        if len(times) > 2:
            middles = (times[1:] + times[:-1]) / 2
            second = np.diff(change, axis=0) / np.diff(middles)[:, None]
            self._within(at, 'acceleration', np.abs(second).max(axis=0) / ACCELERATION[:1], names)

    def _set_point(self, at: float, position: float, velocity: float) -> None:
        """Check the velocity of the trajectory controller, between trajectories too.

        The controller gets a trajectory some ms after it was made, which makes the way to its
        first point steeper: hence the room.
        """
        self._where = ''
        share, what = abs(velocity) / VELOCITY[0], 'velocity of the set-point of shoulder'
        if at > self._hurries_until_s:
            self.worst[what] = max(self.worst[what], float(share))
            if share > SET_POINT_ROOM:
                self._wrong(at, f'{what} is {share:.4g} x its limit')
        if abs(velocity) > 1e-6:
            self.moved['trajectory'] = at


def _centred(values: np.ndarray, which: slice) -> np.ndarray:
    """Return values where -1 and 1 are the position limits."""
    return (2 * values - UPPER[which] - LOWER[which]) / (UPPER[which] - LOWER[which])
