"""The path that the fast one is compared with: a rectified flow in FLOWER's manner.

As FLOWER's code does it (Reuss et al. 2025, arXiv 2509.04996), built of this package's own
network: a vision pass per camera, four Euler steps, keys and values of the context computed again
in every step. It can be compiled, and captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartEncoderLayer
from transformers.models.florence2.modeling_florence2 import Florence2VisionBlock

from meanflow_ros.core.contract import ActionChunk, Observation
from meanflow_ros.core.dit import FlowBlock, TimeEmbedder
from meanflow_ros.core.policy import Policy
from meanflow_ros.evaluation.bench.device import capture

STEPS = 4
REPEATED = (Florence2VisionBlock, BartEncoderLayer, FlowBlock)


def hold_weights_as(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep a network's weights as `dtype` in place; those of time embedders stay float32."""
    exact = {id(parameter) for module in network.modules() if isinstance(module, TimeEmbedder)
             for parameter in module.parameters()}
    for parameter in network.parameters():
        if id(parameter) not in exact:
            parameter.data = parameter.data.to(dtype)


def compile_blocks(network: nn.Module, *, backend: str = 'inductor') -> None:
    """Compile the blocks that repeat, each kind and shape once."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in list(network.modules()):
        if isinstance(module, REPEATED):
            module.compile(backend=backend, dynamic=False)


class FlowerPath:
    """Observation -> chunk; one prompt at a time, pictures of the cameras' own size."""

    def __init__(self, policy: Policy, *, steps: int = STEPS):
        self._policy, self._steps = policy, steps
        self._graph: Callable[[], None] | None = None

    def act(self, observation: Observation) -> ActionChunk:
        """Return the chunk; seed 0."""
        policy = self._policy
        with torch.inference_mode():
            pictures, numbers = self._host(observation)
            if self._graph is None:
                device = policy.device
                actions = self._compute([torch.from_numpy(p).to(device) for p in pictures],
                                        torch.from_numpy(numbers).to(device), self._ids)
            else:
                for buffer, picture in zip(self._pictures, pictures):
                    buffer.copy_(torch.from_numpy(picture), non_blocking=True)
                self._numbers.copy_(torch.from_numpy(numbers), non_blocking=True)
                self._graph()
                actions = self._actions
            return policy.chunk(actions[0].double().cpu().numpy(), observation)

    def prepare(self, observation: Observation, *, graph: bool = False) -> None:
        """Tokenise the observation's prompt, and capture what is computed if a graph is wanted."""
        policy = self._policy
        with torch.inference_mode():
            self._ids, _ = policy.network.encoder.tokenize(
                [policy.config.prompt.format(instruction=observation.instruction)])
            if not graph:
                return
            pictures, numbers = self._host(observation)
            self._pictures = [torch.from_numpy(p).to(policy.device) for p in pictures]
            self._numbers = torch.from_numpy(numbers).to(policy.device)

            def compute() -> None:
                self._actions = self._compute(self._pictures, self._numbers, self._ids)
            self._graph = capture(compute)

    def _host(self, observation: Observation) -> tuple[list[np.ndarray], np.ndarray]:
        """Return writable pictures, and states and noise in one array."""
        policy = self._policy
        parts = [policy.noise(observation.stamp_ns, 0).numpy().ravel()]
        if policy.config.state_normalizer:
            parts.insert(0, policy.config.state_normalizer.apply(observation.state))
        return ([observation.images[name].copy() for name in policy.robot.camera_names],
                np.concatenate(parts).astype(np.float32))

    def _compute(self, pictures: Sequence[Tensor], numbers: Tensor, ids: Tensor) -> Tensor:
        policy, network = self._policy, self._policy.network
        encoder, dit, states = network.encoder, network.dit, len(policy.robot.state_names)
        state = numbers[None, :states] if states else None
        z = numbers[states:].view(1, policy.robot.horizon, -1)
        with policy._autocast():
            tokens = [encoder.multi_modal_projector(encoder.vision_tower(
                ((encoder.preprocess(picture) - encoder.mean) / encoder.std)[None]
            ).last_hidden_state) for picture in pictures]
            bart = encoder.language_model['encoder']
            sequence = torch.cat([*tokens, encoder.prompt_embed.to(tokens[0].dtype),
                                  bart.embed_tokens(ids).to(tokens[0].dtype)], dim=1)
            context = _read(bart, sequence)
            for step in range(self._steps, 0, -1):
                t = torch.full((1,), step / self._steps, device=z.device)
                conditioning = dit.condition(context, None, state, None)
                z = z - dit(z, t=t, h=torch.zeros_like(t),
                            conditioning=conditioning) / self._steps
        return z.clamp(-1, 1)


def _read(bart: nn.Module, x: Tensor) -> Tensor:
    """Run a BartEncoder without a mask; its own forward makes another one while a graph captures.

    x: (1, S, D).
    """
    x = bart.layernorm_embedding(x + bart.embed_positions(x[:, :, -1]))
    for layer in bart.layers:
        x = layer(x, None)
    return x
