"""What answers the observations of a replay: a checkpoint, in batches, or nothing at all.

On a CPU batches go to several threads of one core each: that scales, which the small products of
one batch do not. The replay goes on decoding meanwhile.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from meanflow_ros.core.contract import ActionChunk, Observation
from meanflow_ros.core.encoding_once import EncodingOnce, Question
from meanflow_ros.core.loading import load
from meanflow_ros.core.runtime import RuntimeOptions
from meanflow_ros.evaluation.replay.settings import LIVE, RECORDED, ReplaySettings

Act = Callable[[Sequence[Observation], Sequence[int]], list[ActionChunk]]
AHEAD = 2          # batches that wait while every thread has one
SWITCH_S = 2e-4    # a thread that waits for the interpreter gets it so soon


class Acting:
    """A checkpoint with the settings of a replay, in batches as fast as they go.

    How long the node takes for one observation is another matter: see latency.measured.

    seconds, chunks: what inference has taken so far; the seconds of all threads are added up.
    flow: whether it starts from noise. threads: that share the batches, 1 on a GPU. Use it from
    one thread.
    """

    def __init__(self, settings: ReplaySettings):
        self.policy = load(
            settings.checkpoint, device=settings.device, dtype=settings.dtype,
            options=RuntimeOptions(graphs=False, kernels=False, threads=settings.threads))
        self.steps = settings.sampler_steps or self.policy.config.sampler_steps
        self.seed = settings.seed
        self.seconds, self.chunks = 0.0, 0
        self.flow = self.policy.config.sampler != 'regression'
        self._answer = EncodingOnce(self.policy, batch=settings.at_a_time)
        on_gpu = self.policy.device.type == 'cuda'
        self.threads = 1 if on_gpu else torch.get_num_threads()
        self._pool = _one_core_each(self.threads) if on_gpu or self.threads > 1 else None
        if on_gpu and self.policy.dtype == torch.float32:
            torch.backends.cudnn.allow_tf32 = False   # a chunk is not to depend on its batch
        self._under_way: deque[tuple[Future, Sequence]] = deque()

    def __call__(self, observations: Sequence[Observation], seeds: Sequence[int],
                 steps: Sequence[int | None] | None = None) -> list[ActionChunk]:
        """Return the chunk of each observation; pictures of different sizes are allowed.

        steps: NFE of each, None for the replay's. Neighbours that show the same pictures (as
        arrays) are encoded once.
        """
        questions = [Question(observation, seed, some or self.steps) for observation, seed, some in
                     zip(observations, seeds, steps or [None] * len(seeds), strict=True)]
        if self._pool is None or len(questions) == 1:
            return self._counted(*self._timed(questions))
        size = -(-len(questions) // self.threads)
        parts = [self._pool.submit(self._timed, questions[start:start + size])
                 for start in range(0, len(questions), size)]
        return [chunk for part in parts for chunk in self._counted(*part.result())]

    def infer(self, queue) -> None:
        """Set the chunk of every Taken of a queue, at the latest when `settle` returns.

        A queue of one is answered at once.
        """
        if any(taken.prefix is not None and len(taken.prefix.actions) for taken in queue):
            for taken in queue:
                taken.chunk = self.policy.act(taken.observation, steps=self.steps, seed=self.seed,
                                              prefix=taken.prefix.actions)
            return
        if self._pool is None or len(queue) == 1:
            _give(queue, self([taken.observation for taken in queue], [self.seed] * len(queue)))
            return
        questions = [Question(taken.observation, self.seed, self.steps) for taken in queue]
        self._under_way.append((self._pool.submit(self._timed, questions), queue))
        while len(self._under_way) > self.threads + AHEAD:
            self._settle_one()

    def settle(self) -> None:
        """Wait until every chunk is there."""
        while self._under_way:
            self._settle_one()

    def _settle_one(self) -> None:
        future, queue = self._under_way.popleft()
        _give(queue, self._counted(*future.result()))

    def _timed(self, questions: Sequence[Question]) -> tuple[list[ActionChunk], float]:
        start = time.perf_counter()
        chunks = self._answer(questions)
        return chunks, time.perf_counter() - start

    def _counted(self, chunks: list[ActionChunk], seconds: float) -> list[ActionChunk]:
        self.seconds += seconds
        self.chunks += len(chunks)
        return chunks


def _one_core_each(count: int) -> ThreadPoolExecutor:
    """Return threads in which PyTorch uses one core each; it goes on with `count` in this one."""
    sys.setswitchinterval(SWITCH_S)
    return ThreadPoolExecutor(count, 'replay', torch.set_num_threads, (1,))


def _give(queue, chunks: Sequence[ActionChunk]) -> None:
    for taken, chunk in zip(queue, chunks, strict=True):
        taken.chunk = chunk


def make_acting(settings: ReplaySettings) -> Acting | None:
    """Return what answers; None where the recorded commands are the policy."""
    if settings.policy == LIVE:
        from meanflow_ros.evaluation.replay.live import LiveNode
        return LiveNode(settings)
    return None if settings.policy == RECORDED else Acting(settings)
