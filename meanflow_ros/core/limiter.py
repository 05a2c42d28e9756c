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

    def move(self, position: np.ndarray, velocity: np.ndarray) -> None:
        """Pass `position` (A,), within the limits, with `velocity` if that can be stopped."""
        assert ((position >= self._limits.lower) & (position <= self._limits.upper)).all()
        velocity = np.clip(velocity, -self._velocity, self._velocity)
        state = np.array(position, np.float64), velocity, np.zeros(len(position))
        state[1][~self._can_stop(state) | self._free] = 0.0
        self._state = state
        self._last_target: np.ndarray | None = None

    @property
    def position(self) -> np.ndarray:
        """Return the present command (A,)."""
        return self._state[0].copy()

    def step(self, target: np.ndarray | None, period_s: float) -> np.ndarray:
        """Return the command (A,) after `period_s` on the way to `target`; None is a stop."""
        stopped = _after(self._stop(self._state), period_s)
        if target is None:
            self._last_target, chosen = None, stopped
        else:
            target = np.clip(target, self._limits.lower, self._limits.upper)
            moved = self._approach(target, period_s)
            self._last_target = target
            safe = self._can_stop(moved)
            chosen = tuple(np.where(safe, ours, theirs) for ours, theirs in zip(moved, stopped))
            chosen[0][self._free] = target[self._free]
        for values in chosen[1:]:
            values[self._free] = 0.0
        self._state = chosen
        return self.position

    def _approach(self, target: np.ndarray, period_s: float):
        """Return the state after a step of the fastest way to the target, NaN where none is found.

        The target moves on at its own velocity. There is a way to every target; in rare states
        rounding hides it from Ruckig, mostly for that velocity only.
        """
        still = np.zeros(len(target))
        velocity = still if self._last_target is None else np.clip(
            (target - self._last_target) / period_s, -self._velocity, self._velocity)
        everything = slice(None)
        with contextlib.suppress(RuckigError, ValueError):
            return _after(self._trajectory(self._state, ControlInterface.Position, target,
                                           velocity, everything), period_s)
        result = tuple(np.full(len(target), np.nan) for _ in self._state)
        for index in range(len(target)):
            one = slice(index, index + 1)
            for choice in (velocity, still):
                with contextlib.suppress(RuckigError, ValueError):
                    state = _after(self._trajectory(self._state, ControlInterface.Position,
                                                    target, choice, one), period_s)
                    for values, value in zip(result, state):
                        values[one] = value
                    break
        return result

    def _stop(self, state) -> Trajectory:
        return self._trajectory(state, ControlInterface.Velocity, state[0],
                                np.zeros(len(state[0])), slice(None))

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

    def _trajectory(self, state, control: ControlInterface, target: np.ndarray,
                    velocity: np.ndarray, which: slice) -> Trajectory:
        """Return the trajectory of the dimensions in `which`, each by itself."""
        limits = self._velocity[which], self._acceleration[which], self._limits.jerk[which]
        size = len(limits[0])
        ask = InputParameter(size)
        ask.control_interface = control
        ask.synchronization = Synchronization.No
        ask.current_position = state[0][which]   # clipped: rounding may lead beyond a limit
        ask.current_velocity = np.clip(state[1][which], -limits[0], limits[0])
        ask.current_acceleration = np.clip(state[2][which], -limits[1], limits[1])
        ask.target_position, ask.target_velocity = target[which], velocity[which]
        ask.target_acceleration = np.zeros(size)
        ask.max_velocity, ask.max_acceleration, ask.max_jerk = limits
        result = Trajectory(size)
        code = Ruckig(size).calculate(ask, result)
        if code not in (Result.Working, Result.Finished):
            raise ValueError(f'no trajectory within the limits was found: {code}')
        return result


def _after(trajectory: Trajectory, time_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return position, velocity and acceleration (A,) at a time of the trajectory."""
    return tuple(np.array(values) for values in trajectory.at_time(time_s)[:3])
