"""Samples per second of the loader alone, and the memory of building and streaming a cache.

    python test/benchmarks/bench_loader.py [--device cuda] [--size 128] [--batch 128]

Made-up data. The memory shown is RssAnon of this process: what it has allocated, without the
pages of the mapped files, which the kernel may drop whenever it likes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from made_bags import ROBOT, Scene, T0, image, pixels, plain_action, status, text  # noqa: E402
from made_bags import joint_state, pose  # noqa: E402

from meanflow_ros.training.cache import build_cache, open_cache  # noqa: E402
from meanflow_ros.training.data_config import DataConfig  # noqa: E402
from meanflow_ros.training.loader import Loader  # noqa: E402
from meanflow_ros.training.recordings import find_recordings  # noqa: E402

MS = 1_000_000
HEIGHT, WIDTH = 240, 320
EPISODE_STEPS = 50


def memory_mib() -> float:
    status_text = Path('/proc/self/status').read_text()
    return int(re.search(r'RssAnon:\s+(\d+) kB', status_text)[1]) / 1024


def write_bag(path: Path, episodes: int) -> None:
    """Write episodes of two cameras at 50 Hz, 320 x 240."""
    scene, now_ns = Scene(), T0
    for number in range(episodes):
        scene.add('episode', now_ns, status('start', number))
        scene.add('instruction', now_ns, text(f'pick up block {number % 7}'))
        for step in range(EPISODE_STEPS):
            scene.add('joint_states', now_ns, joint_state(now_ns, **pose(now_ns)))
            for camera in ROBOT.camera_names:
                scene.add(f'camera/{camera}/image_raw', now_ns,
                          image(now_ns, pixels(camera, step, HEIGHT, WIDTH)))
            scene.add('action', now_ns, plain_action(now_ns))
            now_ns += 20 * MS
        scene.add('episode', now_ns, status('success', number))
        now_ns += 1000 * MS
    scene.write(path)


def build(folder: Path, bags: int, size: int) -> tuple[Path, float, float]:
    """Build a cache of the first `bags` bags here; return it, the seconds, and the most memory."""
    most = memory_mib()

    def watch(name, rows, reason):
        nonlocal most
        most = max(most, memory_mib())

    directory, start = folder / f'cache-{bags}', time.perf_counter()
    paths = find_recordings(folder / 'bags')[:bags]
    build_cache(paths, ROBOT, DataConfig(), size, directory, progress=watch)
    return directory, time.perf_counter() - start, most


def stream(directory: Path, device: torch.device, batch: int, seconds: float,
           resident: bool) -> tuple[float, float, int]:
    """Return samples per second of the loader alone, the most memory, and the rows."""
    dataset = open_cache(directory)

    def rows(step: int) -> np.ndarray:
        return np.random.default_rng(step).integers(0, len(dataset), batch)

    with Loader(dataset, rows, device, resident=resident) as loader:
        for _ in range(20):
            next(loader)
        steps, most, start = 0, memory_mib(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(loader)
            steps += 1
            most = max(most, memory_mib())
        if device.type == 'cuda':
            torch.cuda.synchronize()
        return steps * batch / (time.perf_counter() - start), most, len(dataset)


def describe(device: torch.device) -> str:
    model = Counter(re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()))
    gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'no GPU'
    return f'{os.cpu_count()} CPUs {next(iter(model), "")}, {gpu}, load {os.getloadavg()[0]:.1f}'


def alone(function, *arguments):
    """Call a function in a process of its own, so that its memory is not that of another."""
    with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context('spawn'), initializer=torch.set_num_threads,
            initargs=(1,)) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--size', type=int, default=128, help='pixels of a cached picture')
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--bags', type=int, default=20, help='of 4 episodes of 50 observations')
    parser.add_argument('--seconds', type=float, default=5.0, help='per measurement')
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    print(f'{alone(describe, device)}; 2 cameras, {chosen.size} px, batch {chosen.batch}')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for number in range(chosen.bags):
            write_bag(folder / 'bags' / f'{number:03d}', 4)
        for bags in (1, chosen.bags):
            directory, taken, most = alone(build, folder, bags, chosen.size)
            gib = sum(file.stat().st_size for file in directory.iterdir()) / 2**30
            print(f'{bags:3} bags: built in {taken:.1f} s, {200 * bags / taken:.0f} observations '
                  f'per s, cache {gib:.3f} GiB, RssAnon at most {most:.0f} MiB')
            for resident in (False, True) if device.type == 'cuda' else (False,):
                rate, most, rows = alone(stream, directory, device, chosen.batch, chosen.seconds,
                                         resident)
                print(f'{bags:3} bags: {rows} pairs {"resident" if resident else "streamed"}: '
                      f'{rate:.0f} samples per s, RssAnon at most {most:.0f} MiB')


if __name__ == '__main__':
    main()
