"""What a user gets without a policy: three simple answers to every observation.

They are computed from the recordings alone, and for an episode only from the other episodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meanflow_ros.evaluation.replay.episode import EpisodeReplay

REPEAT_LAST, MEAN_ACTION, NEAREST = 'repeat_last', 'mean_action', 'nearest_neighbour'
BASELINES = (REPEAT_LAST, MEAN_ACTION, NEAREST)
MOST_NEIGHBOURS = 20_000
ROWS_AT_A_TIME = 256
Answers = dict[str, list[np.ndarray] | None]


def baseline_chunks(episodes: Sequence[EpisodeReplay]) -> tuple[Answers, dict[str, str]]:
    """Return baseline -> chunks (N, T, A) per episode, None where there is none, and why not.

    repeat_last: the command in force before the observation, for all steps; before the first
    command it is the mean. mean_action: of all other episodes. nearest_neighbour: the recorded
    chunk of the observation in the other episodes whose proprioception is nearest, each joint
    scaled by its spread.
    """
    means, answers, why = _means(episodes), {}, {}
    if means is None:
        why[MEAN_ACTION] = 'there is no other episode to take the mean of'
    answers[MEAN_ACTION] = None if means is None else [
        np.broadcast_to(mean, each.reference.shape) for mean, each in zip(means, episodes)]
    answers[REPEAT_LAST] = [_repeated(each, None if means is None else means[index])
                            for index, each in enumerate(episodes)]
    answers[NEAREST] = None
    if not episodes or episodes[0].states.shape[1] == 0:
        why[NEAREST] = 'the policy uses no proprioception'
    elif len(episodes) < 2:
        why[NEAREST] = 'there is no other episode to look in'
    else:
        answers[NEAREST] = _nearest(episodes)
    return {name: answers[name] for name in BASELINES}, why


def _means(episodes: Sequence[EpisodeReplay]) -> list[np.ndarray] | None:
    """Return for each episode the mean recorded action (A,) of the others."""
    if len(episodes) < 2:
        return None
    sums = np.stack([each.reference[:, 0][each.recorded[:, 0]].sum(0) for each in episodes])
    counts = np.array([each.recorded[:, 0].sum() for each in episodes])
    others = counts.sum() - counts
    if (others == 0).any():
        return None
    return list((sums.sum(0) - sums) / others[:, None])


def _repeated(episode: EpisodeReplay, mean: np.ndarray | None) -> np.ndarray:
    last = episode.last_action
    if mean is not None:
        last = np.where(np.isfinite(last), last, mean)
    return np.broadcast_to(last[:, None], episode.reference.shape)


def _nearest(episodes: Sequence[EpisodeReplay]) -> list[np.ndarray]:
    usable = [np.flatnonzero(each.recorded[:, 0]) for each in episodes]
    total = sum(map(len, usable))
    every = max(1, -(-total // MOST_NEIGHBOURS))
    pool = [rows[::every] for rows in usable]
    states = np.concatenate([each.states[rows] for each, rows in zip(episodes, pool)])
    chunks = np.concatenate([each.reference[rows] for each, rows in zip(episodes, pool)])
    owner = np.repeat(np.arange(len(episodes)), [len(rows) for rows in pool])
    spread = states.std(0)
    scale = np.where(spread > 0, spread, 1.0)
    states = states / scale
    squares = (states ** 2).sum(1)
    found = []
    for index, each in enumerate(episodes):
        own = each.states / scale
        rows = np.empty(len(own), np.int64)
        for start in range(0, len(own), ROWS_AT_A_TIME):
            some = own[start:start + ROWS_AT_A_TIME]
            distance = squares - 2 * some @ states.T
            distance[:, owner == index] = np.inf
            rows[start:start + ROWS_AT_A_TIME] = distance.argmin(1)
        found.append(chunks[rows])
    return found
