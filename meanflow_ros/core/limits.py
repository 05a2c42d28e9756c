"""How far and how fast each dimension of a command may go, and where those numbers come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import ActionSpace, frozen_array
from meanflow_ros.core.schema import known_or_hint

RATES = ('velocity', 'acceleration', 'jerk')


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of A dimensions, each (A,) float64, in the units of the action space.

    lower, upper: of the commanded value. velocity, acceleration, jerk: of its change, per s, s^2
    and s^3, above 0; inf is no limit.
    """

    names: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray

    def __post_init__(self):
        for name in ('lower', 'upper', *RATES):
            values = frozen_array(getattr(self, name), np.float64, 1, f'{name} limits')
            if values.shape != (len(self.names),) or np.isnan(values).any():
                raise ValueError(f'{name} limits must be {len(self.names)} numbers, got {values}')
            object.__setattr__(self, name, values)
        for index, name in enumerate(self.names):
            if self.lower[index] > self.upper[index]:
                raise ValueError(f'{name!r} has no room left: lower limit {self.lower[index]:g} '
                                 f'above upper limit {self.upper[index]:g}')
            for rate in RATES:
                if not getattr(self, rate)[index] > 0:
                    raise ValueError(f'{rate} limit of {name!r} must be above 0, '
                                     f'got {getattr(self, rate)[index]:g}')

    @classmethod
    def of(cls, space: ActionSpace) -> 'Limits':
        """Return the limits that a checkpoint carries."""
        def known(values):
            return np.full(space.size, np.inf) if values is None else values
        return cls(names=space.dimensions, lower=space.lower, upper=space.upper,
                   velocity=known(space.max_velocity), acceleration=known(space.max_acceleration),
                   jerk=known(space.max_jerk))

    def tightened(self, what: str, values: Mapping[str, float]) -> 'Limits':
        """Return these limits with `what` (a field's name) made stricter in some dimensions.

        ValueError names a dimension that is unknown, or whose limit would be loosened.
        """
        changed = getattr(self, what).copy()
        for name, value in values.items():
            if name not in self.names:
                raise ValueError(f'{what} limit of unknown dimension {name!r} '
                                 f'({known_or_hint(name, self.names)})')
            index = self.names.index(name)
            looser = value < changed[index] if what == 'lower' else value > changed[index]
            if looser or np.isnan(value):
                raise ValueError(f'{what} limit {value:g} of {name!r} would loosen the present '
                                 f'{changed[index]:g}: limits can only be tightened')
            changed[index] = value
        return dataclasses.replace(self, **{what: changed})

    def equal(self, other: 'Limits') -> bool:
        """Whether both say the same."""
        return self.names == other.names and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ('lower', 'upper', *RATES))

    def within(self, other: 'Limits') -> 'Limits':
        """Return the stricter of both, dimension by dimension; `other` may name only some."""
        own = {name: getattr(self, name).copy() for name in ('lower', 'upper', *RATES)}
        for there, name in enumerate(other.names):
            here = self.names.index(name)
            for what, values in own.items():
                pick = max if what == 'lower' else min
                values[here] = pick(values[here], getattr(other, what)[there])
        return dataclasses.replace(self, **own)
