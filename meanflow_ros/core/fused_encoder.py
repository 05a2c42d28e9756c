"""The encoder with all that is constant computed once: what core/runtime.py runs.

FusedVision and FusedText give what FlorenceEncoder gives; the tests hold them to it. Pictures
stay (N, tokens, C) from the first convolution to the last, which is the memory order that both
matrix products and channels-last convolutions want, so nothing is transposed on the way. N is the
number of pictures: those of all cameras and observations in one pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanflow_ros.core import encoder_kernels, kernels
from meanflow_ros.core.encoder import FlorenceEncoder


@dataclass(frozen=True)
class Placement:
    """Where the constants go: they are folded in float32 on the device, then kept as `dtype`.

    kernels: whether those of Triton are used, where their limits allow it.
    """

    device: torch.device
    dtype: torch.dtype
    kernels: bool = False

    def exact(self, value: Tensor) -> Tensor:
        """Return a copy of the value to compute with; it is moved as it is, and converted there.

        The memory of a value that comes from a file is not aligned, which sums depend on.
        """
        return value.detach().to(self.device).to(torch.float32, copy=True)

    def kept(self, value: Tensor) -> Tensor:
        """Return a copy of the value to keep: a file that is mapped may be written over."""
        return value.detach().to(self.device).to(
            self.dtype, copy=True, memory_format=torch.contiguous_format)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> ConstantLinear:
        """Return a layer of this weight (out, in) and bias (out,)."""
        layer = ConstantLinear(*weight.shape[::-1], bias=bias is not None, device='meta')
        layer.weight = nn.Parameter(self.kept(weight), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(self.kept(bias), requires_grad=False)
        return layer

    def after_norm(self, norm: nn.Module, weight: Tensor, bias: Tensor | None = None) -> tuple:
        """Return weight and bias that take the norm's output before its own scale and shift.

        W (g n + s) + b = (W g) n + (W s + b)
        """
        weight = self.exact(weight)
        shift = getattr(norm, 'bias', None)
        if shift is not None:
            shifted = weight @ self.exact(shift)
            bias = shifted if bias is None else self.exact(bias) + shifted
        return weight * self.exact(norm.weight), bias


class ConstantLinear(nn.Linear):
    """A layer of a Placement, and what core/encoder_kernels.py makes one product with it."""

    def gelu(self, x: Tensor) -> Tensor:
        """Return GELU of the layer's output."""
        return encoder_kernels.linear_gelu(x, self.weight, self.bias)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add what the layer gives, less its bias, to residual, and return it."""
        return encoder_kernels.linear_onto(residual, x, self.weight)


class DepthwiseConvolution(nn.Module):
    """x + depthwise 3x3 convolution of x, on tokens (N, H W, C): x is the kernel's centre + 1."""

    def __init__(self, conv: nn.Conv2d, grid: tuple[int, int], place: Placement):
        super().__init__()
        self.grid, self.channels = grid, conv.out_channels
        weight = place.exact(conv.weight)                          # (C, 1, 3, 3)
        weight[:, 0, 1, 1] += 1
        self.register_buffer('weight', place.kept(weight))
        self.register_buffer('bias', place.kept(conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        grid = x.unflatten(1, self.grid).permute(0, 3, 1, 2)       # a channels-last view
        out = F.conv2d(grid, self.weight, self.bias, padding=1, groups=self.channels)
        return out.permute(0, 2, 3, 1).flatten(1, 2)


class DepthwiseShifts(nn.Module):
    """The same as nine shifted products, which a compiler makes one kernel with what follows.

    The sum is in registers then, so that float32 costs nothing.
    """

    def __init__(self, conv: nn.Conv2d, grid: tuple[int, int], place: Placement):
        super().__init__()
        self.grid = grid
        self.register_buffer('weight', place.kept(conv.weight.flatten(1).t()))   # (9, C)
        self.register_buffer('bias', place.kept(conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.grid
        grid = F.pad(x.unflatten(1, self.grid), (0, 0, 1, 1, 1, 1))
        out = self.bias.float() + grid[:, 1:-1, 1:-1].float()
        for tap in range(9):
            row, column = divmod(tap, 3)
            shifted = grid[:, row:row + height, column:column + width]
            out = out + shifted.float() * self.weight[tap].float()
        return out.to(x.dtype).flatten(1, 2)


class WindowAttention(nn.Module):
    """Attention inside windows of the grid; x is normalised without scale and shift.

    The reference pads the grid with zeros to whole windows, so that a padded token's q, k and v
    are the bias. Here only real tokens are projected, and the bias is put into the windows.
    """

    def __init__(self, source: nn.Module, norm: nn.LayerNorm, grid: tuple[int, int],
                 place: Placement):
        super().__init__()
        self.heads, side = source.num_heads, source.window_size
        self.window_tokens = side * side
        weight, bias = place.after_norm(norm, source.qkv.weight, source.qkv.bias)
        self.qkv = place.linear(weight, bias)
        self.proj = place.linear(source.proj.weight, source.proj.bias)
        gather, scatter = window_order(grid, side)
        self.padded = len(gather) > len(scatter)
        self.one_window = len(gather) == self.window_tokens and not self.padded
        self.register_buffer('gather', gather.to(place.device))
        self.register_buffer('scatter', scatter.to(place.device))
        padding = (torch.zeros_like(weight[:, 0]) if source.qkv.bias is None
                   else source.qkv.bias)
        self.register_buffer('padding', place.kept(padding).view(1, 1, -1))
        self.kernels = (place.kernels and self.window_tokens <= kernels.MOST_KEYS
                        and kernels.fits(source.dim // self.heads))

    def forward(self, x: Tensor) -> Tensor:                        # (N, H W, C)
        return self.proj(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """Return what the last layer takes."""
        rows = self.qkv(x)                                         # (N, H W, 3 C)
        if self.kernels:
            return encoder_kernels.window_attention(rows, self.padding, self.gather, self.heads,
                                                    self.window_tokens)
        if self.padded:
            rows = torch.cat([rows, self.padding.expand(len(x), -1, -1)], dim=1)
        if not self.one_window:
            rows = rows.index_select(1, self.gather)
        q, k, v = (part.transpose(1, 2) for part in rows.view(
            -1, self.window_tokens, 3, self.heads, x.shape[-1] // self.heads).unbind(2))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out = out.reshape(len(x), -1, x.shape[-1])
        return out if self.one_window else out.index_select(1, self.scatter)


def window_order(grid: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """Return which token stands at each place of the windows, and where each token stands.

    Places that hold no token name token H W, one past the last; they are a window's last.
    """
    height, width = grid
    tokens = torch.arange(height * width).view(height, width)
    tokens = F.pad(tokens, (0, -width % side, 0, -height % side), value=height * width)
    windows = tokens.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)
    gather = windows.flatten(0, 1).flatten(1).sort().values.flatten()
    scatter = torch.argsort(gather, stable=True)[:height * width]
    return gather, scatter


class ChannelAttention(nn.Module):
    """Attention among the channels of each group; x is normalised without scale and shift."""

    def __init__(self, source: nn.Module, norm: nn.LayerNorm, grid: tuple[int, int],
                 place: Placement):
        super().__init__()
        self.groups, self.scale = source.groups, (grid[0] * grid[1]) ** -0.5
        self.qkv = place.linear(*place.after_norm(norm, source.qkv.weight, source.qkv.bias))
        self.proj = place.linear(source.proj.weight, source.proj.bias)
        self.kernels = (place.kernels and grid[0] * grid[1] <= encoder_kernels.MOST_TOKENS
                        and kernels.fits(source.dim // self.groups))

    def forward(self, x: Tensor) -> Tensor:                        # (N, H W, C)
        return self.proj(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """Return what the last layer takes."""
        qkv = self.qkv(x)                                          # (N, H W, 3 C)
        if self.kernels:
            return encoder_kernels.channel_attention(qkv, self.groups)
        q, k, v = qkv.unflatten(-1, (3, self.groups, -1)).permute(2, 0, 3, 4, 1)
        attention = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)   # (N, groups, D, D)
        return (attention @ v).permute(0, 3, 1, 2).flatten(2)


class ActivatedLinear(nn.Module):
    """A layer and the activation after it."""

    def __init__(self, layer: ConstantLinear, activation: nn.Module, place: Placement):
        super().__init__()
        self.layer, self.activation = layer, activation
        self.kernels = place.kernels and type(activation).__name__ == 'GELUActivation'

    def forward(self, x: Tensor) -> Tensor:
        if self.kernels:
            return self.layer.gelu(x)
        return self.activation(self.layer(x))


class FeedForward(nn.Module):
    """The MLP of a vision block; x is normalised without scale and shift."""

    def __init__(self, source: nn.Module, norm: nn.LayerNorm, place: Placement):
        super().__init__()
        fc1 = place.linear(*place.after_norm(norm, source.fc1.weight, source.fc1.bias))
        self.fc1 = ActivatedLinear(fc1, source.activation_fn, place)
        self.fc2 = place.linear(source.fc2.weight, source.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class VisionBlock(nn.Module):
    """Convolution and attention, convolution and MLP: a spatial or a channel block of DaViT.

    shifts: which form of the depthwise convolution; the second is for a compiler.
    """

    def __init__(self, source: nn.Module, attention: nn.Module, grid: tuple[int, int],
                 place: Placement, *, shifts: bool):
        super().__init__()
        depthwise = DepthwiseShifts if shifts else DepthwiseConvolution
        self.conv1 = depthwise(source.conv1, grid, place)
        self.conv2 = depthwise(source.conv2, grid, place)
        self.attention = attention
        self.mlp = FeedForward(source.ffn, source.norm2, place)
        self.eps = source.norm1.eps
        self.kernels = place.kernels and shifts

    def forward(self, x: Tensor) -> Tensor:                        # (N, H W, C)
        if self.kernels:
            x, normed = self._convolved(self.conv1, x, self.attention.proj)
            x = self.attention.proj.onto(x, self.attention.attend(normed))
            x, normed = self._convolved(self.conv2, x, self.mlp.fc2)
            return self.mlp.fc2.onto(x, self.mlp.fc1(normed))
        x = self.conv1(x)
        x = x + self.attention(F.layer_norm(x, x.shape[-1:], eps=self.eps))
        x = self.conv2(x)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:], eps=self.eps))

    def _convolved(self, conv: DepthwiseShifts, x: Tensor, then: ConstantLinear) -> tuple:
        """Return the convolution of x, with the bias of the layer whose result is added to it."""
        return encoder_kernels.depthwise_norm(x, conv.weight, conv.bias, then.bias, conv.grid,
                                              self.eps)


class PatchEmbedding(nn.Module):
    """Convolution with a stride, and the norm before or after it.

    A norm before it keeps its shift: the convolution pads what comes after the norm with zeros.
    """

    def __init__(self, source: nn.Module, grid: tuple[int, int], place: Placement,
                 scale: Tensor | float = 1.0):
        super().__init__()
        conv = source.conv
        self.grid, self.stride, self.padding = grid, conv.stride, conv.padding
        self.register_buffer('weight', place.kept(place.exact(conv.weight) * scale).to(
            memory_format=torch.channels_last))
        self.register_buffer('bias', place.kept(conv.bias))
        self.before = source.pre_norm
        self.eps = source.norm.eps
        self.register_buffer('norm_scale', place.kept(source.norm.weight))
        self.register_buffer('norm_shift', place.kept(source.norm.bias))
        self.kernels = place.kernels and all(
            len(set(sizes)) == 1 for sizes in (conv.kernel_size, conv.stride, conv.padding))
        if self.kernels:
            flat = self.weight.permute(0, 2, 3, 1).flatten(1)      # a view, unless it is filled up
            short = -flat.shape[1] % 8
            self.register_buffer('flat', F.pad(flat, (0, short)) if short else flat)

    @property
    def out_grid(self) -> tuple[int, int]:
        """Return height and width of the result."""
        return tuple((size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in zip(
            self.grid, self.padding, self.weight.shape[2:], self.stride))

    def _norm(self, x: Tensor) -> Tensor:
        if self.kernels:
            return encoder_kernels.add_norm(x, None, self.norm_scale, self.norm_shift, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.norm_scale, self.norm_shift, self.eps)

    def forward(self, x: Tensor) -> Tensor:                        # (N, H W, C) -> (N, h w, D)
        x = self._norm(x) if self.before else x
        if self.kernels:
            taken = encoder_kernels.patches(x, self.grid, self.weight.shape[2], self.stride[0],
                                            self.padding[0], self.flat.shape[1])
            out = F.linear(taken, self.flat, self.bias)
        else:
            out = F.conv2d(x.unflatten(1, self.grid).permute(0, 3, 1, 2), self.weight, self.bias,
                           self.stride, self.padding)
            out = out.permute(0, 2, 3, 1).flatten(1, 2)
        return out if self.before else self._norm(out)


class FusedVision(nn.Module):
    """Pictures (B, C, S, S, 3), 0 .. 255 minus the mean -> visual tokens (B, C tokens, D).

    The tokens are ready for the text encoder: projected, with positions, normalised.
    """

    def __init__(self, encoder: FlorenceEncoder, cameras: int, place: Placement, *,
                 shifts: bool):
        super().__init__()
        grid = (encoder.config.image_size,) * 2
        tower, layers = encoder.vision_tower, []
        scale = 1 / place.exact(encoder.std).view(1, 3, 1, 1)
        for conv, blocks in zip(tower.convs, tower.blocks):
            layers.append(PatchEmbedding(conv, grid, place, scale))
            grid, scale = layers[-1].out_grid, 1.0
            for block in blocks:
                spatial, channel = block.spatial_block, block.channel_block
                window = WindowAttention(spatial.window_attn, spatial.norm1, grid, place)
                layers.append(VisionBlock(spatial, window, grid, place, shifts=shifts))
                group = ChannelAttention(channel.channel_attn, channel.norm1, grid, place)
                layers.append(VisionBlock(channel, group, grid, place, shifts=shifts))
        self.layers = nn.ModuleList(layers)
        self.tokens = 1 + grid[0] * grid[1]                        # of one picture
        projector, bart = encoder.multi_modal_projector, encoder.language_model['encoder']
        self.projection = place.linear(projector.image_projection.weight)
        self.register_buffer('positions', place.kept(_projected_positions(projector, grid, place)))
        self.norm = _frozen_norm(projector.image_proj_norm, place)
        self.register_buffer('text_positions', place.kept(
            bart.embed_positions.weight[bart.embed_positions.offset:][:cameras * self.tokens]))
        self.text_norm = _frozen_norm(bart.layernorm_embedding, place)
        self.kernels = place.kernels

    def forward(self, pictures: Tensor) -> Tensor:
        each = pictures.flatten(0, 1)
        if self.kernels:
            return encoder_kernels.tokens(self._projected(each), pictures.shape[1],
                                          self.positions, self.norm, self.text_positions,
                                          self.text_norm)
        return self.together(self.each(each).unflatten(0, pictures.shape[:2]))

    def each(self, pictures: Tensor) -> Tensor:
        """Return the tokens (N, tokens, D) of pictures (N, S, S, 3), whichever camera's."""
        x = self._projected(pictures)                              # linear: so is the mean
        return self.norm(torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positions)

    def _projected(self, pictures: Tensor) -> Tensor:
        x = pictures.flatten(1, 2)                                 # (N, S S, 3)
        for layer in self.layers:
            x = layer(x)
        return self.projection(x)

    def together(self, tokens: Tensor) -> Tensor:
        """Return the tokens of all cameras (B, C, tokens, D) as one sequence (B, C tokens, D)."""
        return self.text_norm(tokens.flatten(1, 2) + self.text_positions)


def _projected_positions(projector: nn.Module, grid: tuple[int, int], place: Placement) -> Tensor:
    """Return what the projector adds to each token for its place in the picture."""
    with torch.no_grad():
        like = torch.zeros(1, 1, *grid, device=projector.image_projection.weight.device)
        spatial = projector.image_position_embed(like)[0].flatten(1).t()   # (H W, C)
        temporal = projector.visual_temporal_embed(spatial[None, :1])      # (1, C)
        added = place.exact(spatial) + place.exact(temporal)
        added = torch.cat([added.mean(0, keepdim=True), added])
        return added @ place.exact(projector.image_projection.weight).t()


def _frozen_norm(norm: nn.LayerNorm, place: Placement) -> nn.LayerNorm:
    frozen = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, device='meta')
    frozen.weight = nn.Parameter(place.kept(norm.weight), requires_grad=False)
    frozen.bias = nn.Parameter(place.kept(norm.bias), requires_grad=False)
    return frozen


class TextLayer(nn.Module):
    """A layer of the BART encoder, q, k and v in one product."""

    def __init__(self, source: nn.Module, place: Placement):
        super().__init__()
        attention = source.self_attn
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        self.heads = attention.num_heads
        self.qkv = place.linear(torch.cat([part.weight for part in parts]),
                                torch.cat([part.bias for part in parts]))
        self.out = place.linear(attention.out_proj.weight, attention.out_proj.bias)
        self.attention_norm = _frozen_norm(source.self_attn_layer_norm, place)
        self.fc1 = ActivatedLinear(place.linear(source.fc1.weight, source.fc1.bias),
                                   source.activation_fn, place)
        self.fc2 = place.linear(source.fc2.weight, source.fc2.bias)
        self.final_norm = _frozen_norm(source.final_layer_norm, place)
        self.kernels = place.kernels and kernels.fits(attention.embed_dim // self.heads)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:   # (B, S, D), (B, 1, 1, S)
        if self.kernels and x.shape[1] <= kernels.MOST_KEYS:
            out = encoder_kernels.attention(self.qkv(x), self.heads, bias)
            x = self._added(x, self.out(out), self.attention_norm)
            return self._added(x, self.fc2(self.fc1(x)), self.final_norm)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.attention_norm(x + self.out(out.transpose(1, 2).flatten(2)))
        return self.final_norm(x + self.fc2(self.fc1(x)))

    def _added(self, x: Tensor, other: Tensor, norm: nn.LayerNorm) -> Tensor:
        return encoder_kernels.add_norm(x, other, norm.weight, norm.bias, norm.eps)


class FusedText(nn.Module):
    """Visual tokens (B, V, D) and a prompt's (B, L, D), both embedded -> context (B, V + L, D)."""

    def __init__(self, encoder: FlorenceEncoder, place: Placement):
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(layer, place)
                                    for layer in encoder.language_model['encoder'].layers)

    def forward(self, visual: Tensor, prompt: Tensor, bias: Tensor | None) -> Tensor:
        x = torch.cat([visual, prompt], dim=1)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class PromptEmbedding:
    """Prompts -> what the text encoder's first layer takes for them: computed once a prompt.

    The table of tokens stays what and where it is, on the CPU as a rule: it is read for new
    prompts only. visual_tokens: how many stand before the prompt.
    """

    def __init__(self, encoder: FlorenceEncoder, visual_tokens: int, place: Placement):
        bart = encoder.language_model['encoder']
        self._tokenizer, self._pad_id = encoder.tokenizer, encoder.pad_id
        self._limit, self._visual, self._place = (
            encoder.config.max_prompt_tokens, visual_tokens, place)
        self._table = bart.embed_tokens.weight.detach().clone()
        self._scale = bart.embed_tokens.embed_scale
        self._norm = copy.deepcopy(bart.layernorm_embedding).float()
        self._learned = encoder.prompt_embed.detach().to(torch.float32, copy=True)
        self._positions = bart.embed_positions.weight.detach()[
            bart.embed_positions.offset:].to(torch.float32, copy=True)
        self.shortest = visual_tokens + 1                          # sequence, in tokens
        self.longest = self.shortest + self._limit
        self.positions = len(self._positions)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str],
                 lengths: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        """Return the prompts (B, L, D), and what is added to attention scores (B, 1, 1, V + L).

        lengths: what V + L may be, ascending; the longest prompt's own where that is longer than
        all. What is added is 0 for real tokens and -inf for others; with no lengths given it is
        None if all are real.
        """
        rows = [self._tokenizer.encode(prompt).ids[:self._limit] for prompt in prompts]
        real = [self._visual + 1 + len(row) for row in rows]
        length = next((some for some in lengths if some >= max(real)), max(real))
        ids = torch.tensor([row + [self._pad_id] * (length - self._visual - 1 - len(row))
                            for row in rows], device=self._learned.device)
        words = self._table[ids].float() * self._scale
        x = torch.cat([self._learned.expand(len(rows), -1, -1), words], dim=1)
        x = self._norm(x + self._positions[self._visual:length])
        added = None
        if lengths or min(real) < length:
            added = torch.zeros(len(rows), 1, 1, length)
            for row, count in zip(added, real):
                row[..., count:] = -math.inf
            added = self._place.kept(added)
        return self._place.kept(x), added
