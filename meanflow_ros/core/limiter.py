"""Commands one after another that never leave the limits, whatever is asked for.

Each dimension moves on a trajectory of bounded velocity, acceleration and jerk (Ruckig: Berscheid
and Kroeger 2021, arXiv 2105.04830). A step towards the target is taken only if the robot could
still stop inside the position limits after it; otherwise the stop that the step before allowed is
followed. So there is always a stop within the limits, by induction from standing still.
"""

from __future__ import annotations

import contextlib

import numpy as np
from ruckig import (
    ControlInterface, InputParameter, Result, Ruckig, RuckigError, Synchronization, Trajectory)

from meanflow_ros.core.limits import Limits

_ROUNDING = 1e-9   # share of a dimension's range
_SLOWER = 0.999    # share of its velocity limit with which a target may move away


class Limiter:
    """The commanded state of A dimensions: position, velocity and acceleration.

    limits: finite position limits. start: (A,) where the robot stands, within them.
    """

    def __init__(self, limits: Limits, start: np.ndarray):
        self._limits = limits
        span = limits.upper - limits.lower
        self._slack = _ROUNDING * span
        # Ruckig wants numbers; without a limit of its own a dimension can cross its range in 1 us.
        self._velocity = np.minimum(limits.velocity, 1e6 * span)
        self._acceleration = np.minimum(limits.acceleration, 1e6 * self._velocity)
        self._free = (np.isinf(limits.velocity) & np.isinf(limits.acceleration)
                      & np.isinf(limits.jerk))
        self.stand(start)

    def stand(self, position: np.ndarray) -> None:
        """Stand still at `position` (A,), which must lie within the limits."""
        self.move(position, np.zeros(len(position)))

    def move(self, position: np.ndarray, velocity: np.ndarray,
             acceleration: np.ndarray | None = None) -> None:
        """Pass `position` (A,), within the limits, with `velocity` if that can be stopped.

        acceleration: (A,) that it has there, 0 by default.
        """
        assert ((position >= self._limits.lower) & (position <= self._limits.upper)).all()
        acceleration = np.zeros(len(position)) if acceleration is None else acceleration
        state = (np.array(position, np.float64),
                 np.clip(velocity, -self._velocity, self._velocity),
                 np.clip(acceleration, -self._acceleration, self._acceleration))
        standing = ~self._can_stop(state) | self._free
        for values in state[1:]:
            values[standing] = 0.0
        self._state = state
        self._last_target: np.ndarray | None = None

    @property
    def position(self) -> np.ndarray:
        """Return the present command (A,)."""
        return self._state[0].copy()

    @property
    def state(self) -> np.ndarray:
        """Return position, velocity and acceleration of the present command, (3, A)."""
        return np.array(self._state)

    def step(self, target: np.ndarray | None, period_s: float,
             velocity: np.ndarray | None = None) -> np.ndarray:
        """Return the command (A,) after `period_s` on the way to `target`; None is a stop.

        velocity: (A,) with which the target moves on, by default as it came from the last one.
        """
        stopped = _after(self._stop(self._state), period_s)
        if target is None:
            self._last_target, chosen = None, stopped
        else:
            target = np.clip(target, self._limits.lower, self._limits.upper)
            moved = self._approach(target, self._clipped(target, velocity, period_s), period_s)
            self._last_target = target
            safe = self._can_stop(moved)
            chosen = tuple(np.where(safe, ours, theirs) for ours, theirs in zip(moved, stopped))
            chosen[0][self._free] = target[self._free]
        # Rounding leads beyond a limit; in a stop it grows with the time for which it is followed.
        np.clip(chosen[0], self._limits.lower, self._limits.upper, out=chosen[0])
        for values in chosen[1:]:
            values[self._free] = 0.0
        self._state = chosen
        return self.position

    def _clipped(self, target: np.ndarray, velocity: np.ndarray | None,
                 period_s: float) -> np.ndarray:
        """Return the velocity (A,) of the target: slower than what follows it may be."""
        if velocity is None:
            velocity = (np.zeros(len(target)) if self._last_target is None
                        else (target - self._last_target) / period_s)
        fastest = _SLOWER * self._velocity
        return np.clip(velocity, -fastest, fastest)

    def _approach(self, target: np.ndarray, velocity: np.ndarray, period_s: float):
        """Return the state after a step of the fastest way to the target, NaN where none is found.

        The target is there at the end of the step and moves on with `velocity`. There is a way to
        every target; in rare states rounding hides it from Ruckig, mostly for that velocity only.
        """
        still = np.zeros(len(target))
        everything = slice(None)
        with contextlib.suppress(RuckigError, ValueError):
            return self._towards(target, velocity, period_s, everything)
        result = tuple(np.full(len(target), np.nan) for _ in self._state)
        for index in range(len(target)):
            one = slice(index, index + 1)
            for choice in (velocity, still):
                with contextlib.suppress(RuckigError, ValueError):
                    state = self._towards(target, choice, period_s, one)
                    for values, value in zip(result, state):
                        values[one] = value
                    break
        return result

    def _towards(self, target: np.ndarray, velocity: np.ndarray, period_s: float, which: slice):
        """Return the state of the dimensions in `which` after a step, seen from the target.

        There the target stands at 0, and a robot that is behind has only to be faster than it;
        to arrive at one place with one velocity it might have to step back for a run-up.
        """
        position, speed, acceleration = self._state
        seen = position - target + velocity * period_s, speed - velocity, acceleration
        position, speed, acceleration = _after(
            self._trajectory(seen, ControlInterface.Position, velocity, which), period_s)
        return position + target[which], speed + velocity[which], acceleration

    def _stop(self, state) -> Trajectory:
        return self._trajectory(state, ControlInterface.Velocity, np.zeros(len(state[0])),
                                slice(None))

    def _can_stop(self, state) -> np.ndarray:
        """Return (A,) bool: which dimensions can stop inside their position limits."""
        found = np.isfinite(state[0])
        position, *motion = (np.where(found, values, 0.0) for values in state)
        # Ruckig counts 0 among the extrema of a stop, wherever it is: the stop begins at 0.
        extrema = self._stop([np.zeros(len(position)), *motion]).position_extrema
        lowest, highest = (position + np.array([getattr(each, end) for each in extrema])
                           for end in ('min', 'max'))
        return (found & (lowest >= self._limits.lower - self._slack)
                & (highest <= self._limits.upper + self._slack))

    def _trajectory(self, state, control: ControlInterface, seen_from: np.ndarray,
                    which: slice) -> Trajectory:
        """Return the trajectory to rest, at 0 by position, of the dimensions in `which`.

        Each goes by itself. seen_from: the velocity (A,) of that from which the state is seen.
        """
        velocity, acceleration = self._velocity[which], self._acceleration[which]
        lowest, highest = -velocity - seen_from[which], velocity - seen_from[which]
        size = len(velocity)
        ask = InputParameter(size)
        ask.control_interface = control
        ask.synchronization = Synchronization.No
        ask.current_position = state[0][which]   # clipped: rounding may lead beyond a limit
        ask.current_velocity = np.clip(state[1][which], lowest, highest)
        ask.current_acceleration = np.clip(state[2][which], -acceleration, acceleration)
        ask.target_position = ask.target_velocity = ask.target_acceleration = np.zeros(size)
        ask.min_velocity, ask.max_velocity = lowest, highest
        ask.max_acceleration, ask.max_jerk = acceleration, self._limits.jerk[which]
        result = Trajectory(size)
        code = Ruckig(size).calculate(ask, result)
        if code not in (Result.Working, Result.Finished):
            raise ValueError(f'no trajectory within the limits was found: {code}')
        return result


def _after(trajectory: Trajectory, time_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return position, velocity and acceleration (A,) at a time of the trajectory."""
    return tuple(np.array(values) for values in trajectory.at_time(time_s)[:3])
