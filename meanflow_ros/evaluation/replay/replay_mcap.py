"""replay.mcap: the inputs of a replay, what the policy made of them, and how every step went.

Beside the input topics, under their own names, there are
- `/replay/action_chunk` (JointTrajectory): each chunk when it was ready, stamped with its
  observation; points are the steps in the units of the action,
- `/replay/executed`, `/replay/recorded`, `/replay/error` (JointState): position is the action of
  each control step, by dimension, at its time,
- `/replay/diagnostics` (DiagnosticArray): per control step the age of its observation, the step
  of the chunk, whether it was stale or missed; per chunk that was not used, why.
"""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS
from meanflow_ros.evaluation.replay.episode import ACCEPTED, EpisodeReplay
from meanflow_ros.evaluation.replay.settings import ReplaySettings
from meanflow_ros.evaluation.replay.topics import topics_of
from meanflow_ros.ros.bag import TYPES, BagWriter
from meanflow_ros.ros.bag_files import Bag

Written = tuple[int, str, str, bytes]      # time, topic, type, CDR
PREFIX = '/replay'
OK, WARN = 0, 1


def write_mcap(path: Path, bag: Path, settings: ReplaySettings,
               episodes: Iterable[EpisodeReplay]) -> None:
    """Write a bag with its replayed episodes, in their order, in constant memory.

    The file is whole or as it was before.
    """
    folder = path.with_name(path.name + '.partial')
    shutil.rmtree(folder, ignore_errors=True)
    with BagWriter(folder) as writer:
        for time_ns, topic, kind, data in heapq.merge(
                _inputs(bag, settings), _outputs(episodes), key=lambda entry: entry[0]):
            writer.write_raw(topic, kind, data, time_ns)
    (made,) = folder.glob('*.mcap')
    made.replace(path)
    shutil.rmtree(folder)


def _inputs(path: Path, settings: ReplaySettings) -> Iterator[Written]:
    with Bag(path) as bag:
        topics, _ = topics_of(bag, settings)
        for raw in bag.messages(topics.all(), *settings.part_of(bag)):
            yield raw.stamp_ns, raw.topic, raw.type, raw.data


def _outputs(episodes: Iterable[EpisodeReplay]) -> Iterator[Written]:
    for episode in episodes:
        yield from sorted([*_chunks(episode), *_steps(episode)], key=lambda entry: entry[0])


def _message(kind: str, **fields):
    package, name = kind.split('/')
    return TYPES.types[f'{package}/msg/{name}'](**fields)


def _written(time_ns: int, topic: str, message) -> Written:
    kind = message.__msgtype__
    return time_ns, f'{PREFIX}/{topic}', kind, bytes(TYPES.serialize_cdr(message, kind))


def _header(stamp_ns: int):
    return _message('std_msgs/Header', frame_id='', stamp=_time(stamp_ns))


def _time(stamp_ns: int):
    return _message('builtin_interfaces/Time', sec=int(stamp_ns // NANOSECONDS),
                    nanosec=int(stamp_ns % NANOSECONDS))


def _chunks(episode: EpisodeReplay) -> Iterator[Written]:
    none, names = np.zeros(0), list(episode.dimensions)
    for row, actions in enumerate(episode.actions):
        stamp_ns, done_ns = int(episode.stamp_ns[row]), int(episode.done_ns[row])
        points = [_message(
            'trajectory_msgs/JointTrajectoryPoint', positions=np.array(action), velocities=none,
            accelerations=none, effort=none, time_from_start=_message(
                'builtin_interfaces/Duration', sec=int(due_ns // NANOSECONDS),
                nanosec=int(due_ns % NANOSECONDS)))
            for action, due_ns in zip(actions, np.rint(
                (episode.first_step + np.arange(len(actions))) * episode.period_s * NANOSECONDS))]
        yield _written(done_ns, 'action_chunk', _message(
            'trajectory_msgs/JointTrajectory', header=_header(stamp_ns), joint_names=names,
            points=points))
        if episode.outcome[row] != ACCEPTED:
            yield _diagnostics(done_ns, 'chunk', WARN, str(episode.outcome[row]), {})


def _steps(episode: EpisodeReplay) -> Iterator[Written]:
    for row, time_ns in enumerate(episode.tick_ns.tolist()):
        due = episode.source[row] >= 0
        series = {'executed': episode.executed[row]} if due else {}
        if episode.tick_recorded[row]:
            series |= {'recorded': episode.expected[row],
                       'error': episode.executed[row] - episode.expected[row]}
        for topic, values in series.items():
            yield _written(time_ns, topic, _message(
                'sensor_msgs/JointState', header=_header(time_ns),
                name=list(episode.dimensions), position=np.array(values),
                velocity=np.zeros(0), effort=np.zeros(0)))
        missed, stale = bool(episode.missed[row]), bool(episode.stale[row])
        values = {'missed': int(missed), 'stale': int(stale)}
        if due:
            values |= {'age_s': f'{episode.age_s[row]:.6f}', 'step': int(episode.step[row])}
        yield _diagnostics(time_ns, 'step', WARN if missed else OK,
                           'no action was due' if missed else 'stale' if stale else '', values)


def _diagnostics(time_ns: int, name: str, level: int, text: str, values: dict) -> Written:
    return _written(time_ns, 'diagnostics', _message(
        'diagnostic_msgs/DiagnosticArray', header=_header(time_ns), status=[_message(
            'diagnostic_msgs/DiagnosticStatus', level=level, name=f'replay: {name}', message=text,
            hardware_id='', values=[_message('diagnostic_msgs/KeyValue', key=key, value=str(value))
                                    for key, value in values.items()])]))
