"""Closed-loop episodes without DDS: many simulated robots, one process that holds the policies.

Each robot is a process of its own and stands still while it waits; all that wait for the same
policy are answered as one batch. Ingest, guard, timeline and policy are those of the node.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Protocol

import numpy as np

import meanflow_ros
from meanflow_ros.core.contract import ActionChunk, Observation, RobotSpec
from meanflow_ros.evaluation.episode_worker import (
    EXPERT, Answer, Job, Question, check_robot, policy_episode, slots)
from meanflow_ros.evaluation.episodes import EpisodeResult
from meanflow_ros.sim.metaworld_robot import MetaWorldRobot
from meanflow_ros.sim.tasks import TASKS, check_task

_STOP_TIMEOUT_S = 5.0


class ActBatch(Protocol):
    """A policy that answers many observations at once.

    robot: what it needs and commands. The pictures are views of memory that is written anew after
    the call: a policy that keeps them must copy.
    """

    robot: RobotSpec

    def __call__(self, observations: list[Observation], noise_seeds: list[int],
                 prefixes: Sequence[np.ndarray] = ()) -> list[ActionChunk]:
        """Return the chunk of each observation, which continues its prefix (n, A), n from 0 on."""


@dataclass(frozen=True)
class PolicyActs:
    """A `core.policy.Policy` as an ActBatch. steps: NFE, the checkpoint's own by default."""

    policy: object
    steps: int | None = None

    @property
    def robot(self) -> RobotSpec:
        """Return the robot that the policy was trained for."""
        return self.policy.robot

    def __call__(self, observations: list[Observation], noise_seeds: list[int],
                 prefixes: Sequence[np.ndarray] = ()) -> list[ActionChunk]:
        """Return the chunk of each observation, which continues its prefix."""
        return self.policy.act_batch(observations, steps=self.steps, seeds=noise_seeds,
                                     prefixes=prefixes)


def make_act(policy, steps: int = 0) -> ActBatch:
    """Return what lets a `core.policy.Policy` answer: on a GPU by one CUDA graph.

    steps: NFE, 0 for the checkpoint's own.
    """
    if policy.device.type != 'cuda':
        return PolicyActs(policy, steps or None)
    from meanflow_ros.evaluation.captured_acts import CapturedActs
    return CapturedActs(policy, steps or policy.config.sampler_steps,
                        sorted({task.instruction for task in TASKS.values()}))


def run_episode(act: ActBatch, robot: MetaWorldRobot, job: Job, *,
                camera_every: int = 4) -> EpisodeResult:
    """Run one episode in this process; `run_episodes` gives the same, for many at a time."""
    check_robot(act.robot)
    episode = policy_episode(robot, act.robot, job, camera_every)
    try:
        question = next(episode)
        while True:
            chunks, latency_ms = _timed(act, [question], [job.noise_seed])
            question = episode.send(Answer(chunk=chunks[0], latency_ms=latency_ms))
    except StopIteration as stop:
        return stop.value


def run_episodes(policies: Mapping[str, ActBatch], jobs: Sequence[Job], workers: int, *,
                 camera_every: int = 4,
                 progress: Callable[[Job, EpisodeResult], None] | None = None,
                 ) -> list[EpisodeResult]:
    """Run every job and return the results in the same order.

    workers: processes, each with a robot; about twice the cores keep both cores and policy busy.
    camera_every: control steps from picture to picture. progress: called after each episode.
    ValueError for a bad job or a policy of another robot. RuntimeError names the episode that
    failed; no process is left behind, whatever ends the run.
    """
    _check(policies, jobs, workers, camera_every)
    if not jobs:
        return []
    results: list[EpisodeResult | None] = [None] * len(jobs)
    queue = _Queue(jobs)
    waiting: dict[str, list[tuple[_Remote, Question]]] = {name: [] for name in policies}
    specs = {name: act.robot for name, act in policies.items()}
    with _Pool(min(workers, len(jobs)), specs, camera_every) as pool:
        busy = 0
        for remote in pool.remotes:
            busy += remote.begin(queue)
        while busy:
            asked = any(waiting.values())
            for remote in pool.ready(timeout_s=0.0 if asked else None):
                message = remote.receive()
                if isinstance(message, EpisodeResult):
                    results[remote.index] = message
                    if progress is not None:
                        progress(remote.job, message)
                    busy -= not remote.begin(queue)
                else:
                    waiting[remote.job.policy].append((remote, message))
            name = max(waiting, key=lambda key: len(waiting[key]), default=None)
            if name is not None and waiting[name]:
                batch, waiting[name] = waiting[name], []
                _answer(policies[name], batch)
    return results


def expert_ceiling(tasks: Sequence[str], seeds: Sequence[int], workers: int, *,
                   progress: Callable[[Job, EpisodeResult], None] | None = None,
                   ) -> list[EpisodeResult]:
    """Run the scripted experts, without noise, on every task and seed: what can be reached."""
    return run_episodes({}, [
        Job(policy=EXPERT, task=task, seed=seed, instruction=TASKS[check_task(task)].instruction)
        for task in tasks for seed in seeds], workers, progress=progress)


def _check(policies: Mapping[str, ActBatch], jobs: Sequence[Job], workers: int,
           camera_every: int) -> None:
    for name, value in (('workers', workers), ('camera_every', camera_every)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    for act in policies.values():
        check_robot(act.robot)
    for job in jobs:
        check_task(job.task)
        if job.delay_steps < 0:
            raise ValueError(f'delay_steps must be at least 0, got {job.delay_steps}')
        if job.policy not in policies and job.policy != EXPERT:
            raise ValueError(f'a job asks for the policy {job.policy!r}, there is '
                             f'{", ".join(policies) or "none"}')
        unknown = [] if job.policy == EXPERT else [
            name for name in job.blank_cameras
            if name not in policies[job.policy].robot.camera_names]
        if unknown:
            raise ValueError(f'the policy has no camera {unknown[0]!r} to blank')


def _timed(act: ActBatch, questions: list[Question],
           noise_seeds: list[int]) -> tuple[list[ActionChunk], float]:
    start = time.perf_counter()
    chunks = act([question.observation for question in questions], noise_seeds,
                 [question.prefix for question in questions])
    return chunks, (time.perf_counter() - start) * 1e3


def _answer(act: ActBatch, batch: list[tuple[_Remote, Question]]) -> None:
    chunks, latency_ms = _timed(act, [question for _, question in batch],
                                [remote.job.noise_seed for remote, _ in batch])
    for (remote, _), chunk in zip(batch, chunks, strict=True):
        remote.send((chunk.actions, chunk.stamp_ns, chunk.period_s, chunk.first_step, latency_ms))


class _Queue:
    """Jobs not yet begun; a robot stays with its task, since building a scene takes a second."""

    def __init__(self, jobs: Sequence[Job]):
        self._jobs = jobs
        self._left: dict[str, deque[int]] = {}
        for index, job in enumerate(jobs):
            self._left.setdefault(job.task, deque()).append(index)
        self._robots: Counter[str] = Counter()

    def take(self, last: Job | None) -> tuple[int, Job] | None:
        """Return the next job and its index for a robot that has done `last`."""
        task = last.task if last is not None else None
        if not self._left.get(task):
            task = max((task for task, left in self._left.items() if left), default=None,
                       key=lambda task: len(self._left[task]) / (1 + self._robots[task]))
            if last is not None:
                self._robots[last.task] -= 1
            if task is None:
                return None
            self._robots[task] += 1
        index = self._left[task].popleft()
        return index, self._jobs[index]


class _Remote:
    """A worker process as the parent sees it. index, job: the episode that it runs."""

    def __init__(self, specs: Mapping[str, RobotSpec], camera_every: int):
        self._specs = specs
        self.index, self.job = -1, None
        size = max([1, *(len(spec.cameras) * spec.cameras[0].width * spec.cameras[0].height * 3
                         for spec in specs.values())])
        memory = os.memfd_create('pictures')
        os.ftruncate(memory, size)
        self._pictures = np.frombuffer(mmap.mmap(memory, size), np.uint8)
        ours, theirs = socket.socketpair()
        root = str(Path(meanflow_ros.__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get('PYTHONPATH')])])
        fds = theirs.fileno(), memory
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'meanflow_ros.evaluation.episode_worker', *map(str, fds),
             str(size)],
            pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True,
            env={'OMP_NUM_THREADS': '1', **os.environ, 'PYTHONPATH': path})
        theirs.close()
        os.close(memory)
        self.connection = connection.Connection(ours.detach())
        self.send((specs, camera_every))

    def begin(self, queue: _Queue) -> bool:
        """Begin the next job; False if there is none."""
        taken = queue.take(self.job)
        if taken is None:
            return False
        self.index, self.job = taken
        self.send(self.job)
        return True

    def send(self, message) -> None:
        try:
            self.connection.send(message)
        except ConnectionError:
            raise self._died() from None

    def receive(self) -> EpisodeResult | Question:
        """Return what the worker says; RuntimeError if its episode failed, or it died."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._died() from None
        if isinstance(message, str):
            raise RuntimeError(f'{self._episode()} failed: {message}')
        if isinstance(message, EpisodeResult):
            return message
        stamp_ns, state, prefix = message
        spec = self._specs[self.job.policy]
        return Question(prefix=prefix, observation=Observation(
            stamp_ns=stamp_ns, state=state, instruction=self.job.instruction,
            images=dict(zip(spec.camera_names, slots(self._pictures, spec)))))

    def _episode(self) -> str:
        return ('the start of a worker' if self.job is None
                else f'the episode {self.job.task} with seed {self.job.seed}')

    def _died(self) -> RuntimeError:
        return RuntimeError(f'{self._episode()} failed: the worker ended with code '
                            f'{self._process.wait(_STOP_TIMEOUT_S)}')

    def hang_up(self) -> None:
        """Let the worker end, now or at its next word."""
        self.connection.close()
        self._process.terminate()

    def join(self) -> None:
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Pool:
    """The worker processes; all are ended when the `with` statement is left."""

    def __init__(self, size: int, specs: Mapping[str, RobotSpec], camera_every: int):
        self._make = lambda: _Remote(specs, camera_every)
        self._size = size
        self.remotes: list[_Remote] = []

    def __enter__(self) -> _Pool:
        try:
            for _ in range(self._size):
                self.remotes.append(self._make())
        except BaseException:
            self.__exit__()
            raise
        self._by_connection = {remote.connection: remote for remote in self.remotes}
        return self

    def ready(self, *, timeout_s: float | None) -> list[_Remote]:
        """Return the workers that have said something."""
        return [self._by_connection[each]
                for each in connection.wait(self._by_connection, timeout_s)]

    def __exit__(self, *_) -> None:
        for remote in self.remotes:
            remote.hang_up()
        for remote in self.remotes:
            remote.join()
