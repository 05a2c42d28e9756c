"""All blocks of the action network as one kernel, which stays on the GPU from first to last.

A chunk of few steps gives a GPU so little to compute that starting a kernel, and waiting for its
weights, takes longer than the rest of it; a DiT of 18 blocks is 144 kernels. Here one program on
each multiprocessor goes through all products and attentions, and the programs wait for each other
between them: while they wait, the weights of what comes next are on their way.

It is used where steps of the chunk are given, so that every step has a modulation of its own,
which the kernels of core/kernels.py do not take. Attention is theirs; what is computed is
FusedFlowBlock, of core/fused_dit.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meanflow_ros.core import kernels
from meanflow_ros.core.kernels import EPS

try:
    import triton
    import triton.language as tl
except ImportError:   # PyTorch for CPUs comes without
    triton = None

PHASES = 8             # of a block: what one program writes in one, all may read in the next
WARPS = 8              # of a program; each takes a part of a product's depth
TILE = 8               # columns of a product that a program computes at once
MOST_WIDTH = 1024      # of a block: a row is normalised at once
MOST_DEPTH = 3 * 1024  # of a product: its weights wait in three pieces


if triton is not None:
    @triton.jit
    def _program(ALL: tl.constexpr):
        """Return which program this is; what follows from it is not kept from phase to phase."""
        if ALL:   # each time anew, since registers are scarce
            return tl.inline_asm_elementwise('mov.u32 $0, %ctaid.x;', '=r', [], dtype=tl.int32,
                                             is_pure=False, pack=1)
        else:
            return tl.program_id(0)

    @triton.jit
    def _wait(counter, target, ALL: tl.constexpr):
        """Wait until the count is the target: one thread asks, so that who arrives is not held up.

        Returns 0: what is computed with it is not kept in registers from phase to phase.
        """
        zero = 0
        if ALL:
            zero = tl.inline_asm_elementwise(
                """{
                .reg .pred p;
                .reg .b32 seen;
                mov.u32 seen, %tid.x;
                setp.ne.u32 p, seen, 0;
                @p bra THERE;
                AGAIN:
                ld.acquire.gpu.global.s32 seen, [$1];
                setp.lt.s32 p, seen, $2;
                @p bra AGAIN;
                THERE:
                mov.u32 $0, 0;
                }""", '=r,l,r', [counter.to(tl.int64, bitcast=True), target],
                dtype=tl.int32, is_pure=False, pack=1)
            tl.debug_barrier()
        return zero

    @triton.jit
    def _arrive(counter, done, ALL: tl.constexpr):
        """Say that this program is through a phase; return the count when all are."""
        if ALL:
            tl.debug_barrier()
            tl.atomic_add(counter, 1, sem='release')
        return done + tl.num_programs(0)

    @triton.jit
    def _tile(weight, column, end, columns, depth: tl.constexpr, begin: tl.constexpr,
              GATED: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
        """Return weights (PARTS, K / PARTS, N); GATED: 2 N, gate and value beside each other."""
        at = begin + (tl.arange(0, PARTS)[:, None, None] * (K // PARTS)
                      + tl.arange(0, K // PARTS)[None, :, None])
        if GATED:
            n = tl.arange(0, 2 * N)
            column += n // 2
            line = column + n % 2 * columns
        else:
            column += tl.arange(0, N)
            line = column
        there = column[None, None, :] < end
        if begin + K > depth:
            there &= at < depth
        return tl.load(weight + line[None, None, :] * depth + at, there, 0.0)

    @triton.jit
    def _tiles(weight, one, columns, depth: tl.constexpr, GATED: tl.constexpr, K: tl.constexpr,
               N: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr):
        """Return the first tiles of this program's share of the columns, at most three."""
        tiles, end = (), tl.minimum(one * SHARE + SHARE, columns)
        for i in tl.static_range(min(3, SHARE // N)):
            tiles += (_tile(weight, one * SHARE + i * N, end, columns, depth, 0, GATED, K, N,
                            PARTS),)
        return tiles

    @triton.jit
    def _pieces(weight, tile, columns, depth: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                PARTS: tl.constexpr):
        """Return a tile in pieces of K of its depth."""
        pieces = ()
        for i in tl.static_range((depth + K - 1) // K):
            pieces += (_tile(weight, tile * N, columns, columns, depth, i * K, False, K, N,
                             PARTS),)
        return pieces

    @triton.jit
    def _rows(x, zero, rows, depth: tl.constexpr, begin: tl.constexpr, M: tl.constexpr,
              K: tl.constexpr, PARTS: tl.constexpr):
        """Return x (PARTS, M, K / PARTS); never from a cache that other programs do not write."""
        at = begin + (tl.arange(0, PARTS)[:, None, None] * (K // PARTS)
                      + tl.arange(0, K // PARTS)[None, None, :])
        row = (zero + tl.arange(0, M))[None, :, None]
        there = row < rows
        if begin + K > depth:
            there &= at < depth
        return tl.load(x + row * depth + at, there, 0.0, cache_modifier='.cg')

    @triton.jit
    def _signal(signal, rows, depth: tl.constexpr, row_stride, M: tl.constexpr, K: tl.constexpr,
                PARTS: tl.constexpr):
        """Return a shift or a gain (PARTS, M, K / PARTS)."""
        at = (tl.arange(0, PARTS)[:, None, None] * (K // PARTS)
              + tl.arange(0, K // PARTS)[None, None, :])
        row = tl.arange(0, M)[None, :, None]
        there = row < rows
        if K > depth:
            there &= at < depth
        return tl.load(signal + row * row_stride + at, there, 0.0)

    @triton.jit
    def _gate(gate, rows, columns, row_stride, tile, M: tl.constexpr, N: tl.constexpr):
        """Return the gate (M, N) of a tile."""
        row, column = tl.arange(0, M)[:, None], (tile * N + tl.arange(0, N))[None, :]
        return tl.load(gate + row * row_stride + column, (row < rows) & (column < columns),
                       0.0).to(tl.float32)

    @triton.jit
    def _normalised(x, zero, shift, gain, rows, depth: tl.constexpr, EPSILON: tl.constexpr,
                    MODULATE: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
                    PARTS: tl.constexpr):
        """Return the RMS norm of x, modulated, as a product takes it."""
        raw = _rows(x, zero, rows, depth, 0, M, K, PARTS)
        wide = raw.to(tl.float32)
        square = tl.sum(tl.sum(wide * wide, 2), 0)
        wide = wide * tl.rsqrt(square / depth + EPSILON)[None, :, None]
        if MODULATE:
            wide = wide * gain.to(tl.float32) + shift.to(tl.float32)
        return wide.to(raw.dtype)

    @triton.jit
    def _store_tile(out, a, w, column, end, rows, columns, GATED: tl.constexpr, M: tl.constexpr,
                    N: tl.constexpr):
        total = tl.sum(tl.dot(a, w), 0)
        if GATED:
            opened, value = tl.split(tl.reshape(total, (M, N, 2)))
            total = opened * tl.sigmoid(opened) * value
        row, column = tl.arange(0, M)[:, None], (column + tl.arange(0, N))[None, :]
        tl.store(out + row * columns + column, total.to(out.dtype.element_ty),
                 (row < rows) & (column < end))

    @triton.jit
    def _from_norm(x, out, w, weight, one, zero, shift, gain, rows, columns, depth: tl.constexpr,
                   MODULATE: tl.constexpr, GATED: tl.constexpr, EPSILON: tl.constexpr,
                   M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
                   SHARE: tl.constexpr):
        """Store (modulated norm of x) @ weight.T; w: `_tiles` of the weight."""
        a = _normalised(x, zero, shift, gain, rows, depth, EPSILON, MODULATE, M, K, PARTS)
        column, end = one * SHARE, tl.minimum(one * SHARE + SHARE, columns)
        for i in tl.static_range(min(3, SHARE // N)):
            _store_tile(out, a, w[i], column, end, rows, columns, GATED, M, N)
            column += N
        if SHARE > 3 * N:
            while column < end:
                more = _tile(weight, column, end, columns, depth, 0, GATED, K, N, PARTS)
                _store_tile(out, a, more, column, end, rows, columns, GATED, M, N)
                column += N

    @triton.jit
    def _onto(x, inner, w, factor, weight, one, zero, gate, rows, columns, depth: tl.constexpr,
              row_stride, GATE: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
              PARTS: tl.constexpr):
        """Add gate * (inner @ weight.T) to x; w, factor: the first tile of weight and gate."""
        a = ()
        for i in tl.static_range((depth + K - 1) // K):
            a += (_rows(inner, zero, rows, depth, i * K, M, K, PARTS),)
        tile = one
        while tile * N < columns:
            row, column = tl.arange(0, M)[:, None], (tile * N + tl.arange(0, N))[None, :]
            kept, place = (row < rows) & (column < columns), x + row * columns + column
            added = tl.load(place, kept, 0.0, cache_modifier='.cg').to(tl.float32)
            total = tl.dot(a[0], w[0])
            for i in tl.static_range(1, (depth + K - 1) // K):
                total += tl.dot(a[i], w[i])
            tl.store(place, (added + factor * tl.sum(total, 0)).to(x.dtype.element_ty), kept)
            tile += tl.num_programs(0)
            w = _pieces(weight, tile, columns, depth, K, N, PARTS)
            if GATE:
                factor = _gate(gate, rows, columns, row_stride, tile, M, N)

    @triton.jit
    def _blocks(x, qkv, attended, queries, hidden, counter, modulation, mod_block, mod_kind,
                mod_row, qkv_w, proj_w, query_w, cross_w, gate_w, mlp_w, straight, swapped, keys,
                key_block, key_head, key_row, values, value_block, value_head, value_row,
                key_scale, bias, rows, count, scale, first, last, WIDTH: tl.constexpr,
                HEADS: tl.constexpr, HIDDEN: tl.constexpr, BIAS: tl.constexpr,
                PHASE: tl.constexpr, EPSILON: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
                K: tl.constexpr, DEEP: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
                QKV: tl.constexpr, QUERY: tl.constexpr, GATE: tl.constexpr):
        """Go through blocks first .. last - 1 of all weights; PHASE: through this one only.

        QKV, QUERY, GATE: how many columns of these products are a program's.
        """
        D: tl.constexpr = WIDTH // HEADS
        ALL: tl.constexpr = PHASE < 0
        programs, done = tl.num_programs(0), 0
        block = first
        while block < last:
            shift_a = modulation + block * mod_block
            gain_a, gate_a = shift_a + mod_kind, shift_a + 2 * mod_kind
            shift_m, gain_m = shift_a + 3 * mod_kind, shift_a + 4 * mod_kind
            gate_m = shift_a + 5 * mod_kind
            if ALL or PHASE == 0:
                one = _program(ALL)
                weight = qkv_w + block * 3 * WIDTH * WIDTH
                w = _tiles(weight, one, 3 * WIDTH, WIDTH, False, K, N, PARTS, QKV)
                shift = _signal(shift_a, rows, WIDTH, mod_row, M, K, PARTS)
                gain = _signal(gain_a, rows, WIDTH, mod_row, M, K, PARTS)
                zero = _wait(counter, done, ALL)
                _from_norm(x, qkv, w, weight, one, zero, shift, gain, rows, 3 * WIDTH, WIDTH, True,
                           False, EPSILON, M, K, N, PARTS, QKV)
                done = _arrive(counter, done, ALL)
            if ALL or PHASE == 1:
                head = _program(ALL)
                table = block * rows * 2 * D
                _wait(counter, done, ALL)
                while head < HEADS:
                    kernels._attend_own(qkv, straight + table, swapped + table, attended, head,
                                        rows, HEADS, scale, EPSILON, M, D, False)
                    head += programs
                done = _arrive(counter, done, ALL)
            if ALL or PHASE == 2:
                one = _program(ALL)
                weight = proj_w + block * WIDTH * WIDTH
                factor = _gate(gate_a, rows, WIDTH, mod_row, one, M, N)
                w = _pieces(weight, one, WIDTH, WIDTH, K, N, PARTS)
                zero = _wait(counter, done, ALL)
                _onto(x, attended, w, factor, weight, one, zero, gate_a, rows, WIDTH, WIDTH,
                      mod_row, True, M, K, N, PARTS)
                done = _arrive(counter, done, ALL)
            if ALL or PHASE == 3:
                one = _program(ALL)
                weight = query_w + block * WIDTH * WIDTH
                w = _tiles(weight, one, WIDTH, WIDTH, False, K, N, PARTS, QUERY)
                zero = _wait(counter, done, ALL)
                _from_norm(x, queries, w, weight, one, zero, x, x, rows, WIDTH, WIDTH, False,
                           False, EPSILON, M, K, N, PARTS, QUERY)
                done = _arrive(counter, done, ALL)
            if ALL or PHASE == 4:
                head = _program(ALL)
                k, v, added = kernels._context(
                    keys + block * key_block, values + block * value_block, key_scale + block * D,
                    bias, head, count, HEADS, key_head, key_row, value_head, value_row, EPSILON,
                    True, BIAS, S, D)
                _wait(counter, done, ALL)
                while head < HEADS:
                    kernels._attend_context(queries, k, v, added, attended, head, rows, count,
                                            HEADS, scale, EPSILON, M, S, D)
                    head += programs
                    k, v, added = kernels._context(
                        keys + block * key_block, values + block * value_block,
                        key_scale + block * D, bias, head, count, HEADS, key_head, key_row,
                        value_head, value_row, EPSILON, True, BIAS, S, D)
                done = _arrive(counter, done, ALL)
            if ALL or PHASE == 5:
                one = _program(ALL)
                weight = cross_w + block * WIDTH * WIDTH
                w = _pieces(weight, one, WIDTH, WIDTH, K, N, PARTS)
                zero = _wait(counter, done, ALL)
                _onto(x, attended, w, 1.0, weight, one, zero, x, rows, WIDTH, WIDTH, mod_row,
                      False, M, K, N, PARTS)
                done = _arrive(counter, done, ALL)
            if ALL or PHASE == 6:
                one = _program(ALL)
                weight = gate_w + block * 2 * HIDDEN * WIDTH
                w = _tiles(weight, one, HIDDEN, WIDTH, True, K, N, PARTS, GATE)
                shift = _signal(shift_m, rows, WIDTH, mod_row, M, K, PARTS)
                gain = _signal(gain_m, rows, WIDTH, mod_row, M, K, PARTS)
                zero = _wait(counter, done, ALL)
                _from_norm(x, hidden, w, weight, one, zero, shift, gain, rows, HIDDEN, WIDTH, True,
                           True, EPSILON, M, K, N, PARTS, GATE)
                done = _arrive(counter, done, ALL)
            if ALL or PHASE == 7:
                one = _program(ALL)
                weight = mlp_w + block * WIDTH * HIDDEN
                factor = _gate(gate_m, rows, WIDTH, mod_row, one, M, N)
                w = _pieces(weight, one, WIDTH, HIDDEN, DEEP, N, PARTS)
                zero = _wait(counter, done, ALL)
                _onto(x, hidden, w, factor, weight, one, zero, gate_m, rows, WIDTH, HIDDEN,
                      mod_row, True, M, DEEP, N, PARTS)
                done = _arrive(counter, done, ALL)
            block += 1


@dataclass(frozen=True)
class StackedWeights:
    """The weights of all blocks (blocks, out, in), and more.

    straight, swapped: rotary tables (blocks, T, 2, 1, d). key_scale: (blocks, d), of the keys'
    norm.
    """

    qkv: Tensor
    proj: Tensor
    query: Tensor
    cross: Tensor
    gate_and_value: Tensor
    mlp: Tensor
    straight: Tensor
    swapped: Tensor
    key_scale: Tensor

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], key_scale: Tensor) -> 'StackedWeights':
        """Stack those of FusedFlowBlocks, whose own then are views of what is returned."""
        layers = {'qkv': [block.self_attn.qkv for block in blocks],
                  'proj': [block.self_attn.proj for block in blocks],
                  'query': [block.query for block in blocks],
                  'cross': [block.cross_proj for block in blocks],
                  'gate_and_value': [block.gate_and_value for block in blocks],
                  'mlp': [block.mlp_proj for block in blocks]}
        stacked = {name: torch.stack([layer.weight.detach() for layer in of_blocks])
                   for name, of_blocks in layers.items()}
        for name, of_blocks in layers.items():
            for layer, weight in zip(of_blocks, stacked[name]):
                layer.weight = nn.Parameter(weight, requires_grad=False)
        for name in ('straight', 'swapped'):
            stacked[name] = torch.stack([getattr(block.self_attn, name) for block in blocks])
        return cls(**stacked, key_scale=key_scale)


def why_not(width: int, hidden: int, device: torch.device) -> str:
    """Return '' if blocks of these sizes can be one kernel on this device, or why not."""
    if width > MOST_WIDTH or hidden > MOST_DEPTH:
        return f'blocks of width {width}, {hidden} in their middle, are too large for one kernel'
    if device.type != 'cuda':
        return 'one kernel for all blocks is for CUDA'
    return ''


def run_blocks(x: Tensor, weights: StackedWeights, modulation: Tensor, keys: Tensor,
               values: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Return x (T, D) after all blocks; x is overwritten.

    modulation: (blocks, 6, T, D), the last dimension contiguous. keys, values: (blocks,
    heads, S, d), likewise; keys before their norm. bias: S numbers, added. On a CPU, where
    Triton's interpreter runs programs one after the other so that none can wait for another,
    phase by phase.
    """
    (rows, width), blocks = x.shape, len(weights.qkv)
    hidden, count, d = weights.mlp.shape[2], keys.shape[2], width // heads
    new = x.new_empty
    scratch = (new(rows, 3 * width), new(rows, width), new(rows, width), new(rows, hidden),
               torch.zeros(1, dtype=torch.int32, device=x.device))
    programs = 3
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count

    def share(columns: int) -> int:   # whole tiles, as even as can be
        return triton.cdiv(columns, TILE * programs) * TILE

    def launch(first: int, last: int, phase: int, **options: bool) -> None:
        _blocks[(programs,)](
            x, *scratch, modulation, *modulation.stride()[:3], weights.qkv, weights.proj,
            weights.query, weights.cross, weights.gate_and_value, weights.mlp, weights.straight,
            weights.swapped, keys, *keys.stride()[:3], values, *values.stride()[:3],
            weights.key_scale, bias if bias is not None else x, rows, count, d ** -0.5, first,
            last, WIDTH=width, HEADS=heads, HIDDEN=hidden, BIAS=bias is not None, PHASE=phase,
            EPSILON=EPS, M=kernels._power(rows), S=kernels._power(count),
            K=kernels._power(width, 16 * WARPS),
            DEEP=min(1024, kernels._power(hidden, 16 * WARPS)), N=TILE, PARTS=WARPS,
            QKV=share(3 * width), QUERY=share(width), GATE=share(hidden), num_warps=WARPS,
            **options)

    if x.is_cuda:
        # cooperative: started when there is room for all programs, since each waits for all
        launch(0, blocks, -1, launch_cooperative_grid=True)
        return x
    for block in range(blocks):
        for phase in range(PHASES):
            launch(block, block + 1, phase)
    return x
