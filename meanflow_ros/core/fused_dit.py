"""The action network with all that is constant computed once: what core/runtime.py runs.

FusedDiT gives what ActionDiT gives for one action space; the tests hold it to that. The times of
a sampler are known once its NFE is, so time embeddings are constants, and without proprioception
all AdaLN signals are. Keys and values of all blocks are one product.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanflow_ros.core import kernels, persistent
from meanflow_ros.core.dit import (
    ActionDiT, FlowBlock, SelfAttention, rotary_tables, standardize)
from meanflow_ros.core.fused_encoder import Placement

EPS = 1e-6


def rms_norm(x: Tensor) -> Tensor:
    """Divide each row of x by the root of its mean square."""
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], eps=EPS)
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * (length.square() / x.shape[-1] + EPS).rsqrt()).to(x.dtype)


@dataclass(frozen=True)
class Schedule:
    """The constants of N network evaluations at fixed times.

    signals: (N + 1, K, D), see Modulation; the last are those of steps that are given, at t = 0
    and h = 0. offsets: (N, F), the bias of the decoder's first layer and what h adds to it.
    modulations: as Modulation gives them where no observation changes them, else None.
    """

    signals: Tensor
    offsets: Tensor
    modulations: Tensor | None


class FusedSelfAttention(nn.Module):
    """Causal attention over the chunk; scales of the q/k norms are in the rotary tables.

    rotate(w x) = x * (w cos) + swapped(x) * swapped(w) * (-sin, sin), with swapped halves.
    """

    def __init__(self, source: SelfAttention, horizon: int, place: Placement):
        super().__init__()
        self.heads = source.heads
        self.qkv = place.linear(source.qkv.weight)
        self.proj = place.linear(source.proj.weight)
        scales = torch.stack([place.exact(norm.weight)
                              for norm in (source.q_norm, source.k_norm)])
        cos, sin = rotary_tables(horizon, scales.shape[1], source.theta, scales)
        swapped = scales.unflatten(1, (2, -1)).flip(1).flatten(1)
        cos, sin = torch.cat([cos, cos], 1)[:, None], torch.cat([-sin, sin], 1)[:, None]
        self.register_buffer('straight', place.kept((scales * cos)[:, :, None]))
        self.register_buffer('swapped', place.kept((swapped * sin)[:, :, None]))

    def forward(self, x: Tensor) -> Tensor:                        # (B, T, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))       # (B, T, 3, heads, d)
        qk = rms_norm(qkv[:, :, :2])
        other = qk.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        qk = qk * self.straight + other * self.swapped
        q, k, v = (part.transpose(1, 2) for part in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


class FusedFlowBlock(nn.Module):
    """A block whose modulation comes ready made; the scale of norm2 is in the projection of q."""

    def __init__(self, source: FlowBlock, horizon: int, place: Placement):
        super().__init__()
        cross = source.cross_attn
        self.heads = cross.heads
        self.self_attn = FusedSelfAttention(source.self_attn, horizon, place)
        self.query = place.linear(place.after_norm(source.norm2, cross.q_proj.weight)[0])
        self.cross_proj = place.linear(cross.proj.weight)
        self.gate_and_value = place.linear(torch.cat([source.mlp.fc1.weight,
                                                      source.mlp.fc2.weight]))
        self.mlp_proj = place.linear(source.mlp.proj.weight)
        self.kernels = (place.kernels and horizon <= kernels.MOST_ROWS
                        and kernels.fits(source.self_attn.q_norm.weight.numel()))

    def forward(self, x: Tensor, modulation: Tensor, keys: Tensor, values: Tensor,
                bias: Tensor | None) -> Tensor:                    # (B, T, D), (6, B, T or 1, D)
        if (self.kernels and len(x) == 1 and modulation.shape[2] == 1
                and keys.shape[2] <= kernels.MOST_KEYS):
            return self._by_kernels(x[0], modulation[:, 0, 0], keys[0], values[0], bias)[None]
        shift_a, gain_a, gate_a, shift_m, gain_m, gate_m = modulation.unbind(0)
        x = x + gate_a * self.self_attn(torch.addcmul(shift_a, rms_norm(x), gain_a))
        q = rms_norm(self.query(rms_norm(x)).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        x = x + self.cross_proj(out.transpose(1, 2).flatten(2))
        hidden = self.gate_and_value(torch.addcmul(shift_m, rms_norm(x), gain_m))
        gate, value = hidden.chunk(2, dim=-1)
        return x + gate_m * self.mlp_proj(F.silu(gate) * value)

    def _by_kernels(self, x: Tensor, modulation: Tensor, keys: Tensor, values: Tensor,
                    bias: Tensor | None) -> Tensor:                # (T, D), (6, D)
        shift_a, gain_a, gate_a, shift_m, gain_m, gate_m = modulation
        own, product = self.self_attn, kernels.product
        qkv = product(x, own.qkv.weight, norm=True, shift=shift_a, gain=gain_a)
        attended = kernels.self_attention(qkv, own.straight, own.swapped, own.heads)
        x = product(attended, own.proj.weight, residual=x, gate=gate_a)
        attended = kernels.cross_attention(product(x, self.query.weight, norm=True), keys, values,
                                           bias)
        x = product(attended, self.cross_proj.weight, residual=x)
        hidden = product(x, self.gate_and_value.weight, norm=True, shift=shift_m, gain=gain_m,
                         gated=True)
        return product(hidden, self.mlp_proj.weight, residual=x, gate=gate_m)


class KeysAndValues(nn.Module):
    """Context (B, S, C) -> keys and values of all blocks, each (blocks, B, heads, S, d).

    The keys still need `normalised`, which one kernel for all blocks does itself.

    The context's own norm and projection are in the weight. The scales of the query's norm are
    multiplied on with those of the key's, so that the query needs none.
    """

    def __init__(self, dit: ActionDiT, place: Placement):
        super().__init__()
        blocks = [block.cross_attn for block in dit.blocks]
        self.blocks, self.heads = len(blocks), blocks[0].heads
        before, _ = place.after_norm(dit.context_norm, dit.context_proj.weight)
        self.project = place.linear(torch.cat(
            [place.exact(layer.weight) @ before for block in blocks
             for layer in (block.k_proj, block.v_proj)]))
        self.register_buffer('scale', place.kept(torch.stack(
            [place.exact(block.k_norm.weight) * place.exact(block.q_norm.weight)
             for block in blocks])).view(self.blocks, 1, 1, 1, -1))

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        both = self.project(rms_norm(context)).unflatten(-1, (self.blocks, 2, self.heads, -1))
        keys, values = both.permute(3, 2, 0, 4, 1, 5).unbind(0)
        return keys, values

    def normalised(self, keys: Tensor) -> Tensor:
        """Return the keys as the blocks take them."""
        return rms_norm(keys) * self.scale


class Modulation(nn.Module):
    """Signals -> what modulates all blocks in all network evaluations, at once.

    Signals are (N, B or 1, K, D): K is 2 where h enters from some later block on, so that the
    blocks before it take another signal, else 1. The low-rank layers of all blocks are two
    batched products. A gain is the scale plus one, times the scale of the norm before it: both
    are in the second product's weight and bias.
    """

    def __init__(self, dit: ActionDiT, space: str, place: Placement):
        super().__init__()
        layers = [block.modulation for block in dit.blocks]
        self.mixed = 0 < dit.h_from_block < len(layers)
        kind = [int(self.mixed and i >= dit.h_from_block) for i in range(len(layers))]
        self.register_buffer('kind', torch.tensor(kind, device=place.device))
        one = torch.ones(dit.config.width, device=place.device)
        scales = torch.stack([torch.cat([one, place.exact(block.norm1.weight), one,
                                         one, place.exact(block.norm3.weight), one])
                              for block in dit.blocks])            # (blocks, 6 D)
        gain = torch.cat([0 * one, one, 0 * one] * 2)
        up = torch.stack([place.exact(layer[2].weight) for layer in layers]).transpose(1, 2)
        up_bias = torch.stack([place.exact(layer[2].bias) for layer in layers]) + gain
        self.register_buffer('down', place.kept(
            torch.stack([layer[1].weight for layer in layers]).transpose(1, 2)))
        self.register_buffer('down_bias', place.kept(
            torch.stack([layer[1].bias for layer in layers])[:, None]))
        self.register_buffer('up', place.kept(up * scales[:, None]))
        self.register_buffer('up_bias', place.kept((up_bias * scales)[:, None]))
        self.register_buffer('scales', place.kept(scales[:, None]))
        self.shared = place.linear(dit.adaln[space][1].weight)

    def forward(self, signals: Tensor) -> Tensor:
        """Return (N, blocks, 6, B or 1, 1, D): shift, gain and gate of attention and of MLP."""
        active = F.silu(signals).to(self.down.dtype).flatten(0, 1).transpose(0, 1)
        low = torch.baddbmm(self.down_bias, self._of_blocks(active), self.down)
        full = torch.baddbmm(self.up_bias, low, self.up)           # (blocks, N B, 6 D)
        full = torch.addcmul(full, self._of_blocks(self.shared(active)), self.scales)
        full = full.unflatten(1, signals.shape[:2]).unflatten(-1, (6, -1))
        return full.permute(1, 0, 3, 2, 4)[..., None, :]

    def _of_blocks(self, x: Tensor) -> Tensor:                     # (K, ...) -> (blocks, ...)
        return x[self.kind] if self.mixed else x.expand(len(self.kind), -1, -1)


class FusedDiT(nn.Module):
    """Velocities of one action space, for chunks of a fixed horizon.

    why_apart: why it is never one kernel (core/persistent.py); '' if it can be.
    """

    def __init__(self, dit: ActionDiT, space: str, horizon: int, place: Placement):
        super().__init__()
        self.place, self.action_size = place, dit.config.action_spaces[space]
        self.keys_and_values = KeysAndValues(dit, place)
        self.modulation = Modulation(dit, space, place)
        self.blocks = nn.ModuleList(FusedFlowBlock(b, horizon, place) for b in dit.blocks)
        self.encoder = _frozen_mlp(dit.action_encoders[space], place)
        self.state_encoder = (_frozen_mlp(dit.state_encoders[space], place)
                              if space in dit.state_encoders else None)
        decoder = dit.action_decoders[space]
        width = dit.config.width
        self.decode_in = place.linear(place.after_norm(dit.final_norm,
                                                       decoder.mlp[0].weight[:, :width])[0])
        self.decode_out = nn.Sequential(nn.SiLU(), *_frozen_mlp(decoder.mlp[2:], place))
        self._times = TimeConstants(dit, decoder)
        sizes = persistent.Sizes(
            width=width, hidden=self.blocks[0].mlp_proj.weight.shape[1],
            decoded=len(self.decode_in.weight), heads=dit.config.heads,
            blocks=len(self.blocks), rows=horizon, actions=self.action_size)
        self.why_apart = (persistent.why_not(sizes, place.device) if place.kernels
                          else 'there are no kernels for its blocks')
        self._weights = None
        if not self.why_apart:
            self._weights = persistent.Weights.of(sizes, self.encoder, self.blocks,
                                                  self.decode_in, self.decode_out)

    @torch.no_grad()
    def schedule(self, times: Sequence[tuple[float, float]]) -> Schedule:
        """Return the constants of network evaluations at these (t, h)."""
        place = self.place
        signals, offsets = (place.exact(value) for value in self._times([*times, (0.0, 0.0)]))
        constant = None
        if self.state_encoder is None:
            constant = self.modulation(signals[:, None])
        return Schedule(signals, place.kept(offsets[:-1]), constant)

    def modulations(self, schedule: Schedule, state: Tensor | None) -> Tensor:
        """Return the modulation of all evaluations for normalised states (B, P).

        (N + 1, blocks, 6, B or 1, 1, D); the last is that of steps that are given.
        """
        if schedule.modulations is not None:
            return schedule.modulations
        embedded = standardize(self.state_encoder(state.to(self.place.dtype)).float())
        return self.modulation(schedule.signals[:, None] + embedded[:, None])

    def laid_out(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as `velocity` takes them."""
        if self.in_one_kernel(keys):
            return persistent.laid_out(keys, values, self.keys_and_values.scale)
        return self.keys_and_values.normalised(keys), values

    def velocity(self, z: Tensor, modulation: Tensor, offset: Tensor, keys: Tensor,
                 values: Tensor, bias: Tensor | None,
                 given: tuple[Tensor, Tensor] | None = None) -> Tensor:   # z (B, T, A)
        """Return the velocity (B, T, A) of one evaluation: its modulation and offset.

        given: which steps are (B, T) bool, and their modulation.
        """
        if self.in_one_kernel(keys):
            return persistent.velocity(z, self._weights, modulation, offset, keys, values, bias,
                                       given)
        if given is not None:
            modulation = torch.where(given[0][..., None], given[1], modulation)
        x = self.encoder(z.to(self.place.dtype))                   # (B, T, D)
        for block, of_block, k, v in zip(self.blocks, modulation, keys, values):
            x = block(x, of_block, k, v, bias)
        return self.decode_out(self.decode_in(rms_norm(x)) + offset).to(z.dtype)

    def in_one_kernel(self, keys: Tensor) -> bool:
        """Return whether one kernel does all for these keys (blocks, B, heads, S, d)."""
        return (not self.why_apart and keys.shape[1] == 1 and keys.shape[3] % 32 == 0
                and keys.shape[3] <= self._weights.sizes.most_keys)


class TimeConstants:
    """What t and h come to, computed by copies of the network's embedders where they are."""

    def __init__(self, dit: ActionDiT, decoder: nn.Module):
        self._mixed = dit.h_from_block > 0
        self._t_embedder, self._h_embedder, self._first, self._decoder_embedder = (
            module and copy.deepcopy(module).float() for module in (
                dit.t_embedder, dit.h_embedder if dit.h_from_block < len(dit.blocks) else None,
                decoder.mlp[0], getattr(decoder, 'h_embedder', None)))

    def __call__(self, times: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
        """Return signals (N, K, D) and offsets (N, F) for (t, h), see Schedule."""
        t, h = torch.tensor(times, dtype=torch.float32, device=self._first.weight.device).t()
        signals = [standardize(self._t_embedder(t))]
        if self._h_embedder is not None:
            with_h = signals[0] + standardize(self._h_embedder(h))
            signals = [*signals, with_h] if self._mixed else [with_h]
        offsets = self._first.bias.expand(len(t), -1)
        if self._decoder_embedder is not None:
            embedded = self._decoder_embedder(h)
            offsets = offsets + embedded @ self._first.weight[:, -embedded.shape[1]:].t()
        return torch.stack(signals, dim=1), offsets


def _frozen_mlp(source: nn.Sequential, place: Placement) -> nn.Sequential:
    return nn.Sequential(*(place.linear(layer.weight, layer.bias)
                           if isinstance(layer, nn.Linear) else layer for layer in source))
