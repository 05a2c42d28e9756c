"""The guard: the only maker of SafeChunk, over the whole chunk, before anything is published."""

from __future__ import annotations

from collections import Counter

import numpy as np

from meanflow_ros.core.contract import (
    _GUARD_SEAL, ActionChunk, ActionSpace, RobotSpec, SafeChunk)
from meanflow_ros.core.timeline import steps_still_due

LIMIT_TOLERANCE = 1e-6  # share of a dimension's range, for rounding alone


class Rejected(ValueError):
    """A chunk that the guard refuses; `kind` is one of a few words, the message says which."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Guard:
    """Checks a chunk against its robot: length, dimensions, finite, limits, still due."""

    def __init__(self, robot: RobotSpec):
        self._robot = robot
        self.rejections: Counter[str] = Counter()

    def check(self, chunk: ActionChunk, *, now_ns: int) -> SafeChunk:
        """Return the steps still due at `now_ns`; Rejected (counted by kind) otherwise."""
        try:
            self._check_actions(chunk, self._robot.action_space)
            timed = steps_still_due(chunk, now_ns=now_ns)
            if timed is None:
                late_s = (now_ns - chunk.due_ns(len(chunk.actions) - 1)) / 1e9
                raise Rejected('expired', f'every step of the chunk was due before now, the last '
                                          f'{late_s:.3f} s ago: inference is too slow or the '
                                          f'picture too old')
        except Rejected as error:
            self.rejections[error.kind] += 1
            raise
        return SafeChunk(timed=timed, space=self._robot.action_space, seal=_GUARD_SEAL)

    def _check_actions(self, chunk: ActionChunk, space: ActionSpace) -> None:
        expected = (self._robot.horizon, space.size)
        if chunk.actions.shape != expected:
            raise Rejected('shape', f'the chunk has shape {chunk.actions.shape}, the checkpoint '
                                    f'promises {expected}')
        finite = np.isfinite(chunk.actions)
        if not finite.all():
            step, dimension = np.argwhere(~finite)[0]
            raise Rejected('not_finite', f'{space.dimensions[dimension]!r} is not finite at '
                                         f'step {step}')
        slack = LIMIT_TOLERANCE * (space.upper - space.lower)
        outside = (chunk.actions < space.lower - slack) | (chunk.actions > space.upper + slack)
        if outside.any():
            step, dimension = np.argwhere(outside)[0]
            raise Rejected(
                'limits', f'{space.dimensions[dimension]!r} is '
                f'{chunk.actions[step, dimension]:.6g} {space.units[dimension]} at step {step}, '
                f'outside [{space.lower[dimension]:g}, {space.upper[dimension]:g}]')
