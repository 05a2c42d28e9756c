"""Replays of bags made by hand, answered by policies whose every error is known."""

from __future__ import annotations

import dataclasses
import os
from unittest import mock

import numpy as np

from made_bags import MS, ROBOT, T0, command
from meanflow_ros.core.contract import ActionChunk
from meanflow_ros.evaluation.replay import jobs
from meanflow_ros.evaluation.replay.latency import Latency
from meanflow_ros.evaluation.replay.replay_bag import BagReport, replay_bag
from meanflow_ros.evaluation.replay.settings import RECORDED, ReplaySettings
from meanflow_ros.evaluation.replay.summary import summarize
from meanflow_ros.training.data_config import DataConfig

ACTION_MS = 20
work_in_process = jobs._work_in_process


def troubled_work(bag, *rest) -> dict:
    """Work as a process of `--jobs` does, but die over bag 'dies', and raise over bag 'odd'."""
    if bag.name == 'dies':
        os._exit(9)
    if bag.name == 'odd':
        with mock.patch.object(jobs, 'replay_bag', side_effect=KeyError('pose')):
            return work_in_process(bag, *rest)
    return work_in_process(bag, *rest)


def commanded(time_ns: int) -> np.ndarray:
    """Return what `Scene.robot` commands at a time: the nearest command, the earlier of two."""
    number = -((T0 - time_ns) * 2 // (ACTION_MS * MS) + 1) // 2 if time_ns < T0 else (
        (2 * (time_ns - T0) + ACTION_MS * MS - 1) // (2 * ACTION_MS * MS))
    return command(T0 + max(0, number) * ACTION_MS * MS)


class Fake:
    """A policy that commands what was recorded, plus `error(observation, seed, steps)` (T, A)."""

    flow, seconds, chunks = True, 0.0, 0

    def __init__(self, robot=ROBOT, error=lambda observation, seed, steps: 0.0, truth=commanded):
        self.robot, self.error, self.truth = robot, error, truth
        self.seen = []

    def __call__(self, observations, seeds, steps=None):
        return [self.answer(*each) for each in zip(observations, seeds,
                                                   steps or [None] * len(seeds))]

    def answer(self, observation, seed, steps):
        actions = np.stack([self.truth(int(due)) for due in self.robot.due_ns(
            observation.stamp_ns)])
        return ActionChunk(actions=actions + self.error(observation, seed, steps),
                           stamp_ns=observation.stamp_ns, period_s=self.robot.period_s,
                           first_step=self.robot.first_step)

    def settle(self):
        pass

    def infer(self, queue):
        for taken in queue:
            self.seen.append(taken.observation)
            taken.chunk = self.answer(taken.observation, 0, None)


def offsets(*values, dimension: int = 0):
    """Return an error that is values[step] in one dimension."""
    table = np.zeros((len(values), ROBOT.action_space.size))
    table[:, dimension] = values
    return lambda observation, seed, steps: table


def replay(path, acting: Fake | None = None, *, latency_ms: float = 0, data=None, robot=None,
           **changes):
    """Return metrics.json, the episodes, and what was skipped."""
    robot = robot or (acting.robot if acting else ROBOT)
    settings = ReplaySettings(**{
        'robot': robot, 'data': DataConfig(**(data or {})), 'policy': RECORDED,
        'latency': Latency(values_s=(latency_ms / 1e3,), source='fixed'), 'probe_every_s': 0.0,
        **changes})
    report = BagReport(name=path.name)
    episodes = list(replay_bag(path, settings, acting, report))
    document = summarize(episodes, [dataclasses.asdict(report)], settings)
    return document, episodes, report.skipped
