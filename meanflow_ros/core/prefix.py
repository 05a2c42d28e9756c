"""The first steps of a chunk, where they are known: what is executed while a chunk is inferred.

A network that was trained for it (`max_prefix`) continues them; see `meanflow.with_prefix`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.core.normalize import Normalizer


def checked_prefix(prefix: np.ndarray | None, robot: RobotSpec, longest: int) -> np.ndarray:
    """Return a prefix as (n, A) float64, n = 0 for none; ValueError says what is wrong."""
    space = robot.action_space
    if prefix is None or len(prefix) == 0:
        return np.zeros((0, space.size))
    prefix = np.asarray(prefix, np.float64)
    if prefix.ndim != 2 or prefix.shape[1] != space.size:
        raise ValueError(f'a prefix is (n, {space.size}), the steps of {list(space.dimensions)}, '
                         f'got {prefix.shape}')
    if len(prefix) > longest:
        raise ValueError(f'the prefix has {len(prefix)} steps, but this checkpoint was trained '
                         f'for at most {longest}: use a shorter delay, or train with '
                         f'--max-prefix {len(prefix)} or more')
    if not np.isfinite(prefix).all():
        raise ValueError('the prefix has values that are not finite: give the actions that will '
                         'be executed')
    return prefix


def known_steps(prefixes: Sequence[np.ndarray], origins: np.ndarray, normalizer: Normalizer, *,
                horizon: int, size: int) -> tuple[Tensor, Tensor]:
    """Return x (B, T, size) in [-1, 1] and which of its steps are given (B, T) bool.

    prefixes: (n, A) each, as `checked_prefix` returns them. origins: (B, A), what relative actions
    are relative to, 0 where they are not.
    """
    x = torch.zeros(len(prefixes), horizon, size)
    given = torch.zeros(len(prefixes), horizon, dtype=torch.bool)
    for row, (prefix, origin) in enumerate(zip(prefixes, origins)):
        values = normalizer.apply(prefix - origin)
        x[row, :len(prefix), :values.shape[1]] = torch.from_numpy(values)
        given[row, :len(prefix)] = True
    return x, given
