"""Run by test_kernels.py in a process in which Triton interprets its kernels on the CPU."""

import dataclasses
import json
import sys

import micro_policy
import numpy as np
import torch
import torch.nn.functional as F
from test_runtime import observations
from torch import nn

from meanflow_ros.core import encoder_kernels, fp8, kernels
from meanflow_ros.core.fused_encoder import window_order
from meanflow_ros.core.policy import Policy
from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions

torch.manual_seed(0)
FOUND: dict[str, float] = {}


def found(name, ours, reference):
    FOUND[name] = float((ours - reference).abs().max() / reference.abs().max())


def rms(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def check_products():
    x, weight, residual = torch.randn(10, 96), torch.randn(80, 96), torch.randn(10, 80)
    shift, gain, gate = torch.randn(96), torch.randn(96), torch.randn(80)
    found('product', kernels.product(x, weight), x @ weight.t())
    moved = (rms(x) * gain + shift) @ weight.t()
    found('norm, gate and residual', kernels.product(
        x, weight, norm=True, shift=shift, gain=gain, residual=residual, gate=gate),
        residual + gate * moved)
    found('gated', kernels.product(x, weight, norm=True, shift=shift, gain=gain, gated=True),
          F.silu(moved[:, :40]) * moved[:, 40:])
    x, weight = torch.randn(3, 2100), torch.randn(50, 2100)
    found('deep product', kernels.product(x, weight), x @ weight.t())


def check_attention():
    qkv, tables = torch.randn(10, 3 * 48), torch.randn(2, 10, 2, 1, 16)
    heads = qkv.view(1, 10, 3, 3, 16)
    turned = rms(heads[:, :, :2])
    turned = turned * tables[0] + turned.roll(8, -1) * tables[1]
    q, k, v = (part.transpose(1, 2) for part in (turned[:, :, 0], turned[:, :, 1], heads[:, :, 2]))
    found('self attention', kernels.self_attention(qkv, *tables, 3),
          F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)[0])
    queries, keys, values = torch.randn(10, 48), torch.randn(3, 41, 16), torch.randn(41, 3, 16)
    bias = torch.zeros(1, 1, 1, 41)
    bias[..., 30:] = -torch.inf
    values = values.transpose(0, 1)
    for name, added in (('cross attention', None), ('cross attention with padding', bias)):
        out = F.scaled_dot_product_attention(
            rms(queries.view(1, 10, 3, 16)).transpose(1, 2), keys[None], values[None],
            attn_mask=added)
        found(name, kernels.cross_attention(queries, keys, values, added),
              out.transpose(1, 2).flatten(2)[0])
    for tokens in (64, 178):
        qkv, bias = torch.randn(2, tokens, 3 * 64), torch.zeros(2, 1, 1, tokens)
        bias[0, ..., 30:] = -torch.inf
        q, k, v = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        found(f'attention among {tokens}', encoder_kernels.attention(qkv, 4, bias),
              out.transpose(1, 2).flatten(2))


def check_vision():
    for grid, side in (((5, 7), 3), ((4, 4), 4), ((14, 14), 12)):
        gather, scatter = window_order(grid, side)
        qkv, padding = torch.randn(2, grid[0] * grid[1], 3 * 64), torch.randn(1, 1, 3 * 64)
        rows = torch.cat([qkv, padding.expand(2, -1, -1)], 1).index_select(1, gather)
        q, k, v = rows.view(-1, side * side, 3, 4, 16).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, -1, 64)
        found(f'windows of {side} on {grid}', encoder_kernels.window_attention(
            qkv, padding, gather, 4, side * side), out.index_select(1, scatter))
    for tokens in (196, 700):
        qkv = torch.randn(2, tokens, 3 * 96)
        q, k, v = qkv.view(2, tokens, 3, 3, 32).permute(2, 0, 3, 4, 1)
        out = (q @ k.transpose(-1, -2) * tokens ** -0.5).softmax(-1) @ v
        found(f'attention among channels of {tokens}', encoder_kernels.channel_attention(qkv, 3),
              out.permute(0, 3, 1, 2).flatten(2))
    x, weight = torch.randn(2, 35, 48), torch.randn(48, 1, 3, 3)
    bias, after, scale = torch.randn(3, 48)
    grid = x.unflatten(1, (5, 7)).permute(0, 3, 1, 2)
    y = (grid + F.conv2d(grid, weight, bias, padding=1, groups=48)).permute(0, 2, 3, 1)
    y = y.flatten(1, 2)
    out, normed = encoder_kernels.depthwise_norm(x, weight.flatten(1).t().contiguous(), bias,
                                                 after, (5, 7), 1e-5)
    found('depthwise convolution', out, y + after)
    found('its norm', normed, F.layer_norm(y, (48,)))
    found('sum and norm', encoder_kernels.add_norm(x, y, scale, bias, 1e-5),
          F.layer_norm(x + y, (48,), scale, bias))
    found('norm', encoder_kernels.add_norm(x, None, scale, bias, 1e-5),
          F.layer_norm(x, (48,), scale, bias))
    found('sum of a product', encoder_kernels.linear_onto(x.clone(), y, torch.eye(48)), x + y)


def check_tokens():
    x, positions, text_positions = torch.randn(4, 21, 48), torch.randn(22, 48), torch.randn(44, 48)
    norm, text_norm = nn.LayerNorm(48), nn.LayerNorm(48, eps=1e-3)
    for value in (*norm.parameters(), *text_norm.parameters()):
        nn.init.normal_(value)
    each = norm(torch.cat([x.mean(1, keepdim=True), x], dim=1) + positions)
    expected = text_norm(each.unflatten(0, (2, 2)).flatten(1, 2) + text_positions)
    found('tokens', encoder_kernels.tokens(x, 2, positions, norm, text_positions, text_norm),
          expected.detach())


def check_context():
    both = torch.randn(1, 96, 3, 2, 2, 16)                 # (B, S, blocks, 2, heads, d)
    keys, values = both.permute(3, 2, 0, 4, 1, 5)
    scale = torch.randn(3, 1, 1, 1, 16)
    laid_keys, laid_values = kernels.context(keys, values, scale, 32, 8)
    assert laid_keys.shape == (3, 1, 2, 96, 48) and laid_values.shape == (3, 1, 2, 16, 104)
    found('keys', laid_keys[..., :16], rms(keys) * scale)
    found('values', laid_values[..., :96], values.transpose(-1, -2))


def check_fp8():
    x = 2.0 ** torch.randint(-5, 9, (37, 80)) * (1 + torch.randint(8, (37, 80)) / 8)
    x = (x.clamp(max=448) * torch.randint(-1, 2, x.shape)).index_fill(1, torch.tensor(5), 448)
    x = x * 2.0 ** torch.arange(-18, 19)[:, None]   # rounding is not quite right if interpreted
    values, scales = encoder_kernels.quantised(x)
    found('values in fp8', values.float() * scales, x)
    x = torch.randn(3, 2100).index_fill(0, torch.tensor(1), 0)
    found('scales in fp8', encoder_kernels.quantised(x)[1], fp8.quantised(x)[1])


def check_pictures():
    mean = torch.tensor([120.0, 110.0, 100.0])
    for height, width, size in ((60, 80, 28), (96, 70, 64), (20, 30, 48), (64, 64, 64)):
        pictures = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
        pictures = pictures[:, :, :, [2, 0, 1]].contiguous()
        expected = F.interpolate(pictures.movedim(-1, 1).float(), (size, size), mode='bilinear',
                                 antialias=True, align_corners=False).movedim(1, -1) - mean
        resize = encoder_kernels.Resize(height, width, size, torch.device('cpu'))
        found(f'{width}x{height} to {size}', resize(pictures, mean, torch.float32), expected)
    for grid, channels, side, stride, padding in (((21, 17), 3, 7, 4, 3), ((8, 6), 48, 3, 2, 1),
                                                  ((7, 7), 1024, 3, 2, 1), ((9, 9), 4, 2, 2, 0)):
        x = torch.randn(2, grid[0] * grid[1], channels)
        weight = torch.randn(5, channels, side, side)
        flat = weight.permute(0, 2, 3, 1).flatten(1)
        flat = F.pad(flat, (0, -flat.shape[1] % 8))
        expected = F.conv2d(x.unflatten(1, grid).permute(0, 3, 1, 2), weight, None, stride,
                            padding)
        taken = encoder_kernels.patches(x, grid, side, stride, padding, flat.shape[1])
        found(f'convolution of {side} with stride {stride} of {channels}', taken @ flat.t(),
              expected.permute(0, 2, 3, 1).flatten(1, 2))


def check_policy():
    kernels.why_not = lambda *_: ''
    micro = micro_policy.make_policy()
    policy = Policy(dataclasses.replace(micro.config, max_prefix=2), micro.network)
    seen = observations(policy.robot, 2)
    prefix = policy.act(seen[1]).actions[:1]
    fast = FastPolicy(policy, options=RuntimeOptions(lengths=(64,)))
    fast.warm_up(seen[0])
    assert not fast.why_no_kernels, fast.why_no_kernels
    assert 'is for CUDA' in fast.fused.dit.why_apart
    normalizer = policy.config.action_normalizer
    FOUND['the whole policy'] = max(float(np.abs(
        (policy.act(o, steps=2, prefix=given).actions
         - fast.act(o, steps=2, prefix=given).actions)
        / (normalizer.high - normalizer.low)).max())
        for o, given in ((seen[0], None), (seen[1], prefix)))


if __name__ == '__main__':
    torch.set_num_threads(1)
    for check in (check_products, check_attention, check_vision, check_tokens, check_context,
                  check_fp8, check_pictures, check_policy):
        check()
    json.dump(FOUND, sys.stdout)
