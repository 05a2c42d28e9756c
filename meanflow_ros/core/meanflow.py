"""The maths of MeanFlow on one page (Geng et al. 2025, arXiv 2505.13447).

Convention, here and everywhere: t = 1 is noise e, t = 0 is the action chunk x, 0 <= r <= t <= 1,
h = t - r, and on the straight path between them

    z = (1 - t) x + t e            v = dz/dt = e - x    (instantaneous velocity)
    u(z, t, h)                     average velocity over [r, t]
    u = v - h D                    D = (du/dz) v + du/dt  (total derivative, r fixed)

`u` is any callable `u(z, t=(B,), h=(B,)) -> (B, T, A)`; nothing here knows a network.
Tensors: z, x, e, v are (B, T, A); t, r, h are (B,) float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Velocity = Callable[..., Tensor]


def sample_times(batch: int, *, data_proportion: float = 0.75, mean: float = -0.4,
                 std: float = 1.0, one_step_proportion: float = 0.0, device=None,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw (t, r), each (B,), with r <= t.

    Two logit-normal draws are sorted (arXiv 2505.13447, section 4.3); each sample then has r = t
    with probability `data_proportion`. With probability `one_step_proportion` the pair is (1, 0),
    the one that one-step inference asks for and that sorted draws almost never give.
    """
    def uniform():
        return torch.rand(batch, device=device, generator=generator)

    normal = torch.randn(2, batch, device=device, generator=generator) * std + mean
    pair = torch.sigmoid(normal)                                   # (2, B)
    t, r = pair.amax(0), pair.amin(0)                              # (B,) (B,)
    r = torch.where(uniform() < data_proportion, t, r)
    one_step = uniform() < one_step_proportion
    return torch.where(one_step, torch.ones_like(t), t), torch.where(one_step, 0.0, r)


def interpolate(x: Tensor, e: Tensor, *, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point z on the path at time t (B,) and its velocity v."""
    t = t.view(-1, 1, 1)
    return (1 - t) * x + t * e, e - x


def total_derivative(u: Velocity, z: Tensor, v: Tensor, *, t: Tensor,
                     r: Tensor) -> tuple[Tensor, Tensor]:
    """Return u(z, t, t - r) and D = (du/dz) v + du/dt, by one JVP along (v, 1, 0).

    Attention inside `u` runs on the math backend: fused kernels have no forward derivative.
    """
    def along_path(z, t, r):
        return u(z, t=t, h=t - r)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(along_path, (z, t, r),
                              (v, torch.ones_like(t), torch.zeros_like(r)))


def adaptive_weight(error: Tensor, eps: float = 0.01, power: float = 1.0) -> Tensor:
    """Return (error + eps)^-power without gradient, for per-sample errors (B,)."""
    return (error.detach() + eps) ** -power


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return each sample's mean squared error (B,) over the steps that `mask` (B, T) keeps."""
    error = ((prediction - target) ** 2).mean(-1)                  # (B, T)
    if mask is None:
        return error.mean(-1)
    return (error * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def meanflow_loss(u: Velocity, x: Tensor, e: Tensor, *, t: Tensor, r: Tensor,
                  mask: Tensor | None = None) -> Tensor:
    """Return the official MeanFlow loss: regress u to stop_gradient(v - h D), weighted.

    mask: (B, T), 1 where the recorded chunk has a step, 0 where it is padding.
    """
    z, v = interpolate(x, e, t=t)
    prediction, derivative = total_derivative(u, z, v, t=t, r=r)
    target = (v - (t - r).view(-1, 1, 1) * derivative).detach()
    error = squared_error(prediction, target, mask)
    return (adaptive_weight(error) * error).mean()


def rectified_flow_loss(u: Velocity, x: Tensor, e: Tensor, *, t: Tensor,
                        mask: Tensor | None = None) -> Tensor:
    """Return the rectified-flow loss |u(z, t, 0) - v|^2 (Liu et al. 2022, arXiv 2209.03003)."""
    z, v = interpolate(x, e, t=t)
    return squared_error(u(z, t=t, h=torch.zeros_like(t)), v, mask).mean()


def sample(u: Velocity, e: Tensor, *, steps: int, instantaneous: bool = False) -> Tensor:
    """Go from noise e to a chunk in [-1, 1] in `steps` network evaluations (NFE).

    z <- z - u(z, t, 1/N) / N at t = N/N .. 1/N; one step is e - u(e, 1, 1). `instantaneous`
    gives the network h = 0: the Euler steps of a rectified flow. ValueError for steps below 1.
    """
    if steps < 1:
        raise ValueError(f'steps must be at least 1, got {steps}')
    z = e
    for i in range(steps, 0, -1):
        t = torch.full((len(e),), i / steps, device=e.device)
        h = torch.full_like(t, 0.0 if instantaneous else 1 / steps)
        z = z - u(z, t=t, h=h) / steps
    return z.clamp(-1, 1)
