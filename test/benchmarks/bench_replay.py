"""How fast a replay is, and how much memory it takes, whatever the length of the recording.

    python test/benchmarks/bench_replay.py speed    # against real time, and in batches
    python test/benchmarks/bench_replay.py speed --jobs 16 --recordings 16       # a folder of them
    python test/benchmarks/bench_replay.py speed --preset large --device cuda    # on a GPU
    python test/benchmarks/bench_replay.py memory   # a bag of 2 GB on disk against one of 20 MB

Both make their bags in a temporary directory and remove them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import made_bags as made  # noqa: E402
from meanflow_ros.core.contract import ActionSpace, Observation  # noqa: E402
from meanflow_ros.core.encoding_once import EncodingOnce, Question  # noqa: E402
from meanflow_ros.core.policy import DTYPES, Policy, read_config  # noqa: E402
from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions  # noqa: E402
from meanflow_ros.evaluation.bench.subjects import observations, random_policy  # noqa: E402
from meanflow_ros.evaluation.evaluate import main as evaluate  # noqa: E402
from meanflow_ros.paths import default_checkpoint  # noqa: E402
from meanflow_ros.ros.bag import BagWriter  # noqa: E402

MS = 1_000_000
BARE = RuntimeOptions(graphs=False, kernels=False)   # as the replay
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
    """Print the speed of whole replays, and of the network one by one and in batches."""
    found = {'machine': platform.processor(), 'cores': os.cpu_count(), 'device': options.device,
             'dtype': options.dtype, 'torch': torch.__version__}
    if options.device.startswith('cuda'):
        found['device'] = torch.cuda.get_device_name(options.device)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or a_checkpoint(
            options.preset, Path(folder, 'policy'), options.device)
        if not options.no_replays:
            found['replays'] = replays(checkpoint, Path(folder), options)
        if not options.no_network:
            found['network'] = network(checkpoint, options)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + '\n')


def a_checkpoint(preset: str, folder: Path, device: str) -> Path:
    """Return the checkpoint that ships, which is tiny, or one of random weights."""
    if preset == 'tiny':
        return default_checkpoint()
    random_policy(preset, device=device).save(folder, dtype=torch.bfloat16)
    return folder


def replays(checkpoint: Path, folder: Path, options) -> list[dict]:
    """Time whole replays, from the arguments to what is written; several are copies of one."""
    robot = read_config(checkpoint / 'policy.yaml').robot
    width, height = robot.cameras[0].width, robot.cameras[0].height
    first, *others = (folder / 'bags' / f'bag{number:03}' for number in range(options.recordings))
    first.parent.mkdir()
    write_bag(first, robot, options.seconds, width=width, height=height, jpeg=True)
    for other in others:
        shutil.copytree(first, other)
    common = [str(first.parent), '--checkpoint', str(checkpoint), '--no-mcap',
              '--device', options.device, '--dtype', options.dtype,
              '--batch', str(options.batch), '--jobs', str(options.jobs)]
    print(f'{options.recordings} x {options.seconds:g} s, {len(robot.cameras)} cameras '
          f'{width}x{height} jpeg at {CAMERA_HZ} Hz, {options.device}, {options.dtype}, '
          f'{options.jobs} processes, {os.cpu_count()} cores')
    replayed([*common, '--policy', 'recorded', '--duration', '1', '--out', str(folder / 'warm')])
    runs = [('recorded commands, every observation', ['--policy', 'recorded'])]
    for threads in options.threads:
        given = ['--latency', options.latency, '--threads', str(threads)]
        name = f'policy, latency {options.latency}, {threads or "default"} threads'
        runs += [(f'{name}, no probes', [*given, '--probe-every', '0']),
                 (f'{name}, probes every 2 s', given)]
    length, found = options.recordings * options.seconds, []
    for number, (name, more) in enumerate(runs):
        out = folder / f'out{number}'
        seconds = replayed([*common, *more, '--out', str(out)])
        metrics = json.loads((out / 'metrics.json').read_text())
        found.append({
            'what': name, 'recordings': options.recordings, 'processes': options.jobs,
            'seconds': seconds, 'times_real_time': length / seconds,
            'observations': metrics['counts']['observations'],
            'network_s': sum(each['inference_s'] for each in metrics['recordings'])})
        print(f'{name:56} {seconds:6.1f} s  {length / seconds:6.1f} x real time  '
              f'{found[-1]["observations"]} observations  network '
              f'{found[-1]["network_s"]:.1f} s of its threads', flush=True)
    return found


def network(checkpoint: Path, options) -> list[dict]:
    """Time the network as the replay runs it: batches of 1, and larger ones.

    Differences are the largest from batches of 1 in the same numbers, in shares of each
    dimension's range. With other numbers than float32, rows in float32 follow: batches there are
    to be equal to 1e-5.
    """
    if options.device.startswith('cuda'):
        torch.backends.cudnn.allow_tf32 = False
    robot = read_config(checkpoint / 'policy.yaml').robot
    seen = observations(robot, options.count)
    rows = compared(ways(checkpoint, options), seen, robot.action_space)
    if options.device.startswith('cuda'):
        rows.append(prepared(checkpoint, options, seen))
    if options.dtype != 'float32':
        few = seen[:options.exact_count]
        sizes = dict.fromkeys(min(size, len(few)) for size in (1, *options.batches))
        rows += compared(in_batches(checkpoint, options.device, torch.float32, sizes), few,
                         robot.action_space)
    return rows


def compared(answers: Iterator[tuple[str, Callable]], seen: Sequence[Observation],
             space: ActionSpace) -> list[dict]:
    """Print and return the rate of each, and its difference from the first."""
    rows, first = [], None
    for name, answer in answers:
        chunks, rate = rate_of(answer, seen)
        first = (chunks, rate) if first is None else first
        apart = np.abs(chunks - first[0]) / (space.upper - space.lower)
        rows.append({'way': name, 'observations': len(seen), 'observations_per_s': rate,
                     'times_unbatched': rate / first[1],
                     'largest_difference': float(apart.max())})
        print(f'{name:40} {rate:8.1f} observations/s  {rate / first[1]:5.1f} x  '
              f'{apart.max():.1e} of the range', flush=True)
    return rows


def prepared(checkpoint: Path, options, seen: Sequence[Observation]) -> dict:
    """Print and return the rate at which pictures alone go to the device and are resized there.

    It is part of every batch's time, one picture after the other: a share of it that batches do
    not make smaller.
    """
    policy = FastPolicy.load(checkpoint, device=options.device, dtype=DTYPES[options.dtype],
                             options=BARE)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        for each in seen:
            for picture in each.images.values():
                policy.fused.prepare([torch.from_numpy(picture)[None, None].to(policy.device)])
        torch.cuda.synchronize(policy.device)
        best = max(best, len(seen) / (time.perf_counter() - start))
    print(f'{"the pictures alone, without the network":40} {best:8.1f} observations/s', flush=True)
    return {'way': 'pictures alone', 'observations': len(seen), 'observations_per_s': best}


def ways(checkpoint: Path, options) -> Iterator[tuple[str, Callable]]:
    """Yield what is timed, the batches of 1 first; each returns chunks of observations.

    One network at a time is held.
    """
    device, dtype = options.device, DTYPES[options.dtype]
    yield from in_batches(checkpoint, device, dtype, dict.fromkeys((1, *options.batches)))
    yield 'Policy, one by one', one_by_one(Policy.load(checkpoint, device=device, dtype=dtype))
    if device.startswith('cuda'):
        node = FastPolicy.load(checkpoint, device=device, dtype=dtype)
        node.warm_up(observations(node.robot, 1)[0])
        yield f'the node, one by one, {node.why_eager or "CUDA graphs"}', one_by_one(node)
        node.close()


def in_batches(checkpoint: Path, device: str, dtype: torch.dtype,
               sizes: Iterable[int]) -> Iterator[tuple[str, Callable]]:
    """Yield what the replay does with batches of each size: no graphs, no kernels of our own."""
    policy = FastPolicy.load(checkpoint, device=device, dtype=dtype, options=BARE)
    steps, numbers = policy.config.sampler_steps, str(dtype).removeprefix('torch.')

    def of(size: int) -> Callable:
        answer = EncodingOnce(policy, batch=size)
        return lambda seen: [chunk for start in range(0, len(seen), size) for chunk in answer(
            [Question(each, 0, steps) for each in seen[start:start + size]])]

    for size in sizes:
        yield f'{numbers}, batches of {size}', of(size)


def one_by_one(policy: Policy) -> Callable:
    """Return what answers observations each by itself."""
    return lambda seen: [policy.act(each) for each in seen]


def rate_of(answer: Callable, seen: Sequence[Observation]) -> tuple[np.ndarray, float]:
    """Return chunks (N, T, A) in their units, and observations/s, the best of three.

    Chunks are in host memory when they are returned: the device is done then.
    """
    answer(seen)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        chunks = answer(seen)
        best = max(best, len(seen) / (time.perf_counter() - start))
    return np.array([chunk.actions for chunk in chunks]), best


def memory(options) -> None:
    """Print the peak memory of replays of a small and a large bag, each in its own process."""
    robot = read_config(default_checkpoint() / 'policy.yaml').robot
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
    replayed([options.bag, '--out', options.out, '--latency', '300ms', '--probe-every', '20',
              '--picture-size', 'any'])
    print(f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB')


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    fast = commands.add_parser('speed')
    fast.add_argument('--checkpoint', type=Path)
    fast.add_argument('--preset', choices=('tiny', 'large'), default='tiny',
                      help='the checkpoint that ships, or a large one of random weights')
    fast.add_argument('--seconds', type=float, default=60.0, help='of a recording')
    fast.add_argument('--recordings', type=int, default=1, help='how many are replayed')
    fast.add_argument('--jobs', type=int, default=1, help='processes that replay them')
    fast.add_argument('--latency', default='100ms')
    fast.add_argument('--device', default='cpu')
    fast.add_argument('--dtype', choices=DTYPES, default='float32')
    fast.add_argument('--batch', type=int, default=0, help='of the replays')
    fast.add_argument('--threads', type=int, nargs='+', default=[0],
                      help='of a CPU, in all processes together; 0: what PyTorch would take')
    fast.add_argument('--batches', type=int, nargs='+', default=[8, 16, 32, 64])
    fast.add_argument('--count', type=int, default=64, help='observations for the batches')
    fast.add_argument('--exact-count', type=int, default=16,
                      help='observations for the rows in float32 beside other numbers')
    fast.add_argument('--no-replays', action='store_true', help='time the network only')
    fast.add_argument('--no-network', action='store_true', help='time the replays only')
    fast.add_argument('--out', type=Path, help='of the figures, as JSON')
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
