"""How near the policy comes to what was recorded: errors, gripper, direction, beside baselines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meanflow_ros.core.contract import ActionSpace, RobotSpec
from meanflow_ros.evaluation.replay.baselines import Answers
from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.replay.statistics import (
    Sums, by_dimension, errors, number, quantiles, relative, with_interval)

SWITCH_WITHIN_S = 1.0
MOVES_ABOVE = 0.05           # of the typical size: below it a direction means nothing


def scale_of(episodes: Sequence[EpisodeReplay]) -> np.ndarray:
    """Return (A,) how far recorded actions are from their mean: the unit of relative errors."""
    actions = recorded_actions(episodes)
    return np.abs(actions - actions.mean(0)).mean(0)


def recorded_actions(episodes: Sequence[EpisodeReplay]) -> np.ndarray:
    """Return the recorded action (N, A) at step 0 of every chunk that has one."""
    return np.concatenate([each.reference[:, 0][each.recorded[:, 0]] for each in episodes])


def executed_difference(episode: EpisodeReplay, chunks: np.ndarray | None = None) -> np.ndarray:
    """Return executed minus recorded (M, A), NaN where there is no step, or none recorded.

    chunks: (N, T, A) in place of the policy's, at the steps that were executed.
    """
    due = (episode.source >= 0) & episode.tick_recorded
    return np.where(due[:, None], executed_by(episode, chunks) - episode.expected, np.nan)


def executed_by(episode: EpisodeReplay, chunks: np.ndarray | None = None) -> np.ndarray:
    """Return what is executed at every control step (M, A), of chunks (N, T, A) or the policy."""
    return episode.executed if chunks is None else chunks[episode.source, episode.step]


def executed_pairs(episodes: Sequence[EpisodeReplay], chunks: Sequence[np.ndarray] | None = None):
    """Return of each episode the times (K,), what is executed and what was recorded, (K, A).

    chunks: as for executed_difference. Steps for which either is unknown are left out.
    """
    for index, each in enumerate(episodes):
        own = executed_by(each, None if chunks is None else chunks[index])
        due = each.tick_recorded & (each.source >= 0) & np.isfinite(own).all(1)
        yield each.tick_ns[due], own[due], each.expected[due]


def first_rows(episode: EpisodeReplay) -> np.ndarray:
    """Return the control steps (K,) at which a chunk is executed for the first time."""
    due = np.flatnonzero((episode.source >= 0) & episode.tick_recorded)
    return due[np.diff(episode.source[due], prepend=-1) != 0]


def accuracy(episodes: Sequence[EpisodeReplay], robot: RobotSpec, baselines: Answers,
             why_not: dict[str, str]) -> dict:
    """Return the parts of metrics.json that tell of errors; see docs/replay.md."""
    names, scale = robot.action_space.dimensions, scale_of(episodes)
    differences = [executed_difference(each) for each in episodes]
    firsts = [difference[first_rows(each)] for each, difference in zip(episodes, differences)]
    executed = errors(names, np.concatenate(differences))
    first = errors(names, np.concatenate(firsts))
    policy = _absolute(firsts)
    found = {'scale': by_dimension(names, scale), 'executed': executed,
             'first_step': first, 'first_step_mae': first['mae'],
             'relative_error': with_interval(
                 len(episodes), lambda weights: policy.relative(weights, scale)),
             'horizon': _horizon(episodes, names, None), 'gripper': gripper(episodes, robot),
             'direction': direction(episodes, robot), 'baselines': {}}
    for name, chunks in baselines.items():
        found['baselines'][name] = ({'missing': why_not.get(name, '')} if chunks is None else
                                    _baseline(episodes, chunks, robot, scale, policy))
    return found


def _absolute(parts: Sequence[np.ndarray]) -> Sums:
    return Sums.of([np.abs(part) for part in parts])


def _baseline(episodes, chunks, robot: RobotSpec, scale: np.ndarray, policy: Sums) -> dict:
    """Return the baseline's errors, and by how much its relative error is above the policy's."""
    differences = [executed_difference(each, own) for each, own in zip(episodes, chunks)]
    firsts = [difference[first_rows(each)] for each, difference in zip(episodes, differences)]
    names, own, count = robot.action_space.dimensions, _absolute(firsts), len(episodes)
    first = errors(names, np.concatenate(firsts))
    return {'executed': errors(names, np.concatenate(differences)), 'first_step': first,
            'first_step_mae': first['mae'],
            'relative_error': with_interval(count, lambda drawn: own.relative(drawn, scale)),
            'policy_better_by': with_interval(count, lambda drawn: own.relative(drawn, scale)
                                              - policy.relative(drawn, scale)),
            'horizon': _horizon(episodes, names, chunks),
            'gripper': gripper(episodes, robot, chunks),
            'direction': direction(episodes, robot, chunks)}


def first_step_errors(episodes: Sequence[EpisodeReplay]) -> Sums:
    """Return the absolute errors of the first executed step of each chunk."""
    return _absolute([executed_difference(each)[first_rows(each)] for each in episodes])


def _horizon(episodes, names, chunks: list[np.ndarray] | None) -> dict:
    """Return the error by step of the horizon, over all chunks, executed or not."""
    taken = [each.actions for each in episodes] if chunks is None else chunks
    difference = np.concatenate([np.where(each.recorded[:, :, None], own - each.reference, np.nan)
                                 for each, own in zip(episodes, taken)])
    by_step = [errors(names, difference[:, step]) for step in range(difference.shape[1])]
    counts = np.isfinite(difference).all(2).sum(0)
    return {'count': counts.tolist(), **{
        what: {name: [each[what][name] for each in by_step] for name in names}
        for what in ('mae', 'rmse', 'p50', 'p90', 'p99')}}


def per_episode(episode: EpisodeReplay, scale: np.ndarray) -> dict:
    """Return the short account of one episode."""
    difference = executed_difference(episode)
    first = difference[first_rows(episode)]
    names = episode.dimensions
    mae = errors(names, first)['mae']
    values = np.array([np.nan if mae[name] is None else mae[name] for name in names])
    return {'name': episode.name, 'bag': episode.bag, 'number': episode.number,
            'instructions': list(episode.instructions), 'notes': list(episode.notes),
            'seconds': episode.length_s, 'observations': len(episode.stamp_ns),
            'steps': len(episode.tick_ns), 'first_step_mae': mae,
            'executed_mae': errors(names, difference)['mae'],
            'relative_error': relative(values, scale),
            'deadline_misses': int(episode.missed.sum()),
            'interventions': dict(sorted(episode.interventions.items()))}


def gripper(episodes: Sequence[EpisodeReplay], robot: RobotSpec,
            chunks: Sequence[np.ndarray] | None = None) -> dict:
    """Return per gripper how often open and closed agree, and how late it switches.

    chunks: per episode (N, T, A), in place of the policy's. Open and closed are told apart at the
    middle of what was recorded. A recorded switch is met by the nearest switch in the same
    direction within SWITCH_WITHIN_S.
    """
    found = {}
    for index, name in gripper_dimensions(robot.action_space):
        values = np.concatenate([recorded[:, index] for _, _, recorded
                                 in executed_pairs(episodes)])
        if not values.size or values.min() == values.max():
            found[name] = {'missing': 'the recorded gripper never moves'}
            continue
        middle = (values.min() + values.max()) / 2
        agreed, offsets, missed, extra = [], [], 0, 0
        for times_ns, executed, recorded in executed_pairs(episodes, chunks):
            ours, theirs = (rows[:, index] > middle for rows in (executed, recorded))
            agreed.append(ours == theirs)
            late, without, beside = _switches(times_ns / 1e9, ours, theirs)
            offsets += late
            missed, extra = missed + without, extra + beside
        found[name] = {'threshold': float(middle),
                       'agreement': _share(np.concatenate(agreed)),
                       'switches': len(offsets) + missed, 'missed': missed, 'extra': extra,
                       'late_s': quantiles(np.array(offsets), (5, 50, 95))}
    return found


def _share(hits: np.ndarray) -> float | None:
    return number(hits.mean()) if len(hits) else None


def gripper_dimensions(space: ActionSpace) -> list[tuple[int, str]]:
    """Return (index, name) of the grippers: as the checkpoint says, else by their names."""
    told = getattr(space, 'gripper', ())
    return [(index, name) for index, name in enumerate(space.dimensions)
            if (name in told if told else 'grip' in name.lower())]


def _switches(times: np.ndarray, ours: np.ndarray, theirs: np.ndarray):
    """Return how late each met switch is, s, and the numbers of those missed and of extra ones."""
    own = [(time, value) for time, value in _edges(times, ours)]
    late, missed = [], 0
    for time, value in _edges(times, theirs):
        near = min((each for each in own if each[1] == value
                    and abs(each[0] - time) <= SWITCH_WITHIN_S),
                   key=lambda each: abs(each[0] - time), default=None)
        if near is None:
            missed += 1
        else:
            own.remove(near)
            late.append(near[0] - time)
    return late, missed, len(own)


def _edges(times: np.ndarray, values: np.ndarray) -> list[tuple[float, bool]]:
    at = np.flatnonzero(values[1:] != values[:-1]) + 1
    return [(float(times[index]), bool(values[index])) for index in at]


def direction(episodes: Sequence[EpisodeReplay], robot: RobotSpec,
              chunks: Sequence[np.ndarray] | None = None) -> dict:
    """Return the cosine between commanded and recorded direction, over dimensions that are rates.

    chunks: per episode (N, T, A), in place of the policy's. Each is divided by its typical
    recorded size; steps at which either hardly moves are left out.
    """
    rates = rate_dimensions(robot.action_space)
    if not rates:
        return {'missing': 'no dimension of the action space is a rate or an increment'}
    pairs = [(executed[:, rates], recorded[:, rates])
             for _, executed, recorded in executed_pairs(episodes, chunks)]
    ours, theirs = (np.concatenate(part) for part in zip(*pairs))
    size = np.abs(theirs).mean(0) if len(theirs) else np.ones(len(rates))
    size = np.where(size > 0, size, 1.0)
    ours, theirs = ours / size, theirs / size
    lengths = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    moving = (np.minimum(*lengths) > MOVES_ABOVE * np.sqrt(len(rates))) if len(ours) else []
    if not np.any(moving):
        return {'missing': 'nothing moves'}
    cosine = ((ours * theirs).sum(1) / np.maximum(lengths[0] * lengths[1], 1e-300))[moving]
    return {'dimensions': [robot.action_space.dimensions[index] for index in rates],
            'steps': int(np.sum(moving)), 'mean': float(cosine.mean()),
            'p10': float(np.percentile(cosine, 10)), 'against': float((cosine < 0).mean())}


def rate_dimensions(space: ActionSpace) -> list[int]:
    """Return the dimensions that are rates: as the checkpoint says, else by their unit."""
    told = getattr(space, 'rates', ())
    return [index for index, (name, unit) in enumerate(zip(space.dimensions, space.units))
            if (name in told if told else unit.endswith('/s'))]
