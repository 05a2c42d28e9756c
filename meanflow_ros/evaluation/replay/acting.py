"""What answers the observations of a replay: a checkpoint, in batches, or nothing at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from meanflow_ros.core.contract import ActionChunk, Observation
from meanflow_ros.core.policy import DTYPES, Policy
from meanflow_ros.evaluation.replay.settings import LIVE, RECORDED, ReplaySettings

Act = Callable[[Sequence[Observation], Sequence[int]], list[ActionChunk]]


class Acting:
    """A checkpoint with the settings of a replay.

    seconds, chunks: what inference has taken so far. flow: whether it starts from noise.
    """

    def __init__(self, settings: ReplaySettings):
        device = settings.device
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.policy = Policy.load(settings.checkpoint, device=device,
                                  dtype=DTYPES[settings.dtype])
        self.steps = settings.sampler_steps or self.policy.config.sampler_steps
        self.seed, self._batch = settings.seed, settings.batch
        self.seconds, self.chunks = 0.0, 0
        self.flow = self.policy.config.sampler != 'regression'

    def __call__(self, observations: Sequence[Observation], seeds: Sequence[int],
                 steps: int | None = None) -> list[ActionChunk]:
        """Return the chunk of each observation; pictures of different sizes are allowed."""
        start = time.perf_counter()
        chunks: list[ActionChunk | None] = [None] * len(observations)
        for rows in _alike(observations, self._batch):
            answers = self.policy.act_batch([observations[row] for row in rows],
                                            steps=steps or self.steps,
                                            seeds=[seeds[row] for row in rows])
            for row, chunk in zip(rows, answers, strict=True):
                chunks[row] = chunk
        self.seconds += time.perf_counter() - start
        self.chunks += len(chunks)
        return chunks

    def infer(self, queue) -> None:
        """Set the chunk of every Taken of a queue."""
        if any(taken.prefix is not None and len(taken.prefix.actions) for taken in queue):
            for taken in queue:
                taken.chunk = self.policy.act(taken.observation, steps=self.steps, seed=self.seed,
                                              prefix=taken.prefix.actions)
            return
        for taken, chunk in zip(queue, self([taken.observation for taken in queue],
                                            [self.seed] * len(queue)), strict=True):
            taken.chunk = chunk


def _alike(observations: Sequence[Observation], most: int) -> list[list[int]]:
    """Return at most `most` rows that can be one batch: their pictures have the same sizes."""
    groups: dict[tuple, list[int]] = {}
    for row, observation in enumerate(observations):
        key = tuple(sorted((name, image.shape) for name, image in observation.images.items()))
        groups.setdefault(key, []).append(row)
    return [rows[start:start + most] for rows in groups.values()
            for start in range(0, len(rows), most)]


def make_acting(settings: ReplaySettings) -> Acting | None:
    """Return what answers; None where the recorded commands are the policy."""
    if settings.policy == LIVE:
        from meanflow_ros.evaluation.replay.live import LiveNode
        return LiveNode(settings)
    return None if settings.policy == RECORDED else Acting(settings)
