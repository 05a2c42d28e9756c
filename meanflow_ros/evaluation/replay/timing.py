"""When things happened: latency, age, stale steps, missed deadlines, seams between chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.evaluation.replay.episode import ACCEPTED, DISCARDED, UNFINISHED, EpisodeReplay
from meanflow_ros.evaluation.replay.statistics import number, quantiles


def timing(episodes: Sequence[EpisodeReplay], robot: RobotSpec) -> dict:
    """Return the parts of metrics.json that tell of time; see docs/replay.md."""
    begun = [first_step(each) for each in episodes]
    shares = shares_of(episodes)
    expired = sum(int(each.expired.sum()) for each in episodes)
    live = int(shares['rejected'][1].sum())
    starts = np.array(begun) * robot.period_s
    return {
        'deadline_misses': _counted(*shares['missed']),
        'stale': _counted(*shares['stale']),
        'expired': {'count': expired, 'share': _share(expired, live * robot.horizon)},
        'start_s': quantiles(starts, (50,)),
        'observation_age_s': quantiles(_all([each.age_s for each in episodes])),
        'latency_ms': quantiles(_all([(each.done_ns - each.taken_ns) / 1e6
                                      for each in episodes])),
        'seams': _seams(episodes, robot),
        'jerk': _jerk(episodes, robot)}


def shares_of(episodes: Sequence[EpisodeReplay]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return name -> how many (E,) of how many (E,), per episode.

    missed: steps. stale: executed steps. rejected: chunks, by the guard.
    """
    missed = np.array([each.missed.sum() for each in episodes], np.int64)
    executed = np.array([(each.source >= 0).sum() for each in episodes], np.int64)
    stale = np.array([each.stale.sum() for each in episodes], np.int64)
    checked = [~np.isin(each.outcome, (DISCARDED, UNFINISHED)) for each in episodes]
    rejected = np.array([(own & (each.outcome != ACCEPTED)).sum()
                         for own, each in zip(checked, episodes)], np.int64)
    return {'missed': (missed, missed + executed), 'stale': (stale, executed),
            'rejected': (rejected, np.array([own.sum() for own in checked], np.int64))}


def first_step(episode: EpisodeReplay) -> int:
    """Return the control step at which the first action is executed; their number if none is."""
    due = np.flatnonzero(episode.source >= 0)
    return int(due[0]) if len(due) else len(episode.source)


def guarded(episodes: Sequence[EpisodeReplay]) -> dict:
    """Return how many chunks passed, were discarded, and what the guard did, by kind."""
    outcomes: Counter[str] = Counter()
    interventions: Counter[str] = Counter()
    for each in episodes:
        outcomes.update(each.outcome.tolist())
        interventions.update(each.interventions)
    rejected = _counted(*shares_of(episodes)['rejected'])
    return {'chunks': sum(outcomes.values()), 'accepted': outcomes[ACCEPTED],
            'rejected': rejected['count'], 'rejected_share': rejected['share'],
            'discarded': outcomes[DISCARDED], 'unfinished': outcomes[UNFINISHED],
            'interventions': dict(sorted(interventions.items()))}


def missing_input(episodes: Sequence[EpisodeReplay]) -> dict:
    """Return for how long there was no observation, in all and by stream and kind."""
    causes: dict[str, list[float]] = {}
    for each in episodes:
        for what, (times, seconds) in each.missing.items():
            total = causes.setdefault(what, [0, 0.0])
            total[0] += times
            total[1] += seconds
    seconds = sum(value for _, value in causes.values())
    return {'seconds': seconds, 'share': _share(seconds, sum(each.length_s for each in episodes)),
            'causes': {what: {'times': int(times), 'seconds': value}
                       for what, (times, value) in sorted(causes.items())}}


def seams_of(episode: EpisodeReplay, period_s: float) -> tuple[np.ndarray, ...]:
    """Return for each seam its control step (K,), the jump (K, A) and that of the slope (K, A).

    A seam is a step at which another chunk takes over. The jump is how far the new chunk is from
    what the old one had for the same time; an old chunk that had ended holds its last value, with
    slope 0. Two chunks of one motion have none, however fast it is.
    """
    rows, jumps, slopes = [], [], []
    last = -1
    for index, source in enumerate(episode.source.tolist()):
        if source < 0:
            continue
        if last >= 0 and source != last:
            at_ns = int(episode.tick_ns[index])
            new, old = (_at(episode, each, at_ns, period_s) for each in (source, last))
            rows.append(index)
            jumps.append(new[0] - old[0])
            slopes.append(new[1] - old[1])
        last = source
    size = len(episode.dimensions)
    return (np.array(rows, np.int64), np.array(jumps).reshape(-1, size),
            np.array(slopes).reshape(-1, size))


def _at(episode: EpisodeReplay, source: int, at_ns: int,
        period_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Return what chunk `source` has for a time, (A,), and its slope there, (A,) per s."""
    actions = episode.actions[source]
    begin_ns = _first_due_ns(episode, source, period_s)
    place = (at_ns - begin_ns) / (period_s * 1e9)
    if place >= len(actions) or len(actions) == 1:
        return actions[-1], np.zeros(actions.shape[1])
    low = max(0, min(int(np.floor(place + 1e-6)), len(actions) - 2))
    slope = actions[low + 1] - actions[low]
    return actions[low] + slope * min(max(0.0, place - low), 1.0), slope / period_s


def _first_due_ns(episode: EpisodeReplay, source: int, period_s: float) -> int:
    return int(episode.stamp_ns[source]) + round(episode.first_step * period_s * 1e9)


def _seams(episodes: Sequence[EpisodeReplay], robot: RobotSpec) -> dict:
    found = [seams_of(each, robot.period_s) for each in episodes]
    jumps = _rows([jump for _, jump, _ in found], robot)
    slopes = _rows([slope for _, _, slope in found], robot)
    span = robot.action_space.upper - robot.action_space.lower
    names = robot.action_space.dimensions
    return {'count': len(jumps),
            'jump': {name: quantiles(np.abs(jumps[:, i])) for i, name in enumerate(names)},
            'jump_share_of_range': quantiles((np.abs(jumps) / span).max(1)
                                             if len(jumps) else np.zeros(0)),
            'velocity_jump': {name: quantiles(np.abs(slopes[:, i]))
                              for i, name in enumerate(names)}}


def _jerk(episodes: Sequence[EpisodeReplay], robot: RobotSpec) -> dict:
    """Return the third difference of the commands inside chunks, in units / s^3."""
    names = robot.action_space.dimensions
    if robot.horizon < 4:
        return {name: quantiles(np.zeros(0)) for name in names}
    third = [np.diff(each.actions, n=3, axis=1).reshape(-1, len(names)) for each in episodes]
    size = np.abs(_rows(third, robot)) / robot.period_s ** 3
    return {name: quantiles(size[:, index]) for index, name in enumerate(names)}


def _rows(parts: list[np.ndarray], robot: RobotSpec) -> np.ndarray:
    return np.concatenate([np.zeros((0, robot.action_space.size)), *parts])


def _all(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])


def _counted(parts: np.ndarray, wholes: np.ndarray) -> dict:
    return {'count': int(parts.sum()), 'share': _share(int(parts.sum()), int(wholes.sum()))}


def _share(part: float, whole: float) -> float | None:
    return number(part / whole) if whole else None
