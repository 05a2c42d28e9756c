"""From a batch to a loss: everything that needs a gradient, as the one module that is wrapped.

The encoder runs once per observation; its keys and values are held for all draws of noise and for
the derivatives. Forward-mode differentiation happens inside `forward`, so that what wraps this
module (DDP, FSDP) sees every use of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meanflow_ros.core import meanflow
from meanflow_ros.core.dit import Conditioning
from meanflow_ros.core.policy import PolicyConfig, PolicyNetwork
from meanflow_ros.core.times import Times
from meanflow_ros.training.augment import augment
from meanflow_ros.training.config import TrainConfig


def make_loss(config: TrainConfig):
    """Return the function (u, x, e, times, weights) -> scalar that the configuration names."""
    settings = {}
    if config.loss not in ('rf', 'l1'):
        settings = {'eps': config.weight_eps, 'power': config.weight_power}
        for name in ('stop_target', 'stop_weight'):
            if getattr(config, name) is not None:
                settings[name] = getattr(config, name)
    if config.loss in ('dpm', 'central'):
        settings['step'] = config.dpm_h_step if config.loss == 'dpm' else config.central_step
    return partial(meanflow.LOSSES[config.loss], **settings)


class TrainingLoss(nn.Module):
    """The network with its objective. `forward` takes a batch on the device, gives a scalar.

    instructions: those of the data set, in its order.
    """

    def __init__(self, network: PolicyNetwork, config: TrainConfig, policy: PolicyConfig,
                 instructions: Sequence[str]):
        super().__init__()
        self.network = network
        self._loss = make_loss(config)
        self._encoder_reduced = config.precision != 'float32'
        self._dit_reduced = config.precision == 'bfloat16'
        self._encoding = torch.no_grad if config.freeze == 'encoder' else contextlib.nullcontext
        self._repeats_dropout = config.repeats_dropout
        self._guided = (partial(meanflow.guided, scale=config.guidance, mix=config.guidance_mix)
                        if config.guided else None)
        self._dispersive = config.dispersive
        self._features: list[Tensor] | None = None
        if config.dispersive:
            middle = network.dit.blocks[len(network.dit.blocks) // 2 - 1]
            middle.register_forward_hook(self._keep_features)
        if config.activation_checkpointing:
            _recompute_activations(network.encoder)
        # In a tuple, so that a compiled network is not a second set of parameters.
        self._fast = ((torch.compile(network.encoder), torch.compile(network.dit))
                      if config.compile else (network.encoder, network.dit))
        ids, mask = network.encoder.tokenize(
            [policy.prompt.format(instruction=text) for text in instructions])
        size, space = network.dit.action_size, policy.robot.action_space.size
        weights = torch.tensor(config.dimension_weights or [1.0] * space)
        self._buffers_of('prompt', ids=ids, mask=mask)
        self._buffers_of('action', low=policy.action_normalizer.low,
                         high=policy.action_normalizer.high,
                         weights=F.pad(weights, (0, size - space)))
        if policy.state_normalizer:
            self._buffers_of('state', low=policy.state_normalizer.low,
                             high=policy.state_normalizer.high)

    def _buffers_of(self, name: str, **values) -> None:
        for key, value in values.items():
            if value is not None:
                value = value if isinstance(value, Tensor) else torch.tensor(np.array(value))
                value = value.float() if value.is_floating_point() else value
            self.register_buffer(f'{name}_{key}', value, persistent=False)

    def _keep_features(self, module, inputs, output: Tensor) -> None:
        if self._features is not None and output.requires_grad:
            self._features.append(output)

    def _normalized(self, name: str, values: Tensor) -> Tensor:
        low, high = getattr(self, f'{name}_low'), getattr(self, f'{name}_high')
        return (2 * (values - low) / (high - low) - 1).clamp(-1, 1)

    def _precision(self, reduced: bool):
        device = self.action_low.device.type
        if device == 'cpu' or not reduced:
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16, cache_enabled=False)

    def condition(self, batch: dict[str, Tensor]) -> Conditioning:
        """Encode the batch; one sample per observation."""
        pixels = batch['pictures'].movedim(-1, -3).float()         # (B, C, 3, S, S)
        pixels = augment(pixels, shift=batch['shift'], gain=batch['gain'], bias=batch['bias'])
        ids = self.prompt_ids[batch['instruction']]
        mask = None if self.prompt_mask is None else self.prompt_mask[batch['instruction']]
        with self._precision(self._encoder_reduced), self._encoding():
            context, mask = self._fast[0](pixels, ids, mask)
        return self._conditioned_on(context, mask, batch)

    def _conditioned_on(self, context: Tensor, mask: Tensor | None,
                        batch: dict[str, Tensor]) -> Conditioning:
        """Return what the action network holds for an encoded batch."""
        dit = self.network.dit
        if dit.config.null_context:
            context = dit.drop_context(context, batch['dropped'])
        state = self._normalized('state', batch['state']) if hasattr(self, 'state_low') else None
        space = torch.full((len(context),), self.network.space_index, device=context.device)
        with self._precision(self._dit_reduced):
            return dit.condition(context.float(), mask, state, space)

    def velocity(self, conditioning: Conditioning, x: Tensor,
                 given: Tensor | None = None) -> meanflow.Velocity:
        """Return u for these samples: compiled for the whole batch, plain for derivatives.

        given: (N * B, T) bool, the steps of x (N * B, T, A) that are known, None for none. They
        are what the robot was told; what it should have been told is what is learned after them.

        With dropout, the calls that a finite difference compares use the same random numbers, and
        so the same masks; it would otherwise be a difference of masks.
        """
        dit, field = self.network.dit, self._fast[1]
        held = (_HeldRandomness(self.action_low.device) if self._repeats_dropout
                else contextlib.nullcontext())

        def u(z, *, t, h, rows=None):
            with held:
                if rows is None:
                    return field(z, t=t, h=h, conditioning=conditioning, given=given).float()
                return dit(z, t=t, h=h, conditioning=conditioning.select(rows),
                           given=None if given is None else given[rows]).float()
        return u if given is None else meanflow.with_prefix(u, x, given)

    def forward(self, batch: dict[str, Tensor], moving: int) -> Tensor:
        """Return the loss of a batch: what the loader gives, and the tensors of `Draws`.

        moving: how many of its samples have r < t.
        """
        conditioning = self.condition(batch)
        observations, draws = len(batch['state']), len(batch['t']) // len(batch['state'])
        repeat = torch.arange(observations, device=batch['t'].device).repeat(draws)
        if draws > 1:
            conditioning = conditioning.repeat(draws)
        x = self._normalized('action', batch['chunk'])
        unused = self.action_weights.numel() - x.shape[-1]
        x, e = F.pad(x, (0, unused))[repeat], F.pad(batch['e'], (0, unused))
        weights = batch['mask'][repeat, :, None] * self.action_weights     # (N * B, T, A)
        executed, given = x, None
        if 'prefix' in batch:
            given = torch.arange(x.shape[1], device=x.device) < batch['prefix'][:, None]
            weights = weights * ~given[..., None]
            executed = F.pad(self._normalized('action', batch['executed']), (0, unused))[repeat]
        times = Times(t=batch['t'], r=batch['r'], moving=moving)
        guide = {}
        with self._precision(self._dit_reduced):
            u = self.velocity(conditioning, executed, given)
            if self._guided:
                guide['guide'] = self._guide(u, conditioning, batch['dropped'][repeat], executed,
                                             given)
            self._features = [] if self._dispersive else None
            loss = self._loss(u, x, e, times, weights, **guide)
        if self._dispersive:
            features = self._features[0][:observations].flatten(1)
            loss = loss + self._dispersive * meanflow.dispersive_loss(features)
        return loss

    def _guide(self, u: meanflow.Velocity, conditioning: Conditioning, dropped: Tensor, x: Tensor,
               given: Tensor | None):
        dit = self.network.dit
        null = dit.null_context.expand(len(dropped), -1, -1)
        nothing = Conditioning(
            keys_values=[block.cross_attn.keys_and_values(dit.context_proj(dit.context_norm(null)))
                         for block in dit.blocks],
            mask=None, state=conditioning.state, space=conditioning.space)
        return self._guided(u, self.velocity(nothing, x, given), dropped=dropped)


def _recompute_activations(encoder: nn.Module) -> None:
    """Keep only the inputs of the encoder's layers; the backward pass computes the rest again."""
    layers = [*encoder.language_model['encoder'].layers,
              *(block for blocks in encoder.vision_tower.blocks for block in blocks)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


class _HeldRandomness:
    """Runs each of its blocks from the same state of the random number generators."""

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == 'cuda' else None
        self._start = None

    def _state(self):
        return (torch.get_rng_state(),
                torch.cuda.get_rng_state(self._cuda) if self._cuda else None)

    def _restore(self, state) -> None:
        torch.set_rng_state(state[0])
        if self._cuda:
            torch.cuda.set_rng_state(state[1], self._cuda)

    def __enter__(self):
        if self._start is None:
            self._start = self._state()
        else:
            self._restore(self._start)

    def __exit__(self, *_):
        return False
