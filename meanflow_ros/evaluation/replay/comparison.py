"""`--compare A B`: two checkpoints, or two settings, on the same recordings, paired by episode."""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from meanflow_ros.core.schema import known_or_hint
from meanflow_ros.evaluation.replay.accuracy import first_step_errors, scale_of
from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.replay.running import METRICS, REPORT, Replayed, replay
from meanflow_ros.evaluation.replay.statistics import number, with_interval
from meanflow_ros.evaluation.replay.summary import environment, write_json
from meanflow_ros.evaluation.replay.timing import shares_of
from meanflow_ros.evaluation.replay.verdict import GOOD, LOOK, Finding
from meanflow_ros.evaluation.report import write_page

SCHEMA, VERSION = 'meanflow_ros/replay_comparison', 1
FIELDS = {'checkpoint': Path, 'sampler_steps': int, 'seed': int, 'execution': str, 'latency': str,
          'dtype': str, 'device': str, 'motion': Path, 'urdf': str}
OVERALL = 'relative_error'


def compare(bags: Sequence[Path], arguments: argparse.Namespace) -> Replayed:
    """Replay as A and as B, each in a directory of its own, and write what differs."""
    both = {name: varied(arguments, text, name)
            for name, text in zip('ab', arguments.compare)}
    done = {}
    for name, own in both.items():
        print(f'{name.upper()}: {arguments.compare["ab".index(name)]}')
        done[name] = replay(bags, own)
        if done[name].interrupted:
            return done[name]
    document = difference(done['a'], done['b'], arguments.compare)
    write_json(arguments.out / METRICS, document)
    write_page(arguments.out / REPORT, 'Replay comparison',
               {'kind': 'comparison', 'document': document, 'media': []})
    return Replayed(document, [], interrupted=False)


def varied(arguments: argparse.Namespace, text: str, name: str) -> argparse.Namespace:
    """Return the arguments of A or B: a checkpoint directory, or field=value,field=value."""
    own = copy.copy(arguments)
    own.out = arguments.out / name
    if '=' not in text:
        text = f'checkpoint={text}'
    for part in text.split(','):
        field, equals, value = part.partition('=')
        if not equals or field not in FIELDS:
            raise ValueError(f'--compare {text!r}: write a checkpoint directory or FIELD=VALUE '
                             f'({known_or_hint(field, FIELDS)})')
        try:
            setattr(own, field, FIELDS[field](value))
        except ValueError:
            raise ValueError(f'--compare {text!r}: {value!r} is no number') from None
    return own


def difference(a: Replayed, b: Replayed, names: Sequence[str]) -> dict:
    """Return the content of metrics.json: B less A over the episodes that both have.

    ValueError if there is none, or the two command different things.
    """
    dimensions = [done.document['policy']['dimensions'] for done in (a, b)]
    if dimensions[0] != dimensions[1]:
        raise ValueError(f'A and B cannot be compared: A commands {dimensions[0]}, '
                         f'B {dimensions[1]}')
    pairs = _pairs(a.episodes, b.episodes)
    if not pairs:
        raise ValueError('A and B have no episode in common')
    units, scale = a.document['policy']['units'], scale_of([first for first, _ in pairs])
    both = [first_step_errors(own) for own in zip(*pairs)]
    found = {OVERALL: _row([functools.partial(own.relative, scale=scale) for own in both],
                           len(pairs), 1.0, '')}
    for index, name in enumerate(dimensions[0]):
        found[name] = _row([lambda drawn, own=own, at=index: own.mean(drawn)[:, at]
                            for own in both], len(pairs), scale[index], units[name])
    counts = [shares_of(own) for own in zip(*pairs)]
    shares = {name: _row([functools.partial(_share, *own[name]) for own in counts], len(pairs),
                         1.0, '') for name in counts[0]}
    return {'schema': SCHEMA, 'version': VERSION, 'pairs': len(pairs), 'differences': found,
            'shares': shares,
            'a': _account(a.document, names[0]), 'b': _account(b.document, names[1]),
            'verdict': _verdict(found[OVERALL], len(pairs)), 'environment': environment(),
            'recordings': a.document['recordings']}


def _pairs(first: Sequence[EpisodeReplay], second: Sequence[EpisodeReplay]):
    known = {(each.bag, each.number, each.start_ns): each for each in second}
    return [(each, known[key]) for each in first
            if (key := (each.bag, each.number, each.start_ns)) in known]


def _row(statistics, pairs: int, scale: float, unit: str) -> dict:
    """Return A, B and B less A, paired: both count the same episodes. statistics: of A, of B."""
    a, b = statistics
    every = np.ones((1, pairs))
    difference = with_interval(pairs, lambda drawn: b(drawn) - a(drawn))
    return {'unit': unit, 'a': number(a(every)[0]), 'b': number(b(every)[0]),
            'difference': difference,
            'relative': {key: number(each / scale) if each is not None and scale else None
                         for key, each in difference.items()}}


def _share(parts: np.ndarray, wholes: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return parts of wholes (E,), (R,), for episodes that are drawn (R, E) times; NaN of none."""
    whole = drawn @ wholes
    return np.where(whole > 0, drawn @ parts, np.nan) / np.maximum(whole, 1)


def _account(document: dict, name: str) -> dict:
    numbers = 'executed' in document
    return {'name': name, 'checkpoint': document['policy']['checkpoint'],
            'verdict': document['verdict']['headline'],
            'relative_error': document['relative_error']['value'] if numbers else None,
            'latency_p50_ms': document['latency_ms']['p50'] if numbers else None,
            'latency_p99_ms': document['latency_ms']['p99'] if numbers else None}


def _verdict(overall: dict, pairs: int) -> dict:
    value, low, high = (overall['difference'][key] for key in ('value', 'low', 'high'))
    where = f'differences.{OVERALL}.difference'
    if value is None or low is None:
        level, headline = LOOK, 'A and B cannot be told apart: two episodes are needed at least.'
        text = f'{pairs} episodes are in both.'
    elif low <= 0 <= high:
        level, headline = LOOK, 'These recordings do not tell A and B apart.'
        text = (f'B less A is {value:+.3f} in relative error, 95 % interval {low:+.3f} to '
                f'{high:+.3f}, over {pairs} episodes.')
    else:
        better, worse = ('B', 'A') if value < 0 else ('A', 'B')
        level, headline = GOOD, f'{better} is nearer to the recordings than {worse}.'
        text = (f'By {abs(value):.3f} in relative error, 95 % interval of B less A {low:+.3f} to '
                f'{high:+.3f}, over {pairs} episodes.')
    return {'level': level, 'headline': headline,
            'findings': [asdict(Finding(level, text, where))],
            'limits': 'Nearer to the recordings is not the same as better on the robot.'}
