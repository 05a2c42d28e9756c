"""What the probes answered: spread over noise, network evaluations, changed inputs, drift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.replay.probes import AS_IS
from meanflow_ros.evaluation.replay.statistics import (
    Sums, by_dimension, number, rank_correlation, relative, with_interval)


def probed(episodes: Sequence[EpisodeReplay], names: Sequence[str], scale: np.ndarray) -> dict:
    """Return `spread`, `nfe` and `probes` of metrics.json."""
    with_probes = [each for each in episodes if len(each.probed)]
    if not with_probes:
        why = {'missing': 'no observation was probed (--probe-every)'}
        return {'spread': why, 'nfe': why, 'probes': why}
    variants = list(dict.fromkeys(name for each in with_probes for name in each.probes))
    nfe = {name: name.removeprefix('nfe ') for name in variants if name.startswith('nfe ')}
    changes = [name for name in variants
               if name != AS_IS and name not in nfe and not name.startswith('seed ')]
    return {'spread': _spread(with_probes, variants, scale),
            'nfe': {'observations': sum(len(each.probed) for each in with_probes), **{
                number: _against(with_probes, name, 'nfe 1', names, scale)
                for name, number in nfe.items()}} if nfe else {
                    'missing': 'the policy starts from no noise'},
            'probes': {name: _against(with_probes, name, AS_IS, names, scale)
                       for name in changes}}


def _error(episode: EpisodeReplay, chunks: np.ndarray) -> np.ndarray:
    """Return the mean absolute error (Q, A) over the recorded steps of each chunk (Q, T, A)."""
    recorded = episode.recorded[episode.probed][:, :, None]
    size = np.abs(chunks - episode.reference[episode.probed])
    count = recorded.sum(1)
    return np.where(count > 0, np.where(recorded, size, 0.0).sum(1) / np.maximum(count, 1), np.nan)


def _against(episodes, name: str, plain: str, names, scale: np.ndarray) -> dict:
    """Return the error of a variant, what it adds to that of `plain`, and how far the chunk moved.

    error, effect and moved are relative: in units of the recorded actions' own spread.
    """
    errors, effects, moved = [], [], []
    for each in episodes:
        asked = each.probes.get(name)
        if asked is None:
            continue
        base = each.probes[plain]
        error = _error(each, asked)
        usable = np.isfinite(error).all(1)
        errors.append(error[usable])
        effects.append((error - _error(each, base))[usable])
        moved.append(np.abs(asked - base).mean(1)[usable])
    if not sum(map(len, errors)):
        return {'missing': 'there was nothing to ask it with'}
    error, move, effect = np.concatenate(errors), np.concatenate(moved), Sums.of(effects)
    return {'observations': len(error), 'mae': by_dimension(names, error.mean(0)),
            'error': relative(error.mean(0), scale),
            'effect': with_interval(len(effects), lambda drawn: effect.relative(drawn, scale)),
            'moved': relative(move.mean(0), scale)}


def _spread(episodes, variants: list[str], scale: np.ndarray) -> dict:
    """Return how far chunks differ by noise alone, and whether that tells where they are wrong."""
    seeds = [name for name in variants if name.startswith('seed ')]
    if not seeds:
        return {'missing': 'the policy starts from no noise'}
    spreads, errors = [], []
    moving = scale > 0
    for each in episodes:
        draws = np.stack([each.probes[AS_IS], *(each.probes[name] for name in seeds)])
        error = _error(each, each.probes[AS_IS])
        usable = np.isfinite(error).all(1)
        deviation = draws.std(0, ddof=1).mean(1)                       # (Q, A)
        spreads.append((deviation[:, moving] / scale[moving]).mean(1)[usable])
        errors.append((error[:, moving] / scale[moving]).mean(1)[usable])
    spread, error = np.concatenate(spreads), np.concatenate(errors)
    if not len(spread) or not moving.any():
        return {'missing': 'nothing to compare with'}
    order = np.argsort(spread, kind='stable')
    third = max(1, len(order) // 3)
    return {'observations': len(spread), 'seeds': 1 + len(seeds), 'mean': number(spread.mean()),
            'rank_correlation_with_error': rank_correlation(spread, error),
            'error_where_sure': number(error[order[:third]].mean()),
            'error_where_unsure': number(error[order[-third:]].mean()),
            'points': [[number(a), number(b)] for a, b in zip(spread[:500], error[:500])]}


def drift(episodes: Sequence[EpisodeReplay], robot, state_normalizer, action_normalizer,
          relative_to: Sequence[str], heard: Sequence[str] | None) -> dict:
    """Return how far the recording's inputs and actions are from what training has seen.

    The checkpoint holds the range (low, high) of most of the training data per dimension; with
    the default normalisation 1 % lie below and 1 % above it. outside: share of values outside;
    centre: mean place within the range, -1 at low and 1 at high. heard: the instructions of the
    training, None if the checkpoint does not say.
    """
    found = {'states': {}, 'actions': {}, 'pictures': {},
             'instructions': _unheard(episodes, heard)}
    states = np.concatenate([each.states for each in episodes])
    if state_normalizer is not None:
        found['states'] = _places(robot.state_names, states, state_normalizer)
    if action_normalizer is not None and not any(relative_to):
        actions = np.concatenate([each.reference[:, 0][each.recorded[:, 0]]
                                  for each in episodes])
        found['actions'] = _places(robot.action_space.dimensions, actions, action_normalizer)
    for camera in robot.cameras:
        sizes = {each.pictures.sizes[camera.name] for each in episodes
                 if camera.name in each.pictures.sizes}
        found['pictures'][camera.name] = {
            'trained': [camera.width, camera.height],
            'recorded': sorted(list(size) for size in sizes),
            'same': all(size == (camera.width, camera.height) for size in sizes)}
    return found


def _unheard(episodes: Sequence[EpisodeReplay], heard: Sequence[str] | None) -> dict:
    """Return the recorded instructions that training has not heard."""
    if heard is None:
        return {'missing': 'the checkpoint does not say which instructions it was trained with'}
    told = {text for each in episodes for text in each.instructions}
    return {'trained': len(heard), 'recorded': len(told), 'unheard': sorted(told - set(heard))}


def _places(names, values: np.ndarray, normalizer) -> dict:
    low, high = np.asarray(normalizer.low), np.asarray(normalizer.high)
    place = 2 * (values - low) / (high - low) - 1
    return {name: {'outside': number((np.abs(place[:, index]) > 1 + 1e-9).mean()),
                   'centre': number(place[:, index].mean()),
                   'farthest': number(np.abs(place[:, index]).max())}
            for index, name in enumerate(names)} if len(values) else {}
