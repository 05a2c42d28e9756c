"""metrics.json: every number of a replay, with a version; docs/replay.md describes it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from meanflow_ros.core.policy import read_config
from meanflow_ros.evaluation.replay.accuracy import (
    accuracy, per_episode, recorded_actions, scale_of)
from meanflow_ros.evaluation.replay.baselines import baseline_chunks
from meanflow_ros.evaluation.replay.driving import not_checked
from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.replay.questions import drift, probed
from meanflow_ros.evaluation.replay.settings import ReplaySettings
from meanflow_ros.evaluation.replay.timing import guarded, missing_input, timing
from meanflow_ros.evaluation.replay.verdict import judge

SCHEMA, VERSION = 'meanflow_ros/replay', 1
PACKAGES = ('torch', 'numpy', 'opencv-python-headless', 'rosbags', 'transformers')


def summarize(episodes: Sequence[EpisodeReplay], recordings: Sequence[dict],
              settings: ReplaySettings) -> dict:
    """Return the content of metrics.json.

    recordings: name, seconds, messages, lost, skipped, error of each bag. Without any episode
    the numbers are left out and the verdict says why.
    """
    robot = settings.robot
    document = {
        'schema': SCHEMA, 'version': VERSION,
        'policy': {'kind': settings.policy, 'checkpoint': settings.checkpoint,
                   'robot': robot.robot, 'horizon': robot.horizon, 'period_s': robot.period_s,
                   'first_step': robot.first_step,
                   'dimensions': list(robot.action_space.dimensions),
                   'units': dict(zip(robot.action_space.dimensions, robot.action_space.units)),
                   'cameras': list(robot.camera_names)},
        'settings': _settings(settings), 'environment': environment(),
        'recordings': list(recordings), 'counts': _counts(episodes)}
    if episodes and len(recorded_actions(episodes)):
        document |= _numbers(episodes, settings)
    document['verdict'] = judge(document)
    return document


def _numbers(episodes: Sequence[EpisodeReplay], settings: ReplaySettings) -> dict:
    robot, scale = settings.robot, scale_of(episodes)
    baselines, why_not = baseline_chunks(episodes)
    found = accuracy(episodes, robot, baselines, why_not)
    found |= timing(episodes, robot)
    found['latency_ms'] |= {'source': settings.latency.source,
                            'runtime': dict(settings.latency.runtime)}
    found |= {'guard': guarded(episodes) | {'motion': settings.motion,
                                            'not_checked': not_checked(settings.driving())},
              'missing_input': missing_input(episodes)}
    found |= probed(episodes, robot.action_space.dimensions, scale)
    trained = (None, None, (), None)
    if settings.checkpoint:
        config = read_config(Path(settings.checkpoint, 'policy.yaml'))
        trained = (config.state_normalizer, config.action_normalizer, config.relative_to,
                   config.training.get('instructions'))
    found['drift'] = drift(episodes, robot, *trained)
    found['episodes'] = [per_episode(each, scale) for each in episodes]
    return found


def _counts(episodes: Sequence[EpisodeReplay]) -> dict:
    return {'episodes': len(episodes), 'seconds': float(sum(each.length_s for each in episodes)),
            'observations': sum(len(each.stamp_ns) for each in episodes),
            'steps': sum(len(each.tick_ns) for each in episodes),
            'compared_steps': sum(int((each.tick_recorded & (each.source >= 0)).sum())
                                  for each in episodes),
            'probed': sum(len(each.probed) for each in episodes)}


def _settings(settings: ReplaySettings) -> dict:
    """Return the settings without what is said elsewhere."""
    plain = settings.plain()
    plain.pop('robot')
    values = plain['latency']['values_s']
    plain['latency'] = {'source': settings.latency.source, 'count': len(values),
                        'median_s': float(np.median(values))}
    return plain | {'fingerprint': settings.fingerprint()}


def environment() -> dict:
    """Return the versions and the machine that the numbers come from."""
    versions = {}
    for name in ('meanflow_ros', *PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ''
    return {'versions': versions, 'python': platform.python_version(),
            'system': f'{platform.system()} {platform.release()}',
            'machine': platform.machine(), 'cores': os.cpu_count(),
            'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else ''}


def write_json(path: Path, document: dict) -> None:
    """Write a document; the file is whole or as it was before. NaN is refused."""
    partial = path.with_name(path.name + '.partial')
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + '\n', encoding='utf-8')
    partial.replace(path)
