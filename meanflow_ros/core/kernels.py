"""Triton kernels for what a GPU is given too little of: chunks of few steps, small windows.

A product of 10 rows with a weight takes as long as the weight takes to arrive, and starting a
kernel as long as that: so norms, modulation, gates and residuals are done by the product's own
kernel, and attention is one kernel each. Each function says what it computes in a line of
PyTorch, which core/fused_dit.py and core/fused_encoder.py use where there is no Triton; the
tests hold them to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:   # PyTorch for CPUs comes without
    triton = None

MOST_ROWS = 64         # of a product in `product`; more rows are a matter for cuBLAS
MOST_KEYS = 512        # of `cross_attention` and of a window
MOST_TOKENS = 1024     # of `channel_attention`: one program goes through them all
EPS = 1e-6


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Return '' if the kernels can be expected to run here, or why not."""
    if triton is None:
        return 'Triton is not installed'
    if device.type != 'cuda' or dtype != torch.bfloat16:
        return f'the kernels are for bfloat16 on CUDA, not for {dtype} on {device.type}'
    return ''


def fits(width: int) -> bool:
    """Return whether a head or a group of this width is one that the kernels take."""
    return 16 <= width <= 128 and width & (width - 1) == 0


def _power(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())


if triton is not None:
    @triton.jit
    def _norm(x, size, EPSILON: tl.constexpr):
        return x * tl.rsqrt(tl.sum(x * x, 1) / size + EPSILON)[:, None]

    @triton.jit
    def _product(x, weight, out, shift, gain, residual, gate, rows, columns, depth: tl.constexpr,
                 NORM: tl.constexpr, MODULATE: tl.constexpr, GATED: tl.constexpr,
                 RESIDUAL: tl.constexpr, GATE: tl.constexpr, EPSILON: tl.constexpr,
                 M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        row, k = tl.arange(0, M), tl.arange(0, K)
        if GATED:   # gate and value of a column stand beside each other
            j = tl.arange(0, 2 * N)
            column = tl.program_id(0) * N + j // 2
            line = column + (j % 2) * columns
            total = tl.zeros((M, 2 * N), tl.float32)
        else:
            column = tl.program_id(0) * N + tl.arange(0, N)
            line = column
            total = tl.zeros((M, N), tl.float32)
        kept_column = tl.program_id(0) * N + tl.arange(0, N)
        place = row[:, None] * columns + kept_column[None, :]
        kept = (row[:, None] < rows) & (kept_column[None, :] < columns)
        if GATE:
            factor = tl.load(gate + kept_column, kept_column < columns, 0.0).to(tl.float32)
        if RESIDUAL:
            added = tl.load(residual + place, kept, 0.0).to(tl.float32)
        for start in range(0, depth, K):
            at = start + k
            w = tl.load(weight + line[None, :] * depth + at[:, None],
                        (column[None, :] < columns) & (at[:, None] < depth), 0.0)
            a = tl.load(x + row[:, None] * depth + at[None, :],
                        (row[:, None] < rows) & (at[None, :] < depth), 0.0)
            if NORM:   # then K covers the depth
                wide = _norm(a.to(tl.float32), depth, EPSILON)
                if MODULATE:
                    g = tl.load(gain + at, at < depth, 0.0).to(tl.float32)
                    s = tl.load(shift + at, at < depth, 0.0).to(tl.float32)
                    wide = wide * g[None, :] + s[None, :]
                a = wide.to(x.dtype.element_ty)
            total += tl.dot(a, w)
        if GATED:
            total, value = tl.split(tl.reshape(total, (M, N, 2)))
            total = total * tl.sigmoid(total) * value
        if GATE:
            total = total * factor[None, :]
        if RESIDUAL:
            total += added
        tl.store(out + place, total.to(out.dtype.element_ty), kept)

    @triton.jit
    def _self_attention(qkv, straight, swapped, out, rows, heads, scale, EPSILON: tl.constexpr,
                        M: tl.constexpr, D: tl.constexpr):
        head, row, d = tl.program_id(0), tl.arange(0, M), tl.arange(0, D)
        turned = (d + D // 2) % D
        kept = row[:, None] < rows
        across = heads * D
        at = row[:, None] * 3 * across + head * D
        table = row[:, None] * 2 * D + d[None, :]
        q = _norm(tl.load(qkv + at + d[None, :], kept, 0.0).to(tl.float32), D, EPSILON)
        k = _norm(tl.load(qkv + at + across + d[None, :], kept, 0.0).to(tl.float32), D, EPSILON)
        p = _norm(tl.load(qkv + at + turned[None, :], kept, 0.0).to(tl.float32), D, EPSILON)
        r = _norm(tl.load(qkv + at + across + turned[None, :], kept, 0.0).to(tl.float32), D,
                  EPSILON)
        v = tl.load(qkv + at + 2 * across + d[None, :], kept, 0.0)
        q = (q * tl.load(straight + table, kept, 0.0).to(tl.float32)
             + p * tl.load(swapped + table, kept, 0.0).to(tl.float32))
        k = (k * tl.load(straight + table + D, kept, 0.0).to(tl.float32)
             + r * tl.load(swapped + table + D, kept, 0.0).to(tl.float32))
        scores = tl.dot(q.to(v.dtype), tl.trans(k.to(v.dtype))) * scale
        scores = tl.where((row[None, :] <= row[:, None]) & (row[None, :] < rows), scores, -1e30)
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        result = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, 1)[:, None]
        tl.store(out + row[:, None] * across + head * D + d[None, :],
                 result.to(out.dtype.element_ty), kept)

    @triton.jit
    def _cross_attention(queries, keys, values, bias, out, rows, count, heads, scale, key_head,
                         key_row, value_head, value_row, EPSILON: tl.constexpr,
                         BIAS: tl.constexpr, M: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
        head, row, d, s = tl.program_id(0), tl.arange(0, M), tl.arange(0, D), tl.arange(0, S)
        kept, there = row[:, None] < rows, s[:, None] < count
        place = row[:, None] * heads * D + head * D + d[None, :]
        k = tl.load(keys + head * key_head + s[:, None] * key_row + d[None, :], there, 0.0)
        v = tl.load(values + head * value_head + s[:, None] * value_row + d[None, :], there, 0.0)
        q = _norm(tl.load(queries + place, kept, 0.0).to(tl.float32), D, EPSILON)
        scores = tl.dot(q.to(k.dtype), tl.trans(k)) * scale
        if BIAS:
            scores += tl.load(bias + s, s < count, 0.0).to(tl.float32)[None, :]
        scores = tl.where(s[None, :] < count, scores, -1e30)
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        result = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, 1)[:, None]
        tl.store(out + place, result.to(out.dtype.element_ty), kept)

    @triton.jit
    def _window_attention(qkv, padding, gather, out, tokens, windows, inside, heads, scale,
                          Q: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
        picture, window = tl.program_id(0) // windows, tl.program_id(0) % windows
        head, d, s = tl.program_id(1), tl.arange(0, D), tl.arange(0, S)
        row = tl.program_id(2) * Q + tl.arange(0, Q)
        width = heads * D
        gather += window * inside
        at = tl.load(gather + s, s < inside, tokens)
        asked = tl.load(gather + row, row < inside, tokens)
        column = head * D + d
        real, own = (at < tokens)[:, None], (asked < tokens)[:, None]
        k = tl.load(qkv + (picture * tokens + at[:, None]) * 3 * width + width + column[None, :],
                    real, 0.0)
        v = tl.load(qkv + (picture * tokens + at[:, None]) * 3 * width + 2 * width
                    + column[None, :], real, 0.0)
        q = tl.load(qkv + (picture * tokens + asked[:, None]) * 3 * width + column[None, :],
                    own, 0.0)
        k = tl.where(real, k, tl.load(padding + width + column)[None, :])
        v = tl.where(real, v, tl.load(padding + 2 * width + column)[None, :])
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(s[None, :] < inside, scores, -1e30)
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        result = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, 1)[:, None]
        tl.store(out + (picture * tokens + asked[:, None]) * width + column[None, :],
                 result.to(out.dtype.element_ty), own)

    @triton.jit
    def _channel_attention(qkv, out, tokens: tl.constexpr, groups, scale, T: tl.constexpr,
                           D: tl.constexpr):
        picture, group = tl.program_id(0) // groups, tl.program_id(0) % groups
        width, d, t = groups * D, tl.arange(0, D), tl.arange(0, T)
        qkv += picture * tokens * 3 * width + group * D
        out += picture * tokens * width + group * D
        scores = tl.zeros((D, D), tl.float32)
        for start in range(0, tokens, T):
            at = start + t
            here = (at < tokens)[:, None]
            q = tl.load(qkv + at[:, None] * 3 * width + d[None, :], here, 0.0)
            k = tl.load(qkv + at[:, None] * 3 * width + width + d[None, :], here, 0.0)
            scores += tl.dot(tl.trans(q), k)
        scores = scores * scale
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        turned = tl.trans(weights.to(qkv.dtype.element_ty))
        for start in range(0, tokens, T):
            at = start + t
            here = (at < tokens)[:, None]
            v = tl.load(qkv + at[:, None] * 3 * width + 2 * width + d[None, :], here, 0.0)
            tl.store(out + at[:, None] * width + d[None, :],
                     tl.dot(v, turned).to(out.dtype.element_ty), here)


def product(x: Tensor, weight: Tensor, *, norm: bool = False, shift: Tensor | None = None,
            gain: Tensor | None = None, gated: bool = False, residual: Tensor | None = None,
            gate: Tensor | None = None) -> Tensor:
    """Return residual + gate * (p(x) @ weight.T) for few rows x (M, K) and weight (N, K).

    p: nothing, or with `norm` the RMS norm of each row and then * gain + shift, both (K,).
    gated: weight is (2 N, K), and silu(p @ weight[:N].T) * (p @ weight[N:].T) takes the product's
    place. All are contiguous.
    """
    (rows, depth), columns = x.shape, weight.shape[0] // (2 if gated else 1)
    out = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    width = 16 if gated else 8 if columns <= 1024 else 32   # so that every multiprocessor has some
    # A norm needs the whole row at once; else blocks are on their way while others are used.
    block = _power(depth) if norm else min(512 if depth > 1024 else 256, _power(depth))
    _product[(triton.cdiv(columns, width),)](
        x, weight, out, shift if shift is not None else x, gain if gain is not None else x,
        residual if residual is not None else x, gate if gate is not None else x, rows, columns,
        depth, NORM=norm, MODULATE=gain is not None, GATED=gated, RESIDUAL=residual is not None,
        GATE=gate is not None, EPSILON=EPS, M=_power(rows), N=width, K=block,
        num_warps=8 if block >= 1024 else 4, num_stages=1 if block >= depth else 4)
    return out


def self_attention(qkv: Tensor, straight: Tensor, swapped: Tensor, heads: int) -> Tensor:
    """Return causal attention (T, D) of qkv (T, 3 D), as FusedSelfAttention between its layers.

    straight, swapped: (T, 2, 1, D / heads), contiguous.
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3 // heads
    out = torch.empty(rows, heads * width, device=qkv.device, dtype=qkv.dtype)
    _self_attention[(heads,)](qkv, straight, swapped, out, rows, heads, width ** -0.5,
                              EPSILON=EPS, M=_power(rows), D=width, num_warps=4)
    return out


def cross_attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Return attention (T, D) of the RMS-normalised heads of queries (T, D).

    keys, values: (heads, S, D / heads), the last dimension contiguous. bias: S numbers, added.
    """
    heads, count, width = keys.shape
    out = torch.empty_like(queries)
    _cross_attention[(heads,)](
        queries, keys, values, bias if bias is not None else queries, out, len(queries), count,
        heads, width ** -0.5, keys.stride(0), keys.stride(1), values.stride(0),
        values.stride(1), EPSILON=EPS, BIAS=bias is not None, M=_power(len(queries)),
        S=_power(count), D=width, num_warps=4)
    return out


@torch.library.custom_op('meanflow_ros::window_attention', mutates_args=())
def window_attention(qkv: Tensor, padding: Tensor, gather: Tensor, heads: int,
                     inside: int) -> Tensor:
    """Return attention (N, T, C) inside windows of `inside` places, from qkv (N, T, 3 C).

    gather: (windows * inside,) which token stands at each place; T where none does, and then
    keys and values are those of `padding` (1, 1, 3 C). C / heads is a power of two.
    """
    pictures, tokens, channels = qkv.shape
    out = torch.empty(pictures, tokens, channels // 3, device=qkv.device, dtype=qkv.dtype)
    windows, width = len(gather) // inside, channels // 3 // heads
    block = min(64, _power(inside))
    _window_attention[(pictures * windows, heads, triton.cdiv(inside, block))](
        qkv, padding, gather, out, tokens, windows, inside, heads, width ** -0.5,
        Q=block, S=_power(inside), D=width, num_warps=4)
    return out


@torch.library.custom_op('meanflow_ros::linear_gelu', mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x @ weight.T + bias) as one product; on CUDA it is GELU's tanh form.

    They differ by less than 5e-4. A compiler would take the two apart.
    """
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(
        0, x.shape[:-1])


@torch.library.custom_op('meanflow_ros::channel_attention', mutates_args=())
def channel_attention(qkv: Tensor, groups: int) -> Tensor:
    """Return attention (N, T, C) among the channels of each group, from qkv (N, T, 3 C).

    scores = q.T @ k / sqrt(T) over the tokens, of which each program goes through all. C / groups
    is a power of two.
    """
    pictures, tokens, channels = qkv.shape
    out = torch.empty(pictures, tokens, channels // 3, device=qkv.device, dtype=qkv.dtype)
    _channel_attention[(pictures * groups,)](
        qkv, out, tokens, groups, tokens ** -0.5, T=min(128, _power(tokens)),
        D=channels // 3 // groups, num_warps=4)
    return out


def _like_values(qkv: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@window_attention.register_fake
def _(qkv, padding, gather, heads, inside):
    return _like_values(qkv)


@linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@channel_attention.register_fake
def _(qkv, groups):
    return _like_values(qkv)
