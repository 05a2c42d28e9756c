"""Numbers from arrays: quantiles by name, errors per dimension, intervals over episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


def number(value) -> float | None:
    """Return a finite float, None for anything else: what JSON can hold."""
    return float(value) if value is not None and np.isfinite(value) else None


def quantiles(values: np.ndarray, shares: Sequence[int] = (50, 95, 99)) -> dict[str, float | None]:
    """Return {'p50': ..., 'max': ...} of finite values (N,), None where there is none."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return {**{f'p{share}': None for share in shares}, 'max': None}
    return {**{f'p{share}': float(np.percentile(values, share)) for share in shares},
            'max': float(values.max())}


def by_dimension(dimensions: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    """Return dimension -> value of (A,)."""
    return {name: number(value) for name, value in zip(dimensions, values, strict=True)}


def errors(dimensions: Sequence[str], difference: np.ndarray) -> dict[str, dict]:
    """Return MAE, RMSE and quantiles of the absolute error per dimension, of rows (N, A)."""
    difference = difference[np.isfinite(difference).all(axis=1)]
    size = np.abs(difference)
    empty = np.full(len(dimensions), np.nan)
    found = {'mae': size.mean(0) if len(size) else empty,
             'rmse': np.sqrt((difference ** 2).mean(0)) if len(size) else empty}
    for share in (50, 90, 99):
        found[f'p{share}'] = np.percentile(size, share, axis=0) if len(size) else empty
    found['max'] = size.max(0) if len(size) else empty
    return {name: by_dimension(dimensions, values) for name, values in found.items()}


def relative(error: np.ndarray, scale: np.ndarray) -> float | None:
    """Return the mean over the dimensions that move (scale > 0) of error / scale, each (A,)."""
    moving = scale > 0
    if not moving.any() or not np.isfinite(error[moving]).all():
        return None
    return float((error[moving] / scale[moving]).mean())


def with_interval(episodes: int, statistic: Callable[[np.ndarray], np.ndarray], *,
                  seed: int = 0) -> dict[str, float | None]:
    """Return value, low and high: a statistic with its 95 % percentile bootstrap interval.

    statistic: how often each episode counts (R, E) -> R numbers. Whole episodes, not steps, are
    drawn with replacement, since the steps of one episode are not independent (Efron and
    Tibshirani 1993, ch. 8). low and high are None for fewer than two episodes.
    """
    value = number(statistic(np.ones((1, episodes)))[0]) if episodes else None
    if episodes < 2 or value is None:
        return {'value': value, 'low': None, 'high': None}
    drawn = np.random.default_rng(seed).multinomial(
        episodes, np.full(episodes, 1 / episodes), RESAMPLES).astype(np.float64)
    values = statistic(drawn)
    low, high = np.percentile(values[np.isfinite(values)], [2.5, 97.5])
    return {'value': value, 'low': float(low), 'high': float(high)}


@dataclass(frozen=True)
class Sums:
    """Per episode the sum (E, A) of what its steps have, and the number of these steps (E,)."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> Sums:
        """Add up the finite rows of each episode's (N, A)."""
        usable = [part[np.isfinite(part).all(1)] for part in parts]
        return cls(np.stack([part.sum(0) for part in usable]),
                   np.array([len(part) for part in usable], np.float64))

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the mean over all steps (R, A) for weights (R, E); NaN where there is no step."""
        counts = weights @ self.counts
        return np.where(counts[:, None] > 0, weights @ self.sums, np.nan) / np.maximum(
            counts, 1)[:, None]

    def relative(self, weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return that mean in units of `scale`, over the dimensions that move, (R,)."""
        moving = scale > 0
        if not moving.any():
            return np.full(len(weights), np.nan)
        return (self.mean(weights)[:, moving] / scale[moving]).mean(1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of (N,) and (N,), ties averaged; None if undefined."""
    if len(a) < 3:
        return None
    first, second = _ranks(a), _ranks(b)
    if not first.std() or not second.std():
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[index]
