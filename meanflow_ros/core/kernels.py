"""Triton kernels for the action network, which is given chunks of few steps: too little for a GPU.

A product of 10 rows with a weight takes as long as the weight takes to arrive, and starting a
kernel as long as that: so norms, modulation, gates and residuals are done by the product's own
kernel, and attention is one kernel each. Each function says what it computes in a line of
PyTorch, which core/fused_dit.py uses where there is no Triton; the tests hold them to it. Those
of the encoder are in core/encoder_kernels.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:   # PyTorch for CPUs comes without
    triton = tl = None

MOST_ROWS = 64         # of a product in `product`; more rows are a matter for cuBLAS
MOST_KEYS = 512        # of attention in one program
EPS = 1e-6
# Whether a kernel of the DiT may start, and fetch its weights, while the one before it runs
# (programmatic dependent launch).
START_EARLY = True


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


def power_of_two(size: int, least: int = 16) -> int:
    """Return the least power of two that is not below size, nor below `least`."""
    return max(least, 1 << (size - 1).bit_length())


if triton is not None:
    @triton.jit
    def _wait(EARLY: tl.constexpr):
        if EARLY:   # up to here nothing was read that the kernels before this one write
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def _norm(x, size, EPSILON: tl.constexpr):
        return x * tl.rsqrt(tl.sum(x * x, 1) / size + EPSILON)[:, None]

    @triton.jit
    def _weights(weight, line, column, columns, at, depth):
        return tl.load(weight + line[None, :] * depth + at[:, None],
                       (column[None, :] < columns) & (at[:, None] < depth), 0.0)

    @triton.jit
    def _inputs(x, row, rows, at, depth):
        return tl.load(x + row[:, None] * depth + at[None, :],
                       (row[:, None] < rows) & (at[None, :] < depth), 0.0)

    @triton.jit
    def _product(x, weight, out, shift, gain, residual, gate, rows, columns, depth: tl.constexpr,
                 NORM: tl.constexpr, MODULATE: tl.constexpr, GATED: tl.constexpr,
                 RESIDUAL: tl.constexpr, GATE: tl.constexpr, EPSILON: tl.constexpr,
                 M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr,
                 EARLY: tl.constexpr):
        row, k, kept_column = tl.arange(0, M), tl.arange(0, K), tl.program_id(0) * N + tl.arange(
            0, N)
        if GATED:   # gate and value of a column stand beside each other
            j = tl.arange(0, 2 * N)
            column = tl.program_id(0) * N + j // 2
            line = column + (j % 2) * columns
        else:
            column = kept_column
            line = column
        w = _weights(weight, line, column, columns, k, depth)
        if CHUNKS > 1:
            w1 = _weights(weight, line, column, columns, k + K, depth)
        if CHUNKS > 2:
            w2 = _weights(weight, line, column, columns, k + 2 * K, depth)
        if MODULATE:
            g = tl.load(gain + k, k < depth, 0.0).to(tl.float32)
            s = tl.load(shift + k, k < depth, 0.0).to(tl.float32)
        if GATE:
            factor = tl.load(gate + kept_column, kept_column < columns, 0.0).to(tl.float32)
        _wait(EARLY)
        place = row[:, None] * columns + kept_column[None, :]
        kept = (row[:, None] < rows) & (kept_column[None, :] < columns)
        if RESIDUAL:
            added = tl.load(residual + place, kept, 0.0).to(tl.float32)
        a = _inputs(x, row, rows, k, depth)
        if NORM:   # then K covers the depth
            wide = _norm(a.to(tl.float32), depth, EPSILON)
            if MODULATE:
                wide = wide * g[None, :] + s[None, :]
            a = wide.to(x.dtype.element_ty)
        total = tl.dot(a, w)
        if CHUNKS > 1:
            total += tl.dot(_inputs(x, row, rows, k + K, depth), w1)
        if CHUNKS > 2:
            total += tl.dot(_inputs(x, row, rows, k + 2 * K, depth), w2)
        for start in range(CHUNKS * K, depth, K):
            w = _weights(weight, line, column, columns, k + start, depth)
            total += tl.dot(_inputs(x, row, rows, k + start, depth), w)
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
                        M: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr):
        head = tl.program_id(0)
        row, d = tl.arange(0, M), tl.arange(0, D)
        turned = (d + D // 2) % D
        kept = row[:, None] < rows
        across = heads * D
        qkv += row[:, None] * 3 * across + head * D
        table = row[:, None] * 2 * D + d[None, :]
        q_straight = tl.load(straight + table, kept, 0.0).to(tl.float32)
        q_swapped = tl.load(swapped + table, kept, 0.0).to(tl.float32)
        k_straight = tl.load(straight + table + D, kept, 0.0).to(tl.float32)
        k_swapped = tl.load(swapped + table + D, kept, 0.0).to(tl.float32)
        _wait(EARLY)
        q = tl.load(qkv + d[None, :], kept, 0.0)
        p = tl.load(qkv + turned[None, :], kept, 0.0)
        k = tl.load(qkv + across + d[None, :], kept, 0.0)
        r = tl.load(qkv + across + turned[None, :], kept, 0.0)
        v = tl.load(qkv + 2 * across + d[None, :], kept, 0.0)
        q = (_norm(q.to(tl.float32), D, EPSILON) * q_straight
             + _norm(p.to(tl.float32), D, EPSILON) * q_swapped)
        k = (_norm(k.to(tl.float32), D, EPSILON) * k_straight
             + _norm(r.to(tl.float32), D, EPSILON) * k_swapped)
        scores = tl.dot(q.to(v.dtype), tl.trans(k.to(v.dtype))) * scale
        scores = tl.where((row[None, :] <= row[:, None]) & (row[None, :] < rows), scores, -1e30)
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        result = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, 1)[:, None]
        tl.store(out + row[:, None] * across + head * D + d[None, :],
                 result.to(out.dtype.element_ty), kept)

    @triton.jit
    def _cross_attention(queries, keys, values, bias, out, rows, count, heads, scale, key_head,
                         key_row, value_head, value_row, EPSILON: tl.constexpr,
                         BIAS: tl.constexpr, M: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
                         EARLY: tl.constexpr):
        head = tl.program_id(0)
        row, d, s = tl.arange(0, M), tl.arange(0, D), tl.arange(0, S)
        there = s < count
        k = tl.load(keys + head * key_head + s[:, None] * key_row + d[None, :], there[:, None],
                    0.0)
        v = tl.load(values + head * value_head + s[:, None] * value_row + d[None, :],
                    there[:, None], 0.0)
        added = tl.zeros((S,), tl.float32)
        if BIAS:
            added = tl.load(bias + s, there, 0.0).to(tl.float32)
        _wait(EARLY)   # keys, values and bias are older than the kernels that start early
        kept = row[:, None] < rows
        place = row[:, None] * heads * D + head * D + d[None, :]
        q = _norm(tl.load(queries + place, kept, 0.0).to(tl.float32), D, EPSILON)
        scores = tl.dot(q.to(k.dtype), tl.trans(k)) * scale + added[None, :]
        scores = tl.where(there[None, :], scores, -1e30)
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        result = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, 1)[:, None]
        tl.store(out + place, result.to(out.dtype.element_ty), kept)

    @triton.jit
    def _context(keys, values, scale, laid_keys, laid_values, count, heads, key_block, key_head,
                 key_row, value_block, value_head, value_row, EPSILON: tl.constexpr,
                 D: tl.constexpr, KEY_GAP: tl.constexpr, VALUE_GAP: tl.constexpr,
                 S: tl.constexpr):
        block, head, d = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.arange(0, D)
        s = tl.program_id(1) * S + tl.arange(0, S)
        there = (s < count)[:, None]
        factor = tl.load(scale + block * D + d).to(tl.float32)[None, :]
        k = tl.load(keys + block * key_block + head * key_head + s[:, None] * key_row + d[None, :],
                    there, 0.0)
        v = tl.load(values + block * value_block + head * value_head + s[:, None] * value_row
                    + d[None, :], there, 0.0)
        k = _norm(k.to(tl.float32), D, EPSILON) * factor
        first = tl.program_id(0) * count
        tl.store(laid_keys + (first + s[:, None]) * (D + KEY_GAP) + d[None, :],
                 k.to(laid_keys.dtype.element_ty), there)
        tl.store(laid_values + (tl.program_id(0) * D + d[:, None]) * (count + VALUE_GAP)
                 + s[None, :], tl.trans(v), (s < count)[None, :])


@functools.lru_cache
def _early(device: torch.device) -> dict[str, bool]:
    """Return how a kernel may start while the one before it runs: on Hopper, and later."""
    early = (START_EARLY and device.type == 'cuda' and hasattr(tl.extra.cuda, 'gdc_wait')
             and torch.cuda.get_device_capability(device) >= (9, 0))
    return {'EARLY': True, 'launch_pdl': True} if early else {'EARLY': False}


def product(x: Tensor, weight: Tensor, *, norm: bool = False, shift: Tensor | None = None,
            gain: Tensor | None = None, gated: bool = False, residual: Tensor | None = None,
            gate: Tensor | None = None) -> Tensor:
    """Return residual + gate * (p(x) @ weight.T) for few rows x (M, K) and weight (N, K).

    p: nothing, or with `norm` the RMS norm of each row and then * gain + shift, both (K,).
    gated: weight is (2 N, K), and silu(p @ weight[:N].T) * (p @ weight[N:].T) takes the product's
    place. All are contiguous. The weight, gain, shift and gate must not be written by a kernel of
    this module: they are read before the kernels that run are over.
    """
    (rows, depth), columns = x.shape, weight.shape[0] // (2 if gated else 1)
    out = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    early = _early(x.device)
    width = 16 if gated else 8 if columns <= 1024 else 32   # so that every multiprocessor has some
    if norm:   # takes the whole row at once
        block, stages = power_of_two(depth), 1
    elif early['EARLY']:
        block, stages = min(1024, power_of_two(depth)), 1
    else:      # blocks are on their way while others are used
        block, stages = min(512 if depth > 1024 else 256, power_of_two(depth)), 4
    _product[(triton.cdiv(columns, width),)](
        x, weight, out, shift if shift is not None else x, gain if gain is not None else x,
        residual if residual is not None else x, gate if gate is not None else x, rows, columns,
        depth, NORM=norm, MODULATE=gain is not None, GATED=gated, RESIDUAL=residual is not None,
        GATE=gate is not None, EPSILON=EPS, M=power_of_two(rows), N=width, K=block,
        CHUNKS=min(3, triton.cdiv(depth, block)) if early['EARLY'] else 1, num_stages=stages,
        num_warps=8 if norm and block >= 1024 and width > 8 else 4, **early)
    return out


def self_attention(qkv: Tensor, straight: Tensor, swapped: Tensor, heads: int) -> Tensor:
    """Return causal attention (T, D) of qkv (T, 3 D), as FusedSelfAttention between its layers.

    straight, swapped: (T, 2, 1, D / heads), contiguous.
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3 // heads
    out = torch.empty(rows, heads * width, device=qkv.device, dtype=qkv.dtype)
    _self_attention[(heads,)](qkv, straight, swapped, out, rows, heads, width ** -0.5,
                              EPSILON=EPS, M=power_of_two(rows), D=width, num_warps=4,
                              **_early(qkv.device))
    return out


def cross_attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Return attention (T, D) of the RMS-normalised heads of queries (T, D).

    keys, values: (heads, S, D / heads), the last dimension contiguous. bias: S numbers, added.
    They must not be written by a kernel of this module, see `product`.
    """
    heads, count, width = keys.shape
    out = torch.empty_like(queries)
    _cross_attention[(heads,)](
        queries, keys, values, bias if bias is not None else queries, out, len(queries), count,
        heads, width ** -0.5, keys.stride(0), keys.stride(1), values.stride(0),
        values.stride(1), EPSILON=EPS, BIAS=bias is not None, M=power_of_two(len(queries)),
        S=power_of_two(count), D=width, num_warps=4, **_early(queries.device))
    return out


def context(keys: Tensor, values: Tensor, scale: Tensor, key_gap: int,
            value_gap: int) -> tuple[Tensor, Tensor]:
    """Return RMS-normalised keys times scale, and values transposed, each row with a gap after it.

    keys, values: (blocks, 1, heads, S, d), the last dimension contiguous. scale: (blocks, .., d).
    Returns (blocks, 1, heads, S, d + key_gap) and (blocks, 1, heads, d, S + value_gap); what is
    in the gaps is undefined.
    """
    blocks, _, heads, count, width = keys.shape
    laid_keys = torch.empty(blocks, 1, heads, count, width + key_gap, device=keys.device,
                            dtype=keys.dtype)
    laid_values = torch.empty(blocks, 1, heads, width, count + value_gap, device=keys.device,
                              dtype=keys.dtype)
    _context[(blocks * heads, triton.cdiv(count, 64))](
        keys, values, scale, laid_keys, laid_values, count, heads, keys.stride(0), keys.stride(2),
        keys.stride(3), values.stride(0), values.stride(2), values.stride(3), EPSILON=EPS,
        D=width, KEY_GAP=key_gap, VALUE_GAP=value_gap, S=64, num_warps=4)
    return laid_keys, laid_values
