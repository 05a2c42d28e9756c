"""Triton kernels for the encoder: windows of 12x12 tokens, groups of 32 channels, rows of norms.

They are small or awkward for the kernels that come with PyTorch. Each function says what it
computes in a line of PyTorch, which core/fused_encoder.py, core/fused.py and core/fp8.py use where
there is no Triton; the tests hold them to it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanflow_ros.core.kernels import power_of_two, tl, triton

ALL_TOKENS = 400       # of `channel_attention`: one program goes through so many
PART = 256             # of them, where there are more
MOST_TOKENS = 16 * PART
FP8_LARGEST = 448.0    # of float8_e4m3fn
FP8_LEAST = 1e-30      # of a row's largest number, for its scale

if triton is not None:
    @triton.jit
    def _resize(pictures, out, rows, row_weights, columns, column_weights, mean, height, width,
                size, TALL: tl.constexpr, WIDE: tl.constexpr, X: tl.constexpr):
        picture, y = tl.program_id(0) // size, tl.program_id(0) % size
        x, colour = tl.program_id(1) * X + tl.arange(0, X), tl.arange(0, 4)
        kept, real = x < size, colour[None, :] < 3
        first = tl.load(columns + x, kept, 0)
        base = (picture * height + tl.load(rows + y)) * width
        total = tl.zeros((X, 4), tl.float32)
        for i in range(TALL):
            line = tl.zeros((X, 4), tl.float32)
            for j in tl.static_range(WIDE):
                at = (base + i * width + first + j)[:, None] * 3 + colour[None, :]
                inside = (kept & (first + j < width))[:, None] & real
                line += (tl.load(pictures + at, inside, 0).to(tl.float32)
                         * tl.load(column_weights + x * WIDE + j, kept, 0.0)[:, None])
            total += line * tl.load(row_weights + y * TALL + i)
        total -= tl.load(mean + colour, colour < 3, 0.0)[None, :]
        place = (tl.program_id(0) * size + x)[:, None] * 3 + colour[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), kept[:, None] & real)

    @triton.jit
    def _patches(x, out, tokens, height, width, channels, out_height, out_width, side, stride,
                 padding, depth, T: tl.constexpr, E: tl.constexpr):
        token, line, e = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1), tl.arange(0, E)
        kept, run = token < tokens, side * channels
        row = token // out_width % out_height * stride + line - padding
        first = token % out_width * stride - padding
        column = first[:, None] + e[None, :] // channels
        inside = ((kept & (row >= 0) & (row < height))[:, None] & (column >= 0)
                  & (column < width) & (e[None, :] < run))
        source = (token // (out_width * out_height) * height + row) * width + first
        value = tl.load(x + source[:, None] * channels + e[None, :], inside, 0.0)
        length = tl.where(line == side - 1, depth - line * run, run)   # zeros after the last
        tl.store(out + token[:, None] * depth + line * run + e[None, :], value,
                 kept[:, None] & (e[None, :] < length))

    @triton.jit
    def _places(gather, s, inside, tokens, GATHER: tl.constexpr):
        if GATHER:
            places = tl.load(gather + s, s < inside, tokens).to(tl.int32)
        else:
            places = tl.where(s < inside, s, tokens)
        return places

    @triton.jit
    def _kept_or_padding(rows, at, tokens, base, padding, column, width, GATHER: tl.constexpr):
        real = (at < tokens)[:, None]
        values = tl.load(rows + (base + at[:, None]) * 3 * width + column[None, :], real, 0.0)
        if GATHER:
            values = tl.where(real, values, tl.load(padding + column)[None, :])
        return values

    @triton.jit
    def _attention(qkv, padding, gather, bias, out, tokens, windows, inside, heads, scale,
                   GATHER: tl.constexpr, BIAS: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
                   REST: tl.constexpr, D: tl.constexpr):
        picture, window = tl.program_id(0) // windows, tl.program_id(0) % windows
        head, s = tl.program_id(1), tl.arange(0, S)
        width, base = heads * D, picture * tokens
        column = head * D + tl.arange(0, D)
        gather += window * inside
        asked = _places(gather, tl.program_id(2) * Q + tl.arange(0, Q), inside, tokens, GATHER)
        own = (asked < tokens)[:, None]
        at = _places(gather, s, inside, tokens, GATHER)
        if GATHER:
            if tl.min(asked, 0) >= tokens:   # nobody asks
                return
        q = tl.load(qkv + (base + asked[:, None]) * 3 * width + column[None, :], own, 0.0)
        k = _kept_or_padding(qkv, at, tokens, base, padding, column + width, width, GATHER)
        v = _kept_or_padding(qkv, at, tokens, base, padding, column + 2 * width, width, GATHER)
        scores = tl.dot(q, tl.trans(k)) * scale
        if BIAS:
            scores += tl.load(bias + base + s, s < inside, 0.0).to(tl.float32)[None, :]
        scores = tl.where(s[None, :] < inside, scores, -1e30)
        most = tl.max(scores, 1)
        if REST:   # keys beyond the first power of two
            t = S + tl.arange(0, REST)
            at = _places(gather, t, inside, tokens, GATHER)
            k = _kept_or_padding(qkv, at, tokens, base, padding, column + width, width, GATHER)
            v1 = _kept_or_padding(qkv, at, tokens, base, padding, column + 2 * width, width,
                                  GATHER)
            scores1 = tl.dot(q, tl.trans(k)) * scale
            if BIAS:
                scores1 += tl.load(bias + base + t, t < inside, 0.0).to(tl.float32)[None, :]
            scores1 = tl.where(t[None, :] < inside, scores1, -1e30)
            most = tl.maximum(most, tl.max(scores1, 1))
        weights = tl.exp(scores - most[:, None])
        total, result = tl.sum(weights, 1), tl.dot(weights.to(v.dtype), v)
        if REST:
            weights1 = tl.exp(scores1 - most[:, None])
            total += tl.sum(weights1, 1)
            result += tl.dot(weights1.to(v.dtype), v1)
        tl.store(out + (base + asked[:, None]) * width + column[None, :],
                 (result / total[:, None]).to(out.dtype.element_ty), own)

    @triton.jit
    def _channel_scores(qkv, first, tokens, width, STEPS: tl.constexpr, T: tl.constexpr,
                        D: tl.constexpr):
        d, scores = tl.arange(0, D), tl.zeros((D, D), tl.float32)
        for i in range(STEPS):
            at = first + i * T + tl.arange(0, T)
            here = (at < tokens)[:, None]
            q = tl.load(qkv + at[:, None] * 3 * width + d[None, :], here, 0.0)
            k = tl.load(qkv + at[:, None] * 3 * width + width + d[None, :], here, 0.0)
            scores += tl.dot(tl.trans(q), k)
        return scores

    @triton.jit
    def _channel_mix(qkv, out, scores, first, tokens, width, scale, STEPS: tl.constexpr,
                     T: tl.constexpr, D: tl.constexpr):
        d, scores = tl.arange(0, D), scores * scale
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        turned = tl.trans(weights.to(qkv.dtype.element_ty))
        for i in range(STEPS):
            at = first + i * T + tl.arange(0, T)
            here = (at < tokens)[:, None]
            v = tl.load(qkv + at[:, None] * 3 * width + 2 * width + d[None, :], here, 0.0)
            tl.store(out + at[:, None] * width + d[None, :],
                     tl.dot(v, turned).to(out.dtype.element_ty), here)

    @triton.jit
    def _channel_attention(qkv, out, tokens, groups, scale, STEPS: tl.constexpr,
                           T: tl.constexpr, D: tl.constexpr):
        picture, group = tl.program_id(0) // groups, tl.program_id(0) % groups
        width = groups * D
        qkv += picture * tokens * 3 * width + group * D
        out += picture * tokens * width + group * D
        scores = _channel_scores(qkv, 0, tokens, width, STEPS, T, D)
        _channel_mix(qkv, out, scores, 0, tokens, width, scale, STEPS, T, D)

    @triton.jit
    def _channel_parts(qkv, parts, tokens, groups, T: tl.constexpr, D: tl.constexpr):
        picture, group = tl.program_id(0) // groups, tl.program_id(0) % groups
        width, part, d = groups * D, tl.program_id(1), tl.arange(0, D)
        qkv += picture * tokens * 3 * width + group * D
        parts += (tl.program_id(0) * tl.num_programs(1) + part) * D * D
        scores = _channel_scores(qkv, part * T, tokens, width, 1, T, D)
        tl.store(parts + d[:, None] * D + d[None, :], scores)

    @triton.jit
    def _channel_whole(qkv, parts, out, tokens, groups, scale, PARTS: tl.constexpr,
                       T: tl.constexpr, D: tl.constexpr):
        picture, group = tl.program_id(0) // groups, tl.program_id(0) % groups
        width, part, d = groups * D, tl.program_id(1), tl.arange(0, D)
        qkv += picture * tokens * 3 * width + group * D
        out += picture * tokens * width + group * D
        parts += tl.program_id(0) * PARTS * D * D + d[:, None] * D + d[None, :]
        scores = tl.zeros((D, D), tl.float32)
        for i in tl.static_range(PARTS):
            scores += tl.load(parts + i * D * D)
        _channel_mix(qkv, out, scores, part * T, tokens, width, scale, 1, T, D)

    @triton.jit
    def _standardise(x, there, size, EPSILON: tl.constexpr):
        centred = tl.where(there, x - (tl.sum(x, 1) / size)[:, None], 0.0)
        return centred * tl.rsqrt(tl.sum(centred * centred, 1) / size + EPSILON)[:, None]

    @triton.jit
    def _depthwise_norm(x, taps, bias, after, out, normed, count, height, width, channels,
                        EPSILON: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
        token, c = tl.program_id(0) * W + tl.arange(0, W), tl.arange(0, C)
        row, column = token // width % height, token % width
        there, real = c[None, :] < channels, token < count
        place = token[:, None] * channels + c[None, :]
        inside = real[:, None] & there
        constant = tl.load(bias + c, c < channels, 0.0).to(tl.float32)[None, :]
        added = tl.load(after + c, c < channels, 0.0).to(tl.float32)[None, :]
        total = tl.load(x + place, inside, 0.0).to(tl.float32) + constant
        for tap in tl.static_range(9):
            down, right = tap // 3 - 1, tap % 3 - 1
            near = (real & (row + down >= 0) & (row + down < height) & (column + right >= 0)
                    & (column + right < width))
            value = tl.load(x + place + (down * width + right) * channels, near[:, None] & there,
                            0.0)
            total += value.to(tl.float32) * tl.load(taps + tap * channels + c, c < channels,
                                                    0.0).to(tl.float32)[None, :]
        tl.store(out + place, (total + added).to(out.dtype.element_ty), inside)
        result = _standardise(total, there, channels, EPSILON)
        tl.store(normed + place, result.to(out.dtype.element_ty), inside)

    @triton.jit
    def _add_norm(a, b, scale, shift, out, rows, channels, EPSILON: tl.constexpr,
                  ADD: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        row, c = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, C)
        there = c[None, :] < channels
        place, kept = row[:, None] * channels + c[None, :], (row < rows)[:, None] & there
        total = tl.load(a + place, kept, 0.0).to(tl.float32)
        if ADD:
            total += tl.load(b + place, kept, 0.0).to(tl.float32)
        result = _standardise(total, there, channels, EPSILON)
        result = (result * tl.load(scale + c, c < channels, 0.0).to(tl.float32)[None, :]
                  + tl.load(shift + c, c < channels, 0.0).to(tl.float32)[None, :])
        tl.store(out + place, result.to(out.dtype.element_ty), kept)

    @triton.jit
    def _tokens(x, positions, scale, shift, text_positions, text_scale, text_shift, out,
                cameras, channels, EPSILON: tl.constexpr, TEXT_EPSILON: tl.constexpr,
                count: tl.constexpr, T: tl.constexpr, C: tl.constexpr):
        picture, token = tl.program_id(0) // (count + 1), tl.program_id(0) % (count + 1)
        c, t = tl.arange(0, C)[None, :], tl.arange(0, T)[:, None]
        there = c < channels
        first = tl.where(token == 0, 0, token - 1)      # the first token is the mean of all
        last = tl.where(token == 0, count, token)
        place = (picture % cameras * (count + 1) + token) * channels + c
        at = tl.load(positions + token * channels + c, there, 0.0).to(tl.float32)
        text_at = tl.load(text_positions + place, there, 0.0).to(tl.float32)
        total = tl.zeros((1, C), tl.float32)
        for start in range(0, count, T):
            row = start + t
            total += tl.sum(tl.load(x + (picture * count + row) * channels + c, (row >= first)
                                    & (row < last) & there, 0.0).to(tl.float32), 0)[None, :]
        y = _standardise(total / (last - first) + at, there, channels, EPSILON)
        y = (y * tl.load(scale + c, there, 0.0).to(tl.float32)
             + tl.load(shift + c, there, 0.0).to(tl.float32))
        y = _standardise(y + text_at, there, channels, TEXT_EPSILON)
        y = (y * tl.load(text_scale + c, there, 0.0).to(tl.float32)
             + tl.load(text_shift + c, there, 0.0).to(tl.float32))
        tl.store(out + (picture // cameras * cameras * (count + 1)) * channels + place,
                 y.to(out.dtype.element_ty), there)

    @triton.jit
    def _quantised(x, out, scales, rows, depth, LARGEST: tl.constexpr, LEAST: tl.constexpr,
                   W: tl.constexpr, K: tl.constexpr):
        row, k = tl.program_id(0) * W + tl.arange(0, W), tl.arange(0, K)
        place, real = row[:, None] * depth + k[None, :], row < rows
        there = real[:, None] & (k[None, :] < depth)
        wide = tl.load(x + place, there, 0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(wide), 1), LEAST) / LARGEST
        tl.store(out + place, (wide / scale[:, None]).to(out.dtype.element_ty), there)
        tl.store(scales + row, scale, real)


class Resize:
    """Resize pictures of one size to squares, as `F.interpolate(antialias=True)` does.

    What each row and column is made of is what that does to a picture of one bright line.
    """

    def __init__(self, height: int, width: int, size: int, device: torch.device):
        self._size = size
        self._rows = self._made_of(height, size, device)
        self._columns = self._made_of(width, size, device)

    @classmethod
    @functools.cache
    def of(cls, height: int, width: int, size: int, device: torch.device) -> 'Resize':
        """Return what is made once for pictures of this size."""
        return cls(height, width, size, device)

    @staticmethod
    def _made_of(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the first pixel of each of `size`, and the weights from there on."""
        shares = F.interpolate(torch.eye(length)[None, None], (size, length), mode='bilinear',
                               antialias=True, align_corners=False)[0, 0]
        used = shares > 0
        first = used.int().argmax(1)
        taps = int((used.int().cumsum(1).argmax(1) + 1 - first).max())
        at = (first[:, None] + torch.arange(taps)).clamp(max=length - 1)
        weights = shares.gather(1, at) * (first[:, None] + torch.arange(taps) < length)
        return first.to(device, torch.int32), weights.to(device)

    def __call__(self, pictures: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (N, S, S, 3) less the mean (3,), from pictures (N, H, W, 3) uint8."""
        count, height, width = pictures.shape[:3]
        out = torch.empty(count, self._size, self._size, 3, dtype=dtype, device=pictures.device)
        (rows, row_weights), (columns, column_weights) = self._rows, self._columns
        across = min(64, power_of_two(self._size))
        _resize[(count * self._size, triton.cdiv(self._size, across))](
            pictures, out, rows, row_weights, columns, column_weights, mean, height, width,
            self._size, TALL=row_weights.shape[1], WIDE=column_weights.shape[1], X=across,
            num_warps=2)
        return out


def patches(x: Tensor, grid: tuple[int, int], side: int, stride: int, padding: int,
            depth: int) -> Tensor:
    """Return what a convolution multiplies, (N, h w, depth), of x (N, H W, C).

    The numbers are in the order (row, column, channel) of a patch; zeros up to the depth.
    """
    count, (height, width), channels = len(x), grid, x.shape[-1]
    out_height, out_width = ((size + 2 * padding - side) // stride + 1 for size in grid)
    tokens = count * out_height * out_width
    out = torch.empty(count, out_height * out_width, depth, dtype=x.dtype, device=x.device)
    block = power_of_two(depth - (side - 1) * side * channels)
    together = max(1, 2048 // block)
    _patches[(triton.cdiv(tokens, together), side)](
        x, out, tokens, height, width, channels, out_height, out_width, side, stride, padding,
        depth, T=together, E=block, num_warps=4)
    return out


def _attend(qkv: Tensor, padding: Tensor, gather: Tensor, bias: Tensor, heads: int, inside: int,
            **flags: bool) -> Tensor:
    pictures, tokens, channels = qkv.shape
    out = torch.empty(pictures, tokens, channels // 3, device=qkv.device, dtype=qkv.dtype)
    windows = len(gather) // inside if flags['GATHER'] else 1
    width = channels // 3 // heads
    first = max(16, 1 << inside.bit_length() - 1)
    block = min(64 if flags['GATHER'] else 16, power_of_two(inside))
    _attention[(pictures * windows, heads, triton.cdiv(inside, block))](
        qkv, padding, gather, bias, out, tokens, windows, inside, heads, width ** -0.5,
        Q=block, S=first, REST=power_of_two(inside - first) if inside > first else 0, D=width,
        num_warps=4, **flags)
    return out


def window_attention(qkv: Tensor, padding: Tensor, gather: Tensor, heads: int,
                     inside: int) -> Tensor:
    """Return attention (N, T, C) inside windows of `inside` places, from qkv (N, T, 3 C).

    gather: (windows * inside,) which token stands at each place; T where none does, and then
    keys and values are those of `padding` (1, 1, 3 C).
    """
    return _attend(qkv, padding, gather, qkv, heads, inside, GATHER=True, BIAS=False)


def attention(qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Return attention (N, T, C) among all tokens of qkv (N, T, 3 C), with bias (N, 1, 1, T)."""
    return _attend(qkv, qkv, qkv, bias if bias is not None else qkv, heads, qkv.shape[1],
                   GATHER=False, BIAS=bias is not None)


def channel_attention(qkv: Tensor, groups: int) -> Tensor:
    """Return attention (N, T, C) among the channels of each group, from qkv (N, T, 3 C).

    scores = q.T @ k / sqrt(T) over the tokens. Of few tokens each program goes through all; of
    many the scores of some are one kernel, and what they are for is another.
    """
    pictures, tokens, channels = qkv.shape
    out = torch.empty(pictures, tokens, channels // 3, device=qkv.device, dtype=qkv.dtype)
    scale, width, count = tokens ** -0.5, channels // 3 // groups, pictures * groups
    if tokens <= ALL_TOKENS:
        block = min(128, power_of_two(tokens))
        _channel_attention[(count,)](qkv, out, tokens, groups, scale, T=block, D=width,
                                     STEPS=triton.cdiv(tokens, block), num_warps=4)
        return out
    parts = triton.cdiv(tokens, PART)
    scores = torch.empty(count, parts, width, width, device=qkv.device)
    _channel_parts[(count, parts)](qkv, scores, tokens, groups, T=PART, D=width, num_warps=4)
    _channel_whole[(count, parts)](qkv, scores, out, tokens, groups, scale, PARTS=parts, T=PART,
                                   D=width, num_warps=4)
    return out


def depthwise_norm(x: Tensor, taps: Tensor, bias: Tensor, after: Tensor, grid: tuple[int, int],
                   eps: float) -> tuple[Tensor, Tensor]:
    """Return y + after and layer_norm(y) for y = x + depthwise 3x3 convolution of x (N, H W, C).

    taps: (9, C). bias, after: (C,). The norm has no scale and shift.
    """
    channels, block = x.shape[-1], power_of_two(x.shape[-1])
    out, normed = torch.empty_like(x), torch.empty_like(x)
    tokens, together = x.numel() // channels, 1 if block > 1024 else max(2, 1024 // block)
    _depthwise_norm[(triton.cdiv(tokens, together),)](
        x, taps, bias, after, out, normed, tokens, *grid, channels, EPSILON=eps, W=together,
        C=block, num_warps=8 if block > 1024 else 2)
    return out, normed


def add_norm(a: Tensor, b: Tensor | None, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Return layer_norm(a + b) over the last dimension C, times scale and plus shift (C,)."""
    channels, out = a.shape[-1], torch.empty_like(a)
    rows, block = a.numel() // channels, power_of_two(channels)
    together = max(1, 1024 // block)
    _add_norm[(triton.cdiv(rows, together),)](
        a, a if b is None else b, scale, shift, out, rows, channels, EPSILON=eps,
        ADD=b is not None, R=together, C=block, num_warps=4)
    return out


def tokens(x: Tensor, cameras: int, positions: Tensor, norm: nn.LayerNorm,
           text_positions: Tensor, text_norm: nn.LayerNorm) -> Tensor:
    """Return what FusedVision makes of its last layer's (N, tokens, D): (B, C (1 + tokens), D)."""
    pictures, count, channels = x.shape
    out = torch.empty(pictures // cameras, cameras * (count + 1), channels, device=x.device,
                      dtype=x.dtype)
    _tokens[(pictures * (count + 1),)](
        x, positions, norm.weight, norm.bias, text_positions, text_norm.weight, text_norm.bias,
        out, cameras, channels, EPSILON=norm.eps, TEXT_EPSILON=text_norm.eps, count=count, T=8,
        C=power_of_two(channels), num_warps=4)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x @ weight.T + bias) as one product; on CUDA it is GELU's tanh form.

    They differ by less than 5e-4.
    """
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(
        0, x.shape[:-1])


def linear_onto(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add x @ weight.T to residual, as one product, and return it."""
    residual.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t())
    return residual


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows x (M, K) as float8_e4m3fn, and their scales (M, 1), as core/fp8.py does."""
    (rows, depth), block = x.shape, power_of_two(x.shape[1])
    out = torch.empty(rows, depth, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    together = max(1, 1024 // block)
    _quantised[(triton.cdiv(rows, together),)](
        x, out, scales, rows, depth, LARGEST=FP8_LARGEST, LEAST=FP8_LEAST, W=together, K=block,
        num_warps=8 if block > 2048 else 4)
    return out, scales
