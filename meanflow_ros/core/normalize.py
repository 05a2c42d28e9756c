"""Map physical values to [-1, 1] and back, dimension by dimension.

`fit` takes the 1 % and 99 % quantiles of the data, or its mean and three standard deviations, so
that a rare outlier does not squeeze everything else; values beyond them are clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import frozen_array

MIN_RANGE = 1e-6
METHODS = ('quantile', 'mean_std')
_QUANTILE, _DEVIATIONS = 0.01, 3.0


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Affine map of [low, high] to [-1, 1]; low and high are (D,) in physical units."""

    low: np.ndarray
    high: np.ndarray

    def __post_init__(self):
        for bound in ('low', 'high'):
            object.__setattr__(self, bound, frozen_array(getattr(self, bound), np.float64, 1,
                                                         f'normalization {bound}'))
        if self.low.shape != self.high.shape:
            raise ValueError(f'normalization low and high must have one size, '
                             f'got {self.low.size} and {self.high.size}')
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise ValueError('normalization low and high must be finite')
        if not (self.high - self.low >= MIN_RANGE).all():
            raise ValueError(f'normalization high must exceed low by at least {MIN_RANGE} '
                             f'in every dimension, got low {self.low} and high {self.high}')

    @classmethod
    def fit(cls, values: np.ndarray, *, method: str = 'quantile', lower=-np.inf,
            upper=np.inf) -> 'Normalizer':
        """Fit to `values` (N, D) by one of METHODS, never beyond the limits lower, upper (D,).

        A constant dimension c gets the range [c - 1, c + 1] within the limits.
        """
        if values.ndim != 2 or len(values) == 0 or not np.isfinite(values).all():
            raise ValueError(f'normalization needs finite values (N, D) with N > 0, '
                             f'got shape {values.shape}')
        if method not in METHODS:
            raise ValueError(f'normalization must be one of {METHODS}, got {method!r}')
        if method == 'quantile':
            low, high = np.quantile(values, [_QUANTILE, 1 - _QUANTILE], axis=0)
        else:
            reach = _DEVIATIONS * values.std(axis=0)
            low, high = values.mean(axis=0) - reach, values.mean(axis=0) + reach
        constant = high - low < MIN_RANGE
        return cls(low=np.maximum(np.where(constant, low - 1, low), lower),
                   high=np.minimum(np.where(constant, high + 1, high), upper))

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Map physical values (..., D) to [-1, 1], clipping what lies beyond."""
        return np.clip(2 * (values - self.low) / (self.high - self.low) - 1, -1, 1)

    def invert(self, values: np.ndarray) -> np.ndarray:
        """Map normalised values (..., D) back to physical units."""
        return self.low + (values + 1) / 2 * (self.high - self.low)
