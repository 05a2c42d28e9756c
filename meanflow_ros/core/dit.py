"""The action network: ActionDiT, a diffusion transformer over the steps of a chunk.

As in FLOWER (Reuss et al. 2025, arXiv 2509.04996): RMSNorm, rotary positions, q/k norm, SwiGLU,
causal self-attention over the chunk, cross-attention to the encoder's context, and AdaLN signals
from the time, shared by all blocks and held per action space. Every action space has its own
encoder, decoder and AdaLN; samples are routed one by one, so a mixed batch equals its parts.

What depends on the observation alone (cross-attention keys and values, proprioception) is
computed once, by `condition`; the sampler then calls the network once per step.

Steps that are given as a clean prefix have a time of their own: theirs is t = 0, h = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H_PLACES = ('none', 'decoder', 'adaln', 'adaln_last_third')
FLOWER_ACTION_SPACES = {'joint_single': 8, 'eef_delta': 7, 'bimanual_nav': 16}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of an ActionDiT.

    action_spaces: name -> number of dimensions. state_sizes: name -> proprioception size of that
    space; a space that is absent uses none. h_in: where h = t - r enters, one of H_PLACES
    ('none' is a rectified-flow network). max_frequency: largest angular frequency of the time
    embedding, rad per unit of t; FLOWER's own is 1000, derivatives want about 10. null_context:
    whether there is a learned context for "no condition", which guidance in training needs.
    """

    width: int
    depth: int
    heads: int
    action_spaces: Mapping[str, int]
    state_sizes: Mapping[str, int]
    h_in: str = 'decoder'
    max_frequency: float = 10.0
    adaln_rank: int = 256
    dropout: float = 0.1
    rope_theta: float = 32.0
    null_context: bool = False

    def __post_init__(self):
        for name in ('depth', 'heads', 'adaln_rank'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}')
        for name in ('max_frequency', 'rope_theta'):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name} must be finite and above 0, got {getattr(self, name)}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout must be in [0, 1), got {self.dropout}')
        if self.width < 1 or self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f'width must be a multiple of 2 * heads, '
                             f'got width {self.width} and heads {self.heads}')
        if self.h_in not in H_PLACES:
            raise ValueError(f'h_in must be one of {H_PLACES}, got {self.h_in!r}')
        if not self.action_spaces or min(self.action_spaces.values()) < 1:
            raise ValueError(f'action_spaces must name at least one space of at least '
                             f'one dimension, got {dict(self.action_spaces)}')
        unknown = set(self.state_sizes) - set(self.action_spaces)
        if unknown:
            raise ValueError(f'state_sizes names unknown action spaces {sorted(unknown)}')


def dit_preset(name: str, action_spaces: Mapping[str, int],
               state_sizes: Mapping[str, int]) -> DiTConfig:
    """Return the sizes of 'large' (as FLOWER) or 'tiny' (for CPUs and tests)."""
    sizes = {'large': {'width': 1024, 'depth': 18, 'heads': 16, 'adaln_rank': 256},
             'tiny': {'width': 192, 'depth': 6, 'heads': 6, 'adaln_rank': 64}}
    if name not in sizes:
        raise ValueError(f'preset must be one of {sorted(sizes)}, got {name!r}')
    return DiTConfig(**sizes[name], action_spaces=dict(action_spaces),
                     state_sizes=dict(state_sizes))


def rotary_tables(length: int, head_width: int, theta: float, like: Tensor) -> tuple:
    """Return cos and sin, each (T, head_width / 2), of rotary positions 0 .. T-1."""
    exponent = torch.arange(0, head_width, 2, device=like.device).float() / head_width
    angles = torch.outer(torch.arange(length, device=like.device).float(), theta ** -exponent)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x (B, heads, T, head_width)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def standardize(x: Tensor) -> Tensor:
    """Give each row of x mean 0 and variance 1, without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class TimeEmbedder(nn.Module):
    """A scalar in [0, 1] -> (B, D): sines and cosines, then an MLP, always in float32."""

    def __init__(self, width: int, max_frequency: float, features: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        half = features // 2
        frequency = max_frequency * torch.exp(-math.log(1e4) * torch.arange(half) / half)
        self.register_buffer('frequency', frequency, persistent=False)

    def forward(self, time: Tensor) -> Tensor:                     # (B,) -> (B, D)
        with torch.autocast(time.device.type, enabled=False):
            angle = time.float()[:, None] * self.frequency.float()
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class SelfAttention(nn.Module):
    """Causal multi-head attention over the chunk, with rotary positions and q/k norm."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.heads, self.theta, self.dropout = config.heads, config.rope_theta, config.dropout
        width, head_width = config.width, config.width // config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(head_width, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:                        # (B, T, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)                      # (B, heads, T, D / heads)
        cos, sin = rotary_tables(q.shape[2], q.shape[3], self.theta, q)
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True,
            dropout_p=self.dropout if self.training else 0.0)
        return self.proj(out.transpose(1, 2).flatten(2))           # (B, T, D)


class CrossAttention(nn.Module):
    """Multi-head attention of the chunk to the context; keys and values come ready made."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        width, head_width = config.width, config.width // config.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(head_width, eps=1e-6)
        self.k_norm = nn.RMSNorm(head_width, eps=1e-6)

    def _split(self, x: Tensor) -> Tensor:                         # (B, S, D) -> (B, heads, S, -)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Project the context (B, S, D), once per observation."""
        return (self.k_norm(self._split(self.k_proj(context))),
                self._split(self.v_proj(context)))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None):
        q = self.q_norm(self._split(self.q_proj(x)))
        k, v = keys_values
        out = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0)
        return self.proj(out.transpose(1, 2).flatten(2))           # (B, T, D)


class SwiGLU(nn.Module):
    """Gated feed-forward layer of about 4 x width (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        hidden = math.ceil(8 * width / 3 / 256) * 256
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(width, hidden, bias=False)
        self.proj = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dropout(F.silu(self.fc1(x)) * self.fc2(x)))


class FlowBlock(nn.Module):
    """Self-attention, cross-attention and MLP, modulated by the time."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.norm3 = nn.RMSNorm(width, eps=1e-6)
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = SwiGLU(width, config.dropout)
        self.residual_dropout = nn.Dropout(config.dropout)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, config.adaln_rank),
                                        nn.Linear(config.adaln_rank, 6 * width))

    def forward(self, x: Tensor, signal: Tensor, shared: Tensor, keys_values, mask,
                given: Tensor | None = None) -> Tensor:
        modulation = self.modulation(signal) + shared              # (B, 1, 6 D)
        if given is not None:                                      # (B, 2, 6 D) -> (B, T, 6 D)
            modulation = torch.where(given[..., None], modulation[:, 1:], modulation[:, :1])
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        attended = self.self_attn(self.norm1(x) * (1 + scale_a) + shift_a)
        x = x + gate_a * self.residual_dropout(attended)
        x = x + self.residual_dropout(self.cross_attn(self.norm2(x), keys_values, mask))
        return x + gate_m * self.mlp(self.norm3(x) * (1 + scale_m) + shift_m)


class MeanFlowDecoder(nn.Module):
    """Features and h -> average velocity: h embedded, concatenated, MLP (integration guide)."""

    def __init__(self, width: int, action_size: int, max_frequency: float):
        super().__init__()
        self.h_embedder = TimeEmbedder(width, max_frequency)
        self.mlp = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width),
            nn.SiLU(), nn.Linear(2 * width, action_size))

    def forward(self, features: Tensor, h: Tensor) -> Tensor:      # (B, T, D), (B,) -> (B, T, A)
        embedded = self.h_embedder(h).to(features.dtype)[:, None].expand_as(features)
        return self.mlp(torch.cat([features, embedded], dim=-1))


class VelocityDecoder(nn.Module):
    """Features -> velocity, blind to h: for rectified flow, or when h enters by the AdaLN."""

    def __init__(self, width: int, action_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width),
            nn.SiLU(), nn.Linear(2 * width, action_size))

    def forward(self, features: Tensor, h: Tensor) -> Tensor:      # (B, T, D), (B,) -> (B, T, A)
        return self.mlp(features)

    @classmethod
    def from_meanflow(cls, decoder: MeanFlowDecoder) -> 'VelocityDecoder':
        """Return the rectified-flow decoder that a MeanFlow decoder is at h = 0."""
        first, last = decoder.mlp[0], decoder.mlp[4]
        width = first.in_features // 2
        result = cls(width, last.out_features).to(first.weight)
        with torch.no_grad():
            at_zero = decoder.h_embedder(torch.zeros(1, device=first.weight.device))[0]
            result.mlp[0].weight.copy_(first.weight[:, :width])
            result.mlp[0].bias.copy_(first.bias + first.weight[:, width:] @ at_zero)
            for index in (2, 4):
                result.mlp[index].load_state_dict(decoder.mlp[index].state_dict())
        return result


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the network holds for a batch of observations while the sampler steps.

    keys_values: per block, (B, heads, S, D / heads) twice. mask: (B, 1, 1, S) bool, True = attend.
    state: (B, D) or None. space: (B,) index of each sample's action space, or None if one only.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor | None
    state: Tensor | None
    space: Tensor | None

    def select(self, index: Tensor | slice) -> 'Conditioning':
        """Return the conditioning of the samples in `index` (N,), which may repeat."""
        return self._each(lambda x: x[index])

    def repeat(self, times: int) -> 'Conditioning':
        """Return the conditioning of the batch `times` over: samples 0 .. B-1, 0 .. B-1 ...

        The gradient of this is a sum; that of `select` has to sort the index.
        """
        return self._each(lambda x: x.repeat(times, *[1] * (x.ndim - 1)))

    def _each(self, change) -> 'Conditioning':
        def changed(x):
            return None if x is None else change(x)
        return Conditioning(keys_values=[(change(k), change(v)) for k, v in self.keys_values],
                            mask=changed(self.mask), state=changed(self.state),
                            space=changed(self.space))


class ActionDiT(nn.Module):
    """(z, t, h, conditioning) -> velocity, (B, T, A) with A the widest action space."""

    def __init__(self, config: DiTConfig, context_width: int):
        super().__init__()
        self.config = config
        width = config.width
        self.spaces = tuple(config.action_spaces)
        self.action_size = max(config.action_spaces.values())
        self.h_from_block = {'adaln': 0, 'adaln_last_third': config.depth - config.depth // 3}.get(
            config.h_in, config.depth)

        self.context_norm = nn.RMSNorm(context_width, eps=1e-6)
        self.context_proj = nn.Linear(context_width, width, bias=False)
        if config.null_context:
            self.null_context = nn.Parameter(torch.randn(1, 1, context_width) * 0.02)
        self.t_embedder = TimeEmbedder(width, config.max_frequency)
        self.h_embedder = (TimeEmbedder(width, config.max_frequency)
                           if config.h_in.startswith('adaln') else None)
        self.blocks = nn.ModuleList(FlowBlock(config) for _ in range(config.depth))
        self.final_norm = nn.RMSNorm(width, eps=1e-6)
        self.action_encoders = nn.ModuleDict()
        self.action_decoders = nn.ModuleDict()
        self.adaln = nn.ModuleDict()
        self.state_encoders = nn.ModuleDict()
        for name, size in config.action_spaces.items():
            self.action_encoders[name] = nn.Sequential(
                nn.Linear(size, width), nn.GELU(), nn.Linear(width, width))
            self.action_decoders[name] = (
                MeanFlowDecoder(width, size, config.max_frequency) if config.h_in == 'decoder'
                else VelocityDecoder(width, size))
            self.adaln[name] = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width, bias=False))
            if config.state_sizes.get(name):
                self.state_encoders[name] = nn.Sequential(
                    nn.Linear(config.state_sizes[name], width), nn.GELU(),
                    nn.Linear(width, width))
        self._initialize()

    def _initialize(self):
        """Start as the identity: zero AdaLN gates (Peebles and Xie 2022, arXiv 2212.09748)."""
        for shared in self.adaln.values():
            nn.init.zeros_(shared[1].weight)
        for block in self.blocks:
            nn.init.zeros_(block.modulation[2].weight)
            nn.init.zeros_(block.modulation[2].bias)
        for decoder in self.action_decoders.values():
            nn.init.zeros_(decoder.mlp[4].weight)
            nn.init.zeros_(decoder.mlp[4].bias)

    def _route(self, space: Tensor | None, modules: nn.ModuleDict, compute, size: int) -> Tensor:
        """Run `compute(name, module)` for each space and take each sample's own result."""
        if space is None:
            name = self.spaces[0]
            return compute(name, modules[name])
        routed = 0
        for index, name in enumerate(self.spaces):
            if name in modules:
                result = compute(name, modules[name])
                result = F.pad(result, (0, size - result.shape[-1]))
                own = (space == index).view(-1, *[1] * (result.ndim - 1))
                routed = routed + torch.where(own, result, 0.0)
        return routed

    def condition(self, context: Tensor, mask: Tensor | None = None, state: Tensor | None = None,
                  space: Tensor | None = None) -> Conditioning:
        """Compute all that depends on the observation alone.

        context: (B, S, C). mask: (B, S) bool, True = a real token. state: (B, P) normalised, P
        the widest proprioception. space: (B,) int64; required with several action spaces.
        """
        if space is None and len(self.spaces) > 1:
            raise ValueError(f'space is required: the network has {len(self.spaces)} '
                             f'action spaces {self.spaces}')
        if len(self.spaces) == 1:
            space = None
        projected = self.context_proj(self.context_norm(context))  # (B, S, D)
        embedded = None
        if self.state_encoders:
            if state is None:
                raise ValueError('state is required: this network uses proprioception')
            embedded = self._route(
                space, self.state_encoders,
                lambda name, encode: encode(state[:, :self.config.state_sizes[name]]),
                self.config.width)
        return Conditioning(
            keys_values=[b.cross_attn.keys_and_values(projected) for b in self.blocks],
            mask=None if mask is None else mask[:, None, None, :], state=embedded, space=space)

    def drop_context(self, context: Tensor, dropped: Tensor) -> Tensor:
        """Return the context (B, S, C), the learned null in the samples `dropped` (B,) bool."""
        return torch.where(dropped.view(-1, 1, 1), self.null_context.to(context.dtype), context)

    def _signals(self, t: Tensor, h: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what tells a block the time, (B, 1, D): without and with h."""
        signal = standardize(self.t_embedder(t))
        if state is not None:
            signal = signal + standardize(state.float())
        with_h = signal
        if self.h_embedder is not None:
            with_h = signal + standardize(self.h_embedder(h))
        return signal[:, None], with_h[:, None]

    def forward(self, z: Tensor, *, t: Tensor, h: Tensor, conditioning: Conditioning,
                given: Tensor | None = None) -> Tensor:
        """Return the velocity (B, T, A) at z (B, T, A), t (B,), h (B,).

        given: (B, T) bool, the steps of z that are clean actions; what is said there means
        nothing.
        """
        space, config = conditioning.space, self.config
        x = self._route(space, self.action_encoders,
                        lambda name, encode: encode(z[..., :config.action_spaces[name]]),
                        config.width)                              # (B, T, D)
        signal, with_h = self._signals(t, h, conditioning.state)
        if given is not None:
            zero = torch.zeros_like(t)
            clean = self._signals(zero, zero, conditioning.state)
            signal, with_h = (torch.cat(pair, 1) for pair in zip((signal, with_h), clean))
        signals = [signal if i < self.h_from_block else with_h for i in range(config.depth)]
        shared = {id(s): self._route(space, self.adaln, lambda _, adaln, s=s: adaln(s),
                                     6 * config.width) for s in signals}
        for block, keys_values, signal in zip(self.blocks, conditioning.keys_values, signals):
            x = block(x, signal, shared[id(signal)], keys_values, conditioning.mask, given)
        x = self.final_norm(x)
        return self._route(space, self.action_decoders, lambda _, decode: decode(x, h),
                           self.action_size).to(z.dtype)
