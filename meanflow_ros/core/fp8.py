"""Products in float8_e4m3fn: the encoder's weights take half of their memory.

A weight has a scale for each output channel, and what it multiplies has one for each row, found
when it comes: with `quantised`, y = (x8 @ w8.T) * scale of the row * scale of the channel + bias.
A number is at most 2^-4 of itself off, or 2^-10 of its scale where it is below 2^-6 of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanflow_ros.core import encoder_kernels
from meanflow_ros.core.fused import FusedNetwork
from meanflow_ros.core.fused_encoder import ConstantLinear

LARGEST, LEAST = encoder_kernels.FP8_LARGEST, encoder_kernels.FP8_LEAST
OLDEST = (8, 9)       # compute capability: the tensor cores of Ada
MULTIPLE = 16         # of both sizes of a weight, as cuBLAS wants them
PROBE = 17, 64, 48    # rows, depth and columns
ROWS = 80             # on which each layer is tried
LAYER_TOLERANCE = 0.1   # of what it gives for Gaussian rows, as norms; e4m3 makes it 0.04
Product = Callable[[Tensor, Tensor, Tensor, Tensor, 'Tensor | None'], Tensor]


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows x (M, K) as e4m3, and the scales (M, 1) that they are multiplied with."""
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True).clamp(min=LEAST) / LARGEST
    return (wide / scales).to(torch.float8_e4m3fn), scales


def scaled_within(x: Tensor, of_rows: Tensor, weight: Tensor, of_channels: Tensor,
                  bias: Tensor | None) -> Tensor:
    """Return the product (M, N) in bfloat16 of x (M, K) and weight (N, K), both e4m3.

    of_rows: (M, 1), of_channels: (1, N), float32. bias: (N,) bfloat16.
    """
    return torch._scaled_mm(x, weight.t(), scale_a=of_rows, scale_b=of_channels, bias=bias,
                            out_dtype=torch.bfloat16, use_fast_accum=True)


def scaled_afterwards(x: Tensor, of_rows: Tensor, weight: Tensor, of_channels: Tensor,
                      bias: Tensor | None) -> Tensor:
    """Do the same where a product takes no scale but that of a whole tensor."""
    one = _one(x.device)
    out = torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32,
                           use_fast_accum=True)
    out = out * of_rows * of_channels
    return (out if bias is None else out + bias).to(torch.bfloat16)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Return '' if there can be fp8 here, or why not."""
    if device.type != 'cuda' or dtype != torch.bfloat16:
        return f'fp8 is for bfloat16 on CUDA, not for {dtype} on {device.type}'
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return 'fp8 needs compute capability {}.{}, this GPU has {}.{}'.format(
            *OLDEST, *capability)
    return ''


def choose(device: torch.device) -> tuple[Product | None, str]:
    """Return the first product that is right on this device and '', or None and why not."""
    problems = []
    for product in (scaled_within, scaled_afterwards):
        problem = _tried(product, device)
        if not problem:
            return product, ''
        problems.append(f'{product.__name__}: {problem}')
    return None, f'there is no fp8 product on {device}: {"; ".join(problems)}'


def _tried(product: Product, device: torch.device) -> str:
    """Return '' if a small product is right, else what is wrong."""
    rows, depth, columns = PROBE
    x, weight, bias = (((torch.arange(count) * step) % 7 - 3.0) for count, step in (
        (rows * depth, 5), (columns * depth, 3), (columns, 1)))
    x, weight = x.view(rows, depth), weight.view(columns, depth)
    of_rows, of_channels = (2.0 ** (torch.arange(size) % 5) for size in (rows, columns))
    expected = (x * of_rows[:, None]) @ (weight * of_channels[:, None]).t() + bias
    try:
        out = product(x.to(device, torch.float8_e4m3fn), of_rows[:, None].to(device),
                      weight.to(device, torch.float8_e4m3fn), of_channels[None].to(device),
                      bias.to(device, torch.bfloat16)).float().cpu()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f'{type(error).__name__}: {str(error).splitlines()[0]}'
    return '' if torch.allclose(out, expected, rtol=2**-7, atol=2**-7) else 'it is wrong'


class Fp8Linear(nn.Module):
    """A ConstantLinear in fp8, with the same methods. kernels: whether Triton quantises."""

    def __init__(self, layer: ConstantLinear, product: Product, *, kernels: bool = False):
        super().__init__()
        weight, scales = quantised(layer.weight.detach())
        self.register_buffer('weight', weight)                     # (out, in)
        self.register_buffer('scales', scales.t())                 # (1, out)
        self.register_buffer('bias', None if layer.bias is None else layer.bias.detach())
        self.kernels, self._product = kernels, product

    def forward(self, x: Tensor) -> Tensor:                        # (..., in) -> (..., out)
        return self._multiplied(x, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """Do as ConstantLinear; GELU is a kernel of its own."""
        return F.gelu(self(x), approximate='tanh')

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """Do as ConstantLinear; the sum is a kernel of its own."""
        return residual.add_(self._multiplied(x, None))

    def _multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.flatten(0, -2).contiguous()
        rows, scales = encoder_kernels.quantised(rows) if self.kernels else quantised(rows)
        out = self._product(rows, scales, self.weight, self.scales, bias)
        return out.unflatten(0, x.shape[:-1])


class Fp8Layers:
    """The layers before the action network's blocks, in fp8 in place, until `undo`.

    These are all of the encoder whose sizes cuBLAS takes, and the product that gives the blocks'
    keys and values. Both forms are in memory as long as this is.
    """

    def __init__(self, network: FusedNetwork, product: Product, *, kernels: bool):
        parts = network.see, network.read, network.dit.keys_and_values
        self._replaced = [(parent, name, child) for part in parts for parent in part.modules()
                          for name, child in parent.named_children() if fits(child)]
        for parent, name, child in self._replaced:
            setattr(parent, name, Fp8Linear(child, product, kernels=kernels))

    def problem(self) -> str:
        """Return '' if each layer gives nearly what it gave before, else what is wrong."""
        for parent, name, before in self._replaced:
            weight = before.weight
            random = torch.Generator(weight.device).manual_seed(0)
            x = torch.randn(ROWS, weight.shape[1], generator=random, device=weight.device,
                            dtype=weight.dtype)
            expected = before(x).float()
            off = float((getattr(parent, name)(x).float() - expected).norm())
            size = float(expected.norm())                          # 0 if all weights are
            if not off <= LAYER_TOLERANCE * size:
                return f'a layer of {tuple(weight.shape)} was {off:.2g} of {size:.2g} off in fp8'
        return ''

    def undo(self) -> None:
        """Put the layers back as they were."""
        for parent, name, child in self._replaced:
            setattr(parent, name, child)


def fits(layer: nn.Module) -> bool:
    """Return whether a layer can be in fp8."""
    return (isinstance(layer, ConstantLinear)
            and all(size % MULTIPLE == 0 for size in layer.weight.shape))
