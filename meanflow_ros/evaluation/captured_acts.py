"""A policy that answers batches of observations through one CUDA graph, padded to a fixed size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from meanflow_ros.core import meanflow
from meanflow_ros.core.contract import ActionChunk, Observation, RobotSpec
from meanflow_ros.core.policy import Policy
from meanflow_ros.core.prefix import checked_prefix

BATCH, WARM_UP = 32, 3


class CapturedActs:
    """`Policy.act_batch` for many small requests, on a GPU, of pictures of the cameras' own size.

    prompts: all that will ever be asked.
    """

    def __init__(self, policy: Policy, steps: int, prompts: Sequence[str]):
        self._policy, self._steps = policy, steps
        network, robot, device = policy.network, policy.robot, policy.device
        ids, mask = network.encoder.tokenize(
            [policy.config.prompt.format(instruction=text) for text in prompts])
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        self._kept = ids, mask   # the graph reads their memory
        self._row = {text: index for index, text in enumerate(prompts)}
        camera = robot.cameras[0]
        self._pictures = torch.zeros(BATCH, len(robot.cameras), camera.height, camera.width, 3,
                                     dtype=torch.uint8, device=device)
        self._which = torch.zeros(BATCH, dtype=torch.int64, device=device)
        self._state = torch.zeros(BATCH, len(robot.state_names), device=device)
        self._noise = torch.zeros(BATCH, robot.horizon, network.dit.action_size, device=device)
        self._known = ()
        if policy.config.max_prefix:
            self._known = (torch.zeros_like(self._noise), torch.zeros(
                BATCH, robot.horizon, dtype=torch.bool, device=device))
        sampler = meanflow.SAMPLERS[policy.config.sampler]

        def act():
            pixels = network.encoder.preprocess(self._pictures)
            conditioning = network.condition(pixels, ids[self._which], mask[self._which],
                                             self._state if robot.state_names else None)
            return sampler(network.velocity(conditioning, *self._known), self._noise, steps=steps)

        with torch.inference_mode():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    act()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = act()

    @property
    def robot(self) -> RobotSpec:
        """Return the robot that the policy was trained for."""
        return self._policy.robot

    @torch.inference_mode()
    def __call__(self, observations: list[Observation], noise_seeds: list[int],
                 prefixes: Sequence[np.ndarray] = ()) -> list[ActionChunk]:
        """Return the chunk of each observation, which continues its prefix."""
        robot, longest = self.robot, self._policy.config.max_prefix
        prefixes = [checked_prefix(prefix, robot, longest)
                    for prefix in prefixes or [None] * len(observations)]
        chunks = []
        for start in range(0, len(observations), BATCH):
            own = slice(start, start + BATCH)
            chunks += self._answer(observations[own], noise_seeds[own], prefixes[own])
        return chunks

    def _answer(self, observations: list[Observation], seeds: list[int],
                prefixes: list[np.ndarray]) -> list[ActionChunk]:
        policy, count = self._policy, len(observations)
        pictures = np.stack([[o.images[name] for name in policy.robot.camera_names]
                             for o in observations])
        self._pictures[:count].copy_(torch.from_numpy(pictures))
        self._which[:count].copy_(torch.tensor([self._row[o.instruction] for o in observations]))
        if policy.config.state_normalizer:
            self._state[:count].copy_(torch.from_numpy(policy.config.state_normalizer.apply(
                np.stack([o.state for o in observations]))))
        self._noise[:count].copy_(torch.cat([policy.noise(o.stamp_ns, seed)
                                             for o, seed in zip(observations, seeds)]))
        if self._known:
            for held, value in zip(self._known, policy.known_steps(prefixes, observations)):
                held[:count].copy_(value)
        self._graph.replay()
        actions = self._result[:count].double().cpu().numpy()
        return [policy.chunk(row, o, prefix)
                for row, o, prefix in zip(actions, observations, prefixes)]
