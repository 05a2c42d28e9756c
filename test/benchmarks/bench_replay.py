"""How fast a replay is, and how much memory it takes, whatever the length of the recording.

    python test/benchmarks/bench_replay.py speed    # against real time, and in batches
    python test/benchmarks/bench_replay.py memory   # a bag of 2 GB on disk against one of 20 MB

Both make their bags in a temporary directory and remove them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import made_bags as made  # noqa: E402
from meanflow_ros.core.contract import Observation  # noqa: E402
from meanflow_ros.core.policy import DTYPES, Policy  # noqa: E402
from meanflow_ros.evaluation.evaluate import main as evaluate  # noqa: E402
from meanflow_ros.paths import default_checkpoint  # noqa: E402
from meanflow_ros.ros.bag import BagWriter  # noqa: E402

MS = 1_000_000
CAMERA_HZ, STATE_HZ, ACTION_HZ = 30, 100, 40


def write_bag(path: Path, robot, seconds: float, *, width: int, height: int, jpeg: bool) -> int:
    """Write a recording of a robot; return its size on disk, bytes."""
    random = np.random.default_rng(0)
    # Smooth ones for JPEG; noise else, so that no compression makes the bag smaller.
    small = 8 if jpeg else 1
    frames = [cv2.resize(random.integers(0, 256, (height // small, width // small, 3), np.uint8),
                         (width, height), interpolation=cv2.INTER_CUBIC) for _ in range(30)]
    space = robot.action_space
    middle, half = (space.lower + space.upper) / 2, (space.upper - space.lower) / 2
    rates = {'state': STATE_HZ, 'action': ACTION_HZ, 'cameras': CAMERA_HZ}
    times = sorted((number * 1_000_000_000 // rate, what, number) for what, rate in rates.items()
                   for number in range(int(seconds * rate)))
    with BagWriter(path) as bag:
        bag.write('episode', made.status('start', 0), made.T0 - 2)
        bag.write('instruction', made.text('open the drawer'), made.T0 - 1)
        for late_ns, what, number in times:
            now_ns = made.T0 + late_ns
            if what == 'state':
                bag.write('joint_states', made.joint_state(now_ns, **{
                    name: float(np.sin(number / 50 + i)) for i, name in
                    enumerate(robot.state_names)}), now_ns)
            elif what == 'action':
                bag.write('action', made.trajectory(now_ns, space.dimensions, [
                    middle + 0.5 * half * np.sin(number / 40)]), now_ns)
            else:
                for at, camera in enumerate(robot.camera_names):
                    pixels = np.roll(frames[(number + 11 * at) % 30], number, axis=1)
                    if jpeg:
                        data = cv2.imencode('.jpg', pixels)[1]
                        bag.write(f'camera/{camera}/image_raw/compressed', made.make(
                            'sensor_msgs/CompressedImage', header=made.header(now_ns),
                            format='jpeg', data=data.reshape(-1)), now_ns)
                    else:
                        bag.write(f'camera/{camera}/image_raw', made.image(now_ns, pixels), now_ns)
        bag.write('episode', made.status('success', 0), made.T0 + int(seconds * 1e9))
    return sum(file.stat().st_size for file in path.iterdir())


def replayed(arguments: list[str]) -> float:
    """Run `evaluate replay` and return its seconds."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = evaluate(['replay', *arguments])
    if code != 0:
        raise SystemExit(f'the replay has ended with {code}')
    return time.perf_counter() - start


def speed(options) -> None:
    """Print the speed of whole replays, and of the policy in batches and one by one."""
    checkpoint = options.checkpoint or default_checkpoint()
    policy = Policy.load(checkpoint, device=options.device, dtype=DTYPES[options.dtype])
    robot = policy.robot
    width, height = robot.cameras[0].width, robot.cameras[0].height
    with tempfile.TemporaryDirectory() as folder:
        bag = Path(folder, 'bag')
        write_bag(bag, robot, options.seconds, width=width, height=height, jpeg=True)
        common = [str(bag), '--checkpoint', str(checkpoint), '--no-mcap', '--device',
                  options.device, '--dtype', options.dtype, '--batch', str(options.batch)]
        runs = {'recorded commands, every observation': ['--policy', 'recorded'],
                f'policy, latency {options.latency}, no probes': [
                    '--latency', options.latency, '--probe-every', '0'],
                f'policy, latency {options.latency}, probes every 2 s': [
                    '--latency', options.latency]}
        print(f'{options.seconds:g} s, {len(robot.cameras)} cameras {width}x{height} jpeg at '
              f'{CAMERA_HZ} Hz, {torch.get_num_threads()} threads, {options.device}')
        for number, (name, more) in enumerate(runs.items()):
            out = Path(folder, f'out{number}')
            seconds = replayed([*common, *more, '--out', str(out)])
            found = json.loads((out / 'metrics.json').read_text())
            print(f'{name:48} {seconds:6.1f} s  {options.seconds / seconds:6.1f} x real time  '
                  f'{found["counts"]["observations"]} observations  network '
                  f'{found["recordings"][0]["inference_s"]:.1f} s')
    batches(policy, options)


def batches(policy: Policy, options) -> None:
    """Print the rate one by one and in batches, and the largest difference of their chunks."""
    random, robot = np.random.default_rng(1), policy.robot
    observations = [Observation(
        stamp_ns=i + 1, instruction='open the drawer', state=random.normal(
            size=len(robot.state_names)), images={camera.name: random.integers(
                0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
                for camera in robot.cameras}) for i in range(options.count)]

    def chunks(size: int):
        return [chunk.actions for start in range(0, len(observations), size)
                for chunk in policy.act_batch(observations[start:start + size],
                                              seeds=[0] * len(observations[start:start + size]))]

    found, rates = {}, {}
    for size in (1, options.batch):
        chunks(size)
        start = time.perf_counter()
        found[size] = np.array(chunks(size))
        rates[size] = len(observations) / (time.perf_counter() - start)
        print(f'batches of {size:4}: {rates[size]:8.1f} observations/s')
    span = robot.action_space.upper - robot.action_space.lower
    apart = (np.abs(found[1] - found[options.batch]) / span).max()
    print(f'{rates[options.batch] / rates[1]:.1f} x; largest difference {apart:.1e} of the range')


def memory(options) -> None:
    """Print the peak memory of replays of a small and a large bag, each in its own process."""
    robot = Policy.load(default_checkpoint()).robot
    per_s = 2 * CAMERA_HZ * 640 * 480 * 3
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            size = write_bag(Path(folder, 'bag'), robot, 1e6 * megabytes / per_s, width=640,
                             height=480, jpeg=False)
            done = subprocess.run(
                [sys.executable, __file__, 'replay-once', str(Path(folder, 'bag')),
                 str(Path(folder, 'out'))], capture_output=True, text=True, check=False)
            print(f'bag of {size / 1e6:.0f} MB: {done.stdout.strip() or done.stderr[-500:]}')


def replay_once(options) -> None:
    """Replay one bag with the shipped checkpoint and print the peak memory."""
    replayed([options.bag, '--out', options.out, '--latency', '300ms', '--probe-every', '20'])
    print(f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB')


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    fast = commands.add_parser('speed')
    fast.add_argument('--checkpoint', type=Path)
    fast.add_argument('--seconds', type=float, default=60.0)
    fast.add_argument('--latency', default='100ms')
    fast.add_argument('--device', default='cpu')
    fast.add_argument('--dtype', choices=DTYPES, default='float32')
    fast.add_argument('--batch', type=int, default=16)
    fast.add_argument('--count', type=int, default=64, help='observations for the batches')
    fast.set_defaults(run=speed)
    much = commands.add_parser('memory')
    much.add_argument('--megabytes', type=float, nargs='+', default=(20, 2000))

    much.set_defaults(run=memory)
    once = commands.add_parser('replay-once')
    once.add_argument('bag')
    once.add_argument('out')
    once.set_defaults(run=replay_once)
    options = parser.parse_args()
    options.run(options)


if __name__ == '__main__':
    main()
