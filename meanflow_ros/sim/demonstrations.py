"""Scripted experts recorded into rosbag2, on the topics of the simulated robot.

One bag per task and worker. The executed command is the expert's plus noise that comes and
goes, so that states off the path are seen; the recorded `action` is the expert's clean command
at that state, due at its stamp, and `executed` is what the robot was told.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from meanflow_ros.core.contract import NANOSECONDS
from meanflow_ros.processes import running
from meanflow_ros.ros.bag import BagWriter
from meanflow_ros.sim import messages
from meanflow_ros.sim.messages import recorded
from meanflow_ros.sim.metaworld_robot import (
    ACTION_SPACE, EVALUATION_SEED_START, MAX_STEPS, PERIOD_S, MetaWorldRobot, RobotObservation)
from meanflow_ros.sim.scene import CAMERAS
from meanflow_ros.sim.tasks import GROUPS, TASKS, expand_tasks

STEPS_AFTER_SUCCESS = 12
ATTEMPTS = 3   # for each success wanted, at most
PERIOD_NS = round(PERIOD_S * NANOSECONDS)
_START_NS = NANOSECONDS
_GAP_NS = NANOSECONDS
_NOISE_STREAM = 1   # apart from the streams that Meta-World draws from the same seed


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """What one worker records: every `step`-th seed of every task, from `index` on.

    wanted: successes of each task.
    """

    path: Path
    tasks: tuple[str, ...]
    wanted: int
    first_seed: int
    image_size: int
    noise: float
    camera_every: int
    index: int
    step: int
    snatch: float = 0.0

    def bags(self) -> list[Path]:
        """Return the bags that it makes."""
        return [self.path / f'{task}_{self.index:02d}' for task in self.tasks]


class _Writer:
    """Writes what the robot senses as the messages of the simulated robot."""

    def __init__(self, bag: BagWriter):
        self._bag = bag

    def observation(self, observed: RobotObservation, stamp_ns: int) -> None:
        for topic, message in messages.sensed(recorded, observed, stamp_ns):
            self._bag.write(topic, message, stamp_ns)

    def action(self, topic: str, command: np.ndarray, stamp_ns: int) -> None:
        none = np.zeros(0)
        point = recorded(
            'trajectory_msgs/JointTrajectoryPoint', positions=command, velocities=none,
            accelerations=none, effort=none,
            time_from_start=recorded('builtin_interfaces/Duration', sec=0, nanosec=0))
        self._bag.write(topic, recorded(
            'trajectory_msgs/JointTrajectory', header=messages.header(recorded, stamp_ns, ''),
            joint_names=list(ACTION_SPACE.dimensions), points=[point]), stamp_ns)

    def instruction(self, text: str, stamp_ns: int) -> None:
        self._bag.write('instruction', recorded('std_msgs/String', data=text), stamp_ns)

    def episode(self, task: str, message: str, stamp_ns: int, **values) -> None:
        pairs = [recorded('diagnostic_msgs/KeyValue', key=key, value=str(value))
                 for key, value in values.items()]
        self._bag.write('episode', recorded(
            'diagnostic_msgs/DiagnosticStatus', level=0, name=task, message=message,
            hardware_id='sim_robot', values=pairs), stamp_ns)


def disturbances(noise: float, seed: int, *, quiet_steps: int = 0,
                 snatch: float = 0.0) -> Iterator[np.ndarray]:
    """Yield what to add to each command (4,): noise on the velocities, held and switched.

    noise: standard deviation as a share of the limits. A value is held for 3 to 8 steps; every
    other one, on average, is zero, and all of the first `quiet_steps`. snatch: share of the
    values that close open fingers, so that a prefix which grasps is not always one that was right.
    """
    rng = np.random.default_rng([seed, _NOISE_STREAM])
    yield from [np.zeros(ACTION_SPACE.size)] * quiet_steps
    while True:
        value = rng.normal(0.0, noise, ACTION_SPACE.size) * ACTION_SPACE.upper
        value[-1] = 0.0
        value *= rng.random() < 0.5
        if snatch and rng.random() < snatch:
            value[-1] = ACTION_SPACE.upper[-1] - ACTION_SPACE.lower[-1]
        for _ in range(rng.integers(3, 9)):
            yield value


def _record_episode(robot: MetaWorldRobot, writer: _Writer, shard: _Shard, task: str,
                    number: int, stamp_ns: int) -> tuple[int, bool]:
    """Record one episode from `stamp_ns` on; return the stamp of its end, and success."""
    seed, kind = shard.first_seed + number, TASKS[task]
    robot.reset(task, seed)
    writer.episode(task, 'start', stamp_ns, episode=number, seed=seed)
    writer.instruction(kind.instruction, stamp_ns)
    disturbance = disturbances(shard.noise * kind.noise, seed, quiet_steps=kind.quiet_steps,
                               snatch=shard.snatch)
    reward, success, steps, end = 0.0, False, 0, MAX_STEPS
    while steps < end:
        cameras = CAMERAS if steps % shard.camera_every == 0 else ()
        command = robot.expert_action()
        writer.observation(robot.observe(cameras), stamp_ns)
        writer.action('action', command, stamp_ns)
        holds = kind.steady_grasp and command[-1] > 0
        command = np.clip(command + (0.0 if holds else next(disturbance)), ACTION_SPACE.lower,
                          ACTION_SPACE.upper)
        writer.action('executed', command, stamp_ns)
        result = robot.step(command)
        steps += 1
        stamp_ns += PERIOD_NS
        reward += result.reward
        if result.success and not success:
            success, end = True, steps + STEPS_AFTER_SUCCESS
    mode = {'mode': result.mode} if kind.modes else {}
    writer.episode(task, 'success' if success else 'failure', stamp_ns, episode=number,
                   seed=seed, steps=steps, reward=f'{reward:.3f}', **mode)
    return stamp_ns, success


def _record_shard(shard: _Shard, done: Callable[[str, bool], None]) -> None:
    """Record a worker's share; `done` is called with task and success after each episode."""
    size = shard.image_size
    with contextlib.closing(MetaWorldRobot(image_width=size, image_height=size)) as robot:
        for task, path in zip(shard.tasks, shard.bags()):
            with BagWriter(path) as bag:
                writer, stamp_ns = _Writer(bag), _START_NS
                successes = 0
                for attempt in range(ATTEMPTS * shard.wanted):
                    number = shard.index + attempt * shard.step
                    stamp_ns, success = _record_episode(robot, writer, shard, task, number,
                                                        stamp_ns)
                    stamp_ns += _GAP_NS
                    done(task, success)
                    successes += success
                    if successes == shard.wanted:
                        break


def _worker(shard: _Shard, results) -> None:
    """Be a worker process; SIGTERM closes the bag that is open, Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parent = multiprocessing.parent_process()

    def done(task: str, success: bool) -> None:
        results.put((task, success))
        if not parent.is_alive():
            sys.exit(1)

    try:
        _record_shard(shard, done)
    except (ValueError, RuntimeError, OSError) as error:
        results.put((None, str(error)))
        sys.exit(1)


def _run_workers(shards: Sequence[_Shard], done: Callable[[str, bool], None]) -> None:
    context = multiprocessing.get_context('spawn')
    results = context.Queue()
    workers = [context.Process(target=_worker, args=(shard, results), daemon=True)
               for shard in shards]
    with running(workers):
        while True:
            ended = all(worker.exitcode is not None for worker in workers)
            try:
                task, outcome = results.get(timeout=0.2)
            except queue.Empty:
                failed = [worker.exitcode for worker in workers if worker.exitcode]
                if failed:
                    raise RuntimeError(f'a worker ended with exit code {failed[0]}') from None
                if ended:
                    return
                continue
            if task is None:
                raise RuntimeError(outcome)
            done(task, outcome)


def record(path: Path | str, tasks: Sequence[str] = tuple(TASKS), episodes: int = 50,
           first_seed: int = 0, image_size: int = 224, noise: float = 0.3, workers: int = 1,
           camera_every: int = 1, snatch: float = 0.0) -> dict[str, tuple[int, int]]:
    """Record demonstrations below `path`, one bag per task and worker, until enough succeeded.

    tasks: names of tasks or groups. episodes: successes wanted of each task. Episode i of every
    task has seed `first_seed + i`; those that fail are kept and marked so, and more are recorded,
    `ATTEMPTS` for each success wanted at most. noise: see `disturbances`; a task may bear a share
    of it only. camera_every: control steps from picture to picture. snatch: see `disturbances`.
    Returns task -> (successes, episodes). ValueError for bad arguments or bags that exist,
    RuntimeError if the simulator does not work here.
    """
    tasks = expand_tasks(tasks)
    for name, value, low in (('episodes', episodes, 1), ('workers', workers, 1),
                             ('camera_every', camera_every, 1), ('first_seed', first_seed, 0)):
        if value < low:
            raise ValueError(f'{name} must be at least {low}, got {value}')
    last_seed = first_seed + ATTEMPTS * (episodes + workers) - 1
    if last_seed >= EVALUATION_SEED_START:
        raise ValueError(f'seeds from {EVALUATION_SEED_START} on are kept for evaluation, '
                         f'got {first_seed} up to {last_seed} where attempts fail')
    if not 0.0 <= noise <= 2.0:
        raise ValueError(f'noise must be 0 to 2, got {noise}')
    if not 0.0 <= snatch <= 1.0:
        raise ValueError(f'snatch must be 0 to 1, got {snatch}')
    workers = min(workers, episodes)
    shards = [_Shard(path=Path(path), tasks=tasks, first_seed=first_seed,
                     wanted=len(range(index, episodes, workers)), image_size=image_size,
                     noise=noise, camera_every=camera_every, index=index, step=workers,
                     snatch=snatch)
              for index in range(workers)]
    for bag in (bag for shard in shards for bag in shard.bags()):
        if bag.exists():
            raise ValueError(f'{bag} exists already, choose a new path')
    counts = {task: Counter() for task in tasks}
    with tqdm(total=episodes * len(tasks), unit='episode', file=sys.stderr) as bar:
        def done(task: str, success: bool) -> None:
            counts[task][success] += 1
            bar.update(success)

        if workers == 1:
            _record_shard(shards[0], done)
        else:
            _run_workers(shards, done)
    return {task: (count[True], count.total()) for task, count in counts.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Record demonstrations from the command line."""
    parser = argparse.ArgumentParser(
        description='Record demonstrations of scripted Meta-World experts into rosbag2.',
        epilog=f'Topics: camera/{{{",".join(CAMERAS)}}}/image_raw, joint_states, tool_pose, '
               f'instruction, action, executed, episode. A 224 pixel episode takes a few MB.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('path', type=Path, help='directory for the bags; created if missing')
    parser.add_argument('--tasks', nargs='+', default=['all'], choices=[*TASKS, *GROUPS],
                        metavar='TASK', help=f'which of: {", ".join(TASKS)}; or groups: '
                        f'{", ".join(GROUPS)}')
    parser.add_argument('--episodes', type=int, default=50,
                        help='demonstrations of each task that succeed')
    parser.add_argument('--first-seed', type=int, default=0,
                        help=f'seed of the first episode; they end below {EVALUATION_SEED_START}')
    parser.add_argument('--image-size', type=int, default=224, help='pixels, both sides')
    parser.add_argument('--noise', type=float, default=0.3,
                        help='disturbance of the executed velocity, as a share of the limits')
    parser.add_argument('--snatch', type=float, default=0.0,
                        help='share of the disturbances that close open fingers')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    parser.add_argument('--camera-every', type=int, default=1,
                        help='control steps (1/40 s) from picture to picture')
    chosen = parser.parse_args(arguments)
    try:
        counts = record(chosen.path, chosen.tasks, chosen.episodes, chosen.first_seed,
                        chosen.image_size, chosen.noise, chosen.workers, chosen.camera_every,
                        chosen.snatch)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('stopped; the bags hold the episodes that were finished')
    for task, (successes, total) in counts.items():
        print(f'{task}: {successes} of {total} succeeded')


if __name__ == '__main__':
    main()
