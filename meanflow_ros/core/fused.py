"""A PolicyNetwork with all that is constant computed once, in parts that run in order.

    see: pictures of all cameras -> visual tokens      read: these and the prompt -> context
    dit.modulations: state -> what the network is told of it and the times, beside these two
    decide: context, that and noise -> actions

The constants are of one action space, horizon and number of cameras: those of a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanflow_ros.core import meanflow
from meanflow_ros.core.encoder_kernels import Resize
from meanflow_ros.core.fused_dit import FusedDiT, Schedule
from meanflow_ros.core.fused_encoder import FusedText, FusedVision, Placement, PromptEmbedding
from meanflow_ros.core.policy import Policy


class FusedNetwork(nn.Module):
    """What Policy computes between the pictures' bytes and the normalised actions.

    shifts: see VisionBlock; True where the parts will be compiled.
    """

    def __init__(self, policy: Policy, place: Placement, *, shifts: bool = False):
        super().__init__()
        encoder, robot = policy.network.encoder, policy.robot
        self.image_size = encoder.config.image_size
        self.register_buffer('mean', place.exact(encoder.mean).view(3))
        self.see = FusedVision(encoder, len(robot.cameras), place, shifts=shifts)
        self.read = FusedText(encoder, place)
        self.dit = FusedDiT(policy.network.dit, robot.action_space.name, robot.horizon, place)
        self.embed_prompts = PromptEmbedding(
            encoder, len(robot.cameras) * self.see.tokens, place)
        self.sampler = meanflow.SAMPLERS[policy.config.sampler]
        normalizer = policy.config.action_normalizer
        for name, value in (('middle', normalizer.invert(np.zeros_like(normalizer.low))),
                            ('half_range', (normalizer.high - normalizer.low) / 2)):
            self.register_buffer(name, torch.tensor(value, device=place.device))   # float64
        self.place = place
        self.kernels = place.kernels

    def schedule(self, steps: int) -> Schedule:
        """Return the constants of `steps` network evaluations; ValueError below 1."""
        return self.dit.schedule(times_of(self.sampler, steps))

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """Resize pictures, (B, cameras, H, W, 3) uint8 a size -> (B, C, S, S, 3) less the mean."""
        size = (self.image_size, self.image_size)
        resized = []
        for group in pictures:
            if self.kernels:
                resize = Resize.of(*group.shape[2:4], self.image_size, group.device)
                small = resize(group.flatten(0, 1), self.mean, self.place.dtype)
                resized.append(small.unflatten(0, group.shape[:2]))
                continue
            pixels = group.flatten(0, 1).movedim(-1, 1).float()    # a channels-last view
            if pixels.shape[-2:] != size:
                pixels = F.interpolate(pixels, size, mode='bilinear', antialias=True,
                                       align_corners=False)
            pixels = (pixels.movedim(1, -1) - self.mean).to(self.place.dtype)
            resized.append(pixels.unflatten(0, group.shape[:2]))
        return resized[0] if len(resized) == 1 else torch.cat(resized, dim=1)

    def decide(self, context: Tensor, bias: Tensor | None, modulations: Tensor, noise: Tensor,
               schedule: Schedule, steps: int,
               known: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return actions (B, T, A) in [-1, 1] from noise (B, T, A).

        known: x (B, T, A) and which of its steps are given (B, T), see `meanflow.with_prefix`.
        """
        keys, values = self.dit.keys_and_values(context)
        return self.sample(keys, values, bias, modulations, noise, schedule, steps, known)

    def sample(self, keys: Tensor, values: Tensor, bias: Tensor | None, modulations: Tensor,
               noise: Tensor, schedule: Schedule, steps: int,
               known: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Do as `decide`, from the keys and values of a context."""
        *modulations, clean = modulations
        keys, values = self.dit.laid_out(keys, values)
        given = (known[1], clean) if known else None
        constants = iter(zip(modulations, schedule.offsets))

        def u(z: Tensor, *, t: Tensor, h: Tensor, rows: None = None) -> Tensor:
            modulation, offset = next(constants)
            return self.dit.velocity(z, modulation, offset, keys, values, bias, given)

        if known:
            u = meanflow.with_prefix(u, known[0][..., :self.dit.action_size], known[1])
        return self.sampler(u, noise[..., :self.dit.action_size], steps=steps)

    def physical(self, actions: Tensor, out: Tensor | None = None) -> Tensor:
        """Return actions (B, T, A) in [-1, 1] as float64 in the units of the action space."""
        return torch.addcmul(self.middle, self.half_range, actions[..., :len(self.middle)],
                             out=out)

    def off(self, actions: np.ndarray, expected: np.ndarray) -> float:
        """Return how far physical actions are off, at most, in normalised units."""
        return (np.abs(actions - expected) / self.half_range.cpu().numpy()).max()

    def forward(self, pictures: Sequence[Tensor], prompt: Tensor, bias: Tensor | None,
                state: Tensor | None, noise: Tensor, schedule: Schedule, steps: int,
                known: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return actions (B, T, A) in physical units, float64."""
        context = self.read(self.see(self.prepare(pictures)), prompt, bias)
        modulations = self.dit.modulations(schedule, state)
        return self.physical(
            self.decide(context, bias, modulations, noise, schedule, steps, known))


def times_of(sampler: Callable[..., Tensor], steps: int) -> list[tuple[float, float]]:
    """Return the (t, h) at which a sampler evaluates the network: it is run on a zero velocity."""
    times = []

    def u(z: Tensor, *, t: Tensor, h: Tensor) -> Tensor:
        times.append((t.item(), h.item()))
        return torch.zeros_like(z)

    sampler(u, torch.zeros(1, 1, 1), steps=steps)
    return times
