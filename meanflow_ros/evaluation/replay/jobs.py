"""Many bags, one after the other, by several processes, or by many machines through Ray.

The unit is a bag. What every worker computes is the same, whichever way it was started; a bag
that fails is reported by its name and stops no other.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import cv2
import torch

from meanflow_ros.evaluation.replay.acting import Acting, make_acting
from meanflow_ros.evaluation.replay.parts import Parts
from meanflow_ros.evaluation.replay.replay_bag import BagReport, replay_bag
from meanflow_ros.evaluation.replay.settings import ReplaySettings

Progress = Callable[[float], None]
Done = Callable[[Path, dict], None]
TOLD = (ValueError, OSError, RuntimeError, MemoryError)    # whose message says enough
DIED = 'the worker process died, perhaps for want of memory'
_acting: Acting | None = None      # of a worker process


def run_here(bags: Sequence[Path], settings: ReplaySettings, directory: Path,
             acting: Acting | None, *, progress: Progress, done: Done) -> None:
    """Replay bags in this process. progress: told seconds of recording. done: after each bag."""
    fingerprint = settings.fingerprint()
    for bag in bags:
        done(bag, _work(bag, settings, Parts(directory, bag, fingerprint), acting, progress))


def run_in_processes(bags: Sequence[Path], settings: ReplaySettings, directory: Path,
                     jobs: int, *, done: Done) -> None:
    """Replay bags with `jobs` processes; `done` is called in the order in which they finish.

    A process that dies takes all others with it. What was waiting is then tried again, and so is
    each bag that may have been under way, one at a time: one that ends its process alone is
    reported.
    """
    waiting = list(bags)
    while waiting:
        left = _run_pool(waiting, settings, directory, jobs, done)
        suspects = [bag for bag in waiting if bag in left][:jobs]
        for bag in suspects:
            if _run_pool([bag], settings, directory, 1, done):
                done(bag, failed(bag, DIED))
        waiting = [bag for bag in waiting if bag in left and bag not in suspects]


def _run_pool(bags: Sequence[Path], settings: ReplaySettings, directory: Path, jobs: int,
              done: Done) -> set[Path]:
    """Replay bags by processes until all are done or one dies; return those that are left."""
    fingerprint = settings.fingerprint()
    context = multiprocessing.get_context('forkserver')    # which imports PyTorch once for all
    context.set_forkserver_preload([__name__])
    left = set(bags)
    count = min(jobs, len(bags))
    own = dataclasses.replace(settings, threads=share_of(settings.threads, count))
    with ProcessPoolExecutor(count, context, _begin_worker, (own,)) as pool:
        try:
            waiting = {pool.submit(_work_in_process, bag, settings, directory, fingerprint): bag
                       for bag in bags}
            for future in concurrent.futures.as_completed(waiting):
                report, bag = future.result(), waiting[future]
                left.remove(bag)
                done(bag, report)
        except BrokenProcessPool:
            pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
    return left


def run_with_ray(bags: Sequence[Path], settings: ReplaySettings, directory: Path, *,
                 done: Done, address: str | None = None) -> None:
    """Replay bags as Ray tasks; the machines must see the bags and the checkpoint by their paths.

    address: of a Ray cluster, None for the one that RAY_ADDRESS names, or a local one.
    ValueError if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("Ray is not installed: pip install 'meanflow_ros[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, include_dashboard=False,
                 configure_logging=False)
    fingerprint = settings.fingerprint()
    try:
        remote = ray.remote(max_retries=1)(_work_far_away)
        waiting = {remote.remote(str(bag), settings): bag for bag in bags}
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            bag = waiting.pop(reference)
            try:
                report, files = ray.get(reference)
                Parts(directory, bag, fingerprint).take(files)
            except ray.exceptions.RayError as error:
                report = failed(bag, f'the worker failed: {_first_line(error)}')
            done(bag, report)
    finally:
        if started:
            ray.shutdown()


def _begin_worker(settings: ReplaySettings) -> None:
    global _acting
    torch.set_num_threads(settings.threads)     # while the checkpoint is read, too
    cv2.setNumThreads(settings.threads)
    _acting = make_acting(settings)


def share_of(threads: int, processes: int) -> int:
    """Return the threads of each process, 1 or more; 0 threads in all: what PyTorch would take."""
    return max(1, (threads or torch.get_num_threads()) // processes)


def _work_in_process(bag: Path, settings: ReplaySettings, directory: Path,
                     fingerprint: str) -> dict:
    return _work(bag, settings, Parts(directory, bag, fingerprint), _acting)


def _work_far_away(bag: str, settings: ReplaySettings) -> tuple[dict, dict[str, bytes]]:
    global _acting
    if _acting is None and settings.checkpoint:
        _acting = make_acting(settings)
    with tempfile.TemporaryDirectory() as directory:
        parts = Parts(Path(directory), Path(bag), settings.fingerprint())
        return _work(Path(bag), settings, parts, _acting), parts.files()


def _work(bag: Path, settings: ReplaySettings, parts: Parts, acting: Acting | None,
          progress: Progress = lambda seconds: None) -> dict:
    """Replay one bag, or take what is there; a failure is part of the report."""
    earlier = parts.report()
    if earlier is not None:
        return earlier
    report = BagReport(name=bag.name)
    before = (acting.seconds, acting.chunks) if acting else (0.0, 0)
    try:
        for episode in replay_bag(bag, settings, acting, report, progress=progress,
                                  done=parts.has):
            parts.save(episode)
    except TOLD as error:
        report.error = _first_line(error)
        return asdict(report)
    except Exception as error:    # of a library, or a mistake of ours: no other bag is to suffer
        report.error = f'{type(error).__name__}: {_first_line(error)}'
        return asdict(report)
    if acting:
        report.inference_s = acting.seconds - before[0]
        report.inferred = acting.chunks - before[1]
    parts.finish(report)
    return asdict(report)


def failed(bag: Path, error: str) -> dict:
    """Return the report of a bag that could not be replayed."""
    return asdict(BagReport(name=bag.name, error=error))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def with_instructions(settings: ReplaySettings, texts: Sequence[str]) -> ReplaySettings:
    """Return the settings with the instructions of all recordings, for the swapped one."""
    return dataclasses.replace(settings, known_instructions=tuple(sorted(set(texts))))
