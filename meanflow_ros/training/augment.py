"""Changes of the training pictures, on the device: a shift, and brightness and contrast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(pixels: Tensor, *, shift: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Change each picture of a batch: pixels (B, C, 3, S, S) in 0 .. 255.

    shift: (B, C, 2) pixels, right and down; the border is repeated. gain: (B, C, 3) and bias:
    (B, C) make the colour gain * colour + bias, clipped to 0 .. 255.
    """
    count, size = pixels.shape[0] * pixels.shape[1], pixels.shape[-1]
    affine = torch.eye(2, 3, device=pixels.device).repeat(count, 1, 1)
    affine[:, :, 2] = -2 / size * shift.flatten(0, 1)
    grid = F.affine_grid(affine, [count, 3, size, size], align_corners=False)
    moved = F.grid_sample(pixels.flatten(0, 1), grid, mode='bilinear', padding_mode='border',
                          align_corners=False).view_as(pixels)
    return (moved * gain[..., None, None] + bias[..., None, None, None]).clamp(0, 255)
