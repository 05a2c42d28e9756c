"""Scripted experts recorded into rosbag2, on the topics of the simulated robot.

One bag per task and worker. The executed command is the expert's plus noise that comes and
goes, so that states off the path are seen; the recorded `action` is the expert's clean command
at that state, due at its stamp.
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
from meanflow_ros.ros.bag import TYPES, BagWriter
from meanflow_ros.sim.metaworld_robot import (
    ACTION_SPACE,
    CAMERAS,
    EVALUATION_SEED_START,
    JOINTS,
    MAX_STEPS,
    PERIOD_S,
    TASKS,
    MetaWorldRobot,
    RobotObservation,
    check_task,
)

STEPS_AFTER_SUCCESS = 12
PERIOD_NS = round(PERIOD_S * NANOSECONDS)
_START_NS = NANOSECONDS
_GAP_NS = NANOSECONDS
_NOISE_STREAM = 1   # apart from the streams that Meta-World draws from the same seed


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """What one worker records: every `step`-th episode of every task, from `index` on."""

    path: Path
    tasks: tuple[str, ...]
    episodes: int
    first_seed: int
    image_size: int
    noise: float
    camera_every: int
    index: int
    step: int

    def bags(self) -> list[Path]:
        """Return the bags that it makes."""
        return [self.path / f'{task}_{self.index:02d}' for task in self.tasks]


class _Writer:
    """Writes what the robot senses as the messages of the simulated robot."""

    def __init__(self, bag: BagWriter):
        self._bag = bag

    def _make(self, kind: str, **fields):
        package, name = kind.split('/')
        return TYPES.types[f'{package}/msg/{name}'](**fields)

    def _header(self, stamp_ns: int, frame: str):
        stamp = self._make('builtin_interfaces/Time', sec=stamp_ns // NANOSECONDS,
                           nanosec=stamp_ns % NANOSECONDS)
        return self._make('std_msgs/Header', stamp=stamp, frame_id=frame)

    def observation(self, observed: RobotObservation, stamp_ns: int) -> None:
        self._bag.write('joint_states', self._make(
            'sensor_msgs/JointState', header=self._header(stamp_ns, ''), name=list(JOINTS),
            position=observed.joint_positions, velocity=observed.joint_velocities,
            effort=np.zeros(0)), stamp_ns)
        x, y, z = observed.tool_position
        qw, qx, qy, qz = observed.tool_quaternion
        self._bag.write('tool_pose', self._make(
            'geometry_msgs/PoseStamped', header=self._header(stamp_ns, 'world'),
            pose=self._make(
                'geometry_msgs/Pose', position=self._make('geometry_msgs/Point', x=x, y=y, z=z),
                orientation=self._make('geometry_msgs/Quaternion', x=qx, y=qy, z=qz, w=qw))),
            stamp_ns)
        for camera, image in observed.images.items():
            height, width, channels = image.shape
            self._bag.write(f'camera/{camera}/image_raw', self._make(
                'sensor_msgs/Image', header=self._header(stamp_ns, f'camera_{camera}'),
                height=height, width=width, encoding='rgb8', is_bigendian=0,
                step=width * channels, data=image.ravel()), stamp_ns)

    def action(self, command: np.ndarray, stamp_ns: int) -> None:
        none = np.zeros(0)
        point = self._make(
            'trajectory_msgs/JointTrajectoryPoint', positions=command, velocities=none,
            accelerations=none, effort=none,
            time_from_start=self._make('builtin_interfaces/Duration', sec=0, nanosec=0))
        self._bag.write('action', self._make(
            'trajectory_msgs/JointTrajectory', header=self._header(stamp_ns, ''),
            joint_names=list(ACTION_SPACE.dimensions), points=[point]), stamp_ns)

    def instruction(self, text: str, stamp_ns: int) -> None:
        self._bag.write('instruction', self._make('std_msgs/String', data=text), stamp_ns)

    def episode(self, task: str, message: str, stamp_ns: int, **values) -> None:
        pairs = [self._make('diagnostic_msgs/KeyValue', key=key, value=str(value))
                 for key, value in values.items()]
        self._bag.write('episode', self._make(
            'diagnostic_msgs/DiagnosticStatus', level=0, name=task, message=message,
            hardware_id='sim_robot', values=pairs), stamp_ns)


def disturbances(noise: float, seed: int) -> Iterator[np.ndarray]:
    """Yield what to add to each command (4,): noise on the velocities, held and switched.

    noise: standard deviation as a share of the limits. A value is held for 3 to 8 steps; every
    other one, on average, is zero.
    """
    rng = np.random.default_rng([seed, _NOISE_STREAM])
    while True:
        value = rng.normal(0.0, noise, ACTION_SPACE.size) * ACTION_SPACE.upper
        value[-1] = 0.0
        value *= rng.random() < 0.5
        for _ in range(rng.integers(3, 9)):
            yield value


def _record_episode(robot: MetaWorldRobot, writer: _Writer, shard: _Shard, task: str,
                    number: int, stamp_ns: int) -> tuple[int, bool]:
    """Record one episode from `stamp_ns` on; return the stamp of its end, and success."""
    seed = shard.first_seed + number
    robot.reset(task, seed)
    writer.episode(task, 'start', stamp_ns, episode=number, seed=seed)
    writer.instruction(TASKS[task][1], stamp_ns)
    disturbance = disturbances(shard.noise, seed)
    reward, success, steps, end = 0.0, False, 0, MAX_STEPS
    while steps < end:
        cameras = CAMERAS if steps % shard.camera_every == 0 else ()
        command = robot.expert_action()
        writer.observation(robot.observe(cameras), stamp_ns)
        writer.action(command, stamp_ns)
        result = robot.step(command + next(disturbance))
        steps += 1
        stamp_ns += PERIOD_NS
        reward += result.reward
        if result.success and not success:
            success, end = True, steps + STEPS_AFTER_SUCCESS
    writer.episode(task, 'success' if success else 'failure', stamp_ns, episode=number,
                   seed=seed, steps=steps, reward=f'{reward:.3f}')
    return stamp_ns, success


def _record_shard(shard: _Shard, done: Callable[[str, bool], None]) -> None:
    """Record a worker's share; `done` is called with task and success after each episode."""
    size = shard.image_size
    with contextlib.closing(MetaWorldRobot(image_width=size, image_height=size)) as robot:
        for task, path in zip(shard.tasks, shard.bags()):
            with BagWriter(path) as bag:
                writer, stamp_ns = _Writer(bag), _START_NS
                for number in range(shard.index, shard.episodes, shard.step):
                    stamp_ns, success = _record_episode(robot, writer, shard, task, number,
                                                        stamp_ns)
                    stamp_ns += _GAP_NS
                    done(task, success)


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
    try:
        for worker in workers:
            worker.start()
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
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
        for worker in workers:
            if worker.pid is not None:
                worker.join(timeout=10)
                worker.kill()


def record(path: Path | str, tasks: Sequence[str] = tuple(TASKS), episodes: int = 50,
           first_seed: int = 0, image_size: int = 224, noise: float = 0.3, workers: int = 1,
           camera_every: int = 1) -> dict[str, tuple[int, int]]:
    """Record `episodes` demonstrations of each task below `path`, one bag per task and worker.

    Episode i of every task has seed `first_seed + i`. noise: see `disturbances`. camera_every:
    control steps from picture to picture. Returns task -> (successes, episodes). ValueError for
    bad arguments or bags that exist, RuntimeError if the simulator does not work here.
    """
    for name, value, low in (('episodes', episodes, 1), ('workers', workers, 1),
                             ('camera_every', camera_every, 1), ('first_seed', first_seed, 0)):
        if value < low:
            raise ValueError(f'{name} must be at least {low}, got {value}')
    if first_seed + episodes > EVALUATION_SEED_START:
        raise ValueError(f'seeds from {EVALUATION_SEED_START} on are kept for evaluation, '
                         f'got {first_seed} to {first_seed + episodes - 1}')
    if not 0.0 <= noise <= 2.0:
        raise ValueError(f'noise must be 0 to 2, got {noise}')
    workers = min(workers, episodes)
    shards = [_Shard(path=Path(path), tasks=tuple(check_task(task) for task in tasks),
                     episodes=episodes, first_seed=first_seed, image_size=image_size,
                     noise=noise, camera_every=camera_every, index=index, step=workers)
              for index in range(workers)]
    for bag in (bag for shard in shards for bag in shard.bags()):
        if bag.exists():
            raise ValueError(f'{bag} exists already, choose a new path')
    counts = {task: Counter() for task in tasks}
    with tqdm(total=episodes * len(tasks), unit='episode', file=sys.stderr) as bar:
        def done(task: str, success: bool) -> None:
            counts[task][success] += 1
            bar.update()

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
               f'instruction, action, episode. A 224 pixel episode takes a few MB.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('path', type=Path, help='directory for the bags; created if missing')
    parser.add_argument('--tasks', nargs='+', default=list(TASKS), choices=TASKS,
                        metavar='TASK', help=f'which of: {", ".join(TASKS)}')
    parser.add_argument('--episodes', type=int, default=50, help='episodes of each task')
    parser.add_argument('--first-seed', type=int, default=0,
                        help=f'seed of the first episode; they end below {EVALUATION_SEED_START}')
    parser.add_argument('--image-size', type=int, default=224, help='pixels, both sides')
    parser.add_argument('--noise', type=float, default=0.3,
                        help='disturbance of the executed velocity, as a share of the limits')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    parser.add_argument('--camera-every', type=int, default=1,
                        help='control steps (1/40 s) from picture to picture')
    chosen = parser.parse_args(arguments)
    try:
        counts = record(chosen.path, chosen.tasks, chosen.episodes, chosen.first_seed,
                        chosen.image_size, chosen.noise, chosen.workers, chosen.camera_every)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('stopped; the bags hold the episodes that were finished')
    for task, (successes, total) in counts.items():
        print(f'{task}: {successes} of {total} succeeded')


if __name__ == '__main__':
    main()
