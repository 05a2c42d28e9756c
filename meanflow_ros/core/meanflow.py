"""The maths of MeanFlow on one page (Geng et al. 2025, arXiv 2505.13447).

Convention, here and everywhere: t = 1 is noise e, t = 0 is the action chunk x, 0 <= r <= t <= 1,
h = t - r, and on the straight path between them

    z = (1 - t) x + t e            v = dz/dt = e - x    (instantaneous velocity)
    u(z, t, h)                     average velocity over [r, t]
    u = v - h D                    D = (du/dz) v + du/dt  (total derivative, r fixed)

`u` is any callable `u(z, t=(B,), h=(B,), rows=None) -> (B, T, A)`; nothing here knows a network.
With `rows`, a slice, z, t and h are those samples of the batch alone. Tensors: z, x, e, v are
(B, T, A); t, r, h are (B,) float32. Losses take weights (B, T, A), 0 for padded steps, for steps
that are given as a prefix, and for unused dimensions; each returns a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow_ros.core.times import Times

Velocity = Callable[..., Tensor]
Guide = Callable[[Tensor, Tensor, Tensor], Tensor]
Derivative = Callable[..., Tensor]


def _column(time: Tensor) -> Tensor:                               # (B,) -> (B, 1, 1)
    return time.view(-1, 1, 1)


def interpolate(x: Tensor, e: Tensor, *, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point z on the path at time t (B,) and its velocity v."""
    return (1 - _column(t)) * x + _column(t) * e, e - x


def with_prefix(u: Velocity, x: Tensor, given: Tensor) -> Velocity:
    """Return the field in which the steps `given` (B, T) bool of x are known: clean, and at rest.

    Whatever z holds there, u sees x, and says 0. So the tangent of these steps is 0 in every
    derivative, no noise of theirs enters a loss, and no step of a sampler moves them: the hard
    in-painting of training-time real-time chunking (Black et al. 2025, arXiv 2512.05964). `u`
    must know by itself which steps these are.
    """
    given = given[..., None]                                       # (B, T, 1)

    def held(z: Tensor, *, t: Tensor, h: Tensor, rows: slice | None = None) -> Tensor:
        own = slice(None) if rows is None else rows
        seen = torch.where(given[own], x[own], z)
        return torch.where(given[own], 0.0, u(seen, t=t, h=h, rows=rows))

    return held


# --- D, the total derivative of u along the path, for the samples `rows` ------------------------

def total_derivative(u: Velocity, z: Tensor, v: Tensor, *, t: Tensor, r: Tensor,
                     rows: slice | None = None) -> Tensor:
    """Return D = (du/dz) v + du/dt by one JVP along (v, 1, 0).

    Attention inside `u` runs on the math backend: fused kernels have no forward derivative.
    """
    return _jvp(u, z, t, r, rows, (v, torch.ones_like(t), torch.zeros_like(r)))


def partial_t_derivative(u: Velocity, z: Tensor, v: Tensor, *, t: Tensor, r: Tensor,
                         rows: slice | None = None) -> Tensor:
    """Return du/dt alone, the second JVP of the integration guide (tangent 0 for z). Biased.

    It drops (du/dz) v. For a single target a its fixed point is u = (z - a) ln(t / r) / (t - r),
    which diverges as r -> 0; the truth is (z - a) / t. Kept as an ablation.
    """
    return _jvp(u, z, t, r, rows, (torch.zeros_like(v), torch.ones_like(t), torch.zeros_like(r)))


def _jvp(u, z, t, r, rows, tangents) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda z, t, r: u(z, t=t, h=t - r, rows=rows), (z, t, r),
                              tangents)[1]


def improved_derivative(u: Velocity, z: Tensor, v: Tensor, *, t: Tensor, r: Tensor,
                        rows: slice | None = None) -> Tensor:
    """Return D along the predicted velocity u(z, t, 0) in place of v, by one JVP.

    v = e - x is one sample of many that pass through z; the JVP multiplies its variance by h.
    Improved MeanFlow (Geng et al. 2025, arXiv 2512.02012), with the boundary v = u(z, t, t).
    """
    predicted = u(z, t=t, h=torch.zeros_like(t), rows=rows).detach()
    return total_derivative(u, z, predicted, t=t, r=r, rows=rows)


def dpm_derivative(u: Velocity, z: Tensor, v: Tensor, *, t: Tensor, r: Tensor,
                   rows: slice | None = None, step: float = 0.1) -> Tensor:
    """Approximate D by two one-sided differences, as the "DPM-Solver-2" document writes it.

    Backward in t over step * h, and forward in z over 0.01 * step; both first order.
    """
    with _exact(z):
        dt = step * (t - r)
        before = torch.minimum(torch.maximum(t - dt, r), torch.ones_like(t))
        here = u(z, t=t, h=t - r, rows=rows)
        along_t = (here - u(z, t=before, h=before - r, rows=rows)) / _column(dt + 1e-8)
        shift = 0.01 * step
        along_z = (u(z + shift * v, t=t, h=t - r, rows=rows) - here) / shift
        return along_z + along_t


def central_derivative(u: Velocity, z: Tensor, v: Tensor, *, t: Tensor, r: Tensor,
                       rows: slice | None = None, step: float = 5e-3) -> Tensor:
    """Approximate D by one difference along (v, 1, 0), of second order inside [r, 1].

    Both ends stay in [r, 1], so it becomes one-sided at t = 1 and at t = r.
    """
    with _exact(z):
        after, before = (t + step).clamp(max=1), torch.maximum(t - step, r)
        ends = [u(z + _column(end - t) * v, t=end, h=end - r, rows=rows)
                for end in (after, before)]
        return (ends[0] - ends[1]) / _column(after - before).clamp(min=1e-6)


@contextmanager
def _exact(like: Tensor):
    """Compute differences of nearly equal numbers: in full float32, no autocast, no TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(like.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# --- losses -------------------------------------------------------------------------------------

def squared_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return each sample's weighted mean squared error (B,); 0 where all weights are 0."""
    return _weighted_mean((prediction - target) ** 2, weights)


def _weighted_mean(error: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return error.mean((1, 2))
    return (error * weights).sum((1, 2)) / weights.expand_as(error).sum((1, 2)).clamp(min=1e-9)


def adaptive_weight(error: Tensor, eps: float = 0.01, power: float = 1.0, *,
                    stop_gradient: bool = True) -> Tensor:
    """Return (error + eps)^-power for per-sample errors (B,), without gradient by default.

    The errors here are means over steps and dimensions, not sums, so that eps means the same for
    every length of chunk.
    """
    return ((error.detach() if stop_gradient else error) + eps) ** -power


def unguided(z: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Return v: training without guidance."""
    return v


def average_velocity_loss(derivative: Derivative, u: Velocity, x: Tensor, e: Tensor,
                          times: Times, weights: Tensor | None = None, *,
                          guide: Guide = unguided, stop_target: bool = True,
                          stop_weight: bool = True, eps: float = 0.01,
                          power: float = 1.0) -> Tensor:
    """Regress u to v - h D and weight each sample by (error + eps)^-power.

    derivative: how D is found, for the samples with r < t only. guide: gives the velocity that
    stands for v. stop_target, stop_weight: whether target and weight are held constant; without
    that, the gradient also flows through D, and large errors are muted by c / (error + c).
    """
    z, v = interpolate(x, e, t=times.t)
    v = guide(z, v, times.t)
    h = times.t - times.r
    prediction = u(z, t=times.t, h=h)
    target = v
    if times.moving:
        rows = slice(0, times.moving)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_target):
            d = derivative(u, z[rows], v[rows], t=times.t[rows], r=times.r[rows], rows=rows)
        target = torch.cat([v[rows] - _column(h[rows]) * d, v[times.moving:]])
    error = squared_error(prediction, target.detach() if stop_target else target, weights)
    return (adaptive_weight(error, eps, power, stop_gradient=stop_weight) * error).mean()


def meanflow_loss(u, x, e, times, weights=None, **settings) -> Tensor:
    """Return the official loss: D by one JVP, target held (arXiv 2505.13447, algorithm 1)."""
    return average_velocity_loss(total_derivative, u, x, e, times, weights, **settings)


def meanflow_partial_t_loss(u, x, e, times, weights=None, **settings) -> Tensor:
    """Return the integration guide's loss, only du/dt in the target: biased, an ablation."""
    return average_velocity_loss(partial_t_derivative, u, x, e, times, weights, **settings)


def improved_loss(u, x, e, times, weights=None, **settings) -> Tensor:
    """Return the improved loss |u + h stop_gradient(D) - v|^2, D along the predicted velocity."""
    return average_velocity_loss(improved_derivative, u, x, e, times, weights, **settings)


def central_loss(u, x, e, times, weights=None, *, step: float = 5e-3, **settings) -> Tensor:
    """Return the official loss with D by one central difference."""
    def derivative(*arguments, **keywords):
        return central_derivative(*arguments, step=step, **keywords)
    return average_velocity_loss(derivative, u, x, e, times, weights, **settings)


def dpm_loss(u, x, e, times, weights=None, *, step: float = 0.1, stop_target: bool = False,
             stop_weight: bool = False, **settings) -> Tensor:
    """Return the second document's loss: D by its differences, no stop-gradient by default."""
    def derivative(*arguments, **keywords):
        return dpm_derivative(*arguments, step=step, **keywords)
    return average_velocity_loss(derivative, u, x, e, times, weights, stop_target=stop_target,
                                 stop_weight=stop_weight, **settings)


def rectified_flow_loss(u, x, e, times, weights=None, *, guide: Guide = unguided) -> Tensor:
    """Return the rectified-flow loss |u(z, t, 0) - v|^2 (Liu et al. 2022, arXiv 2209.03003)."""
    z, v = interpolate(x, e, t=times.t)
    v = guide(z, v, times.t)
    return squared_error(u(z, t=times.t, h=torch.zeros_like(times.t)), v, weights).mean()


def regression_loss(u, x, e, times, weights=None) -> Tensor:
    """Return |x + u(0, 1, 1)|: direct L1 regression without noise, which averages modes."""
    one = torch.ones_like(times.t)
    return _weighted_mean((x + u(torch.zeros_like(x), t=one, h=one)).abs(), weights).mean()


def dispersive_loss(features: Tensor, temperature: float = 0.5) -> Tensor:
    """Push the features (B, F) of a batch apart: log mean exp(-|f_i - f_j|^2 / (F tau)).

    Wang and He 2025, arXiv 2506.09027, the InfoNCE form without positive pairs.
    """
    features = features.float()
    squares = torch.cdist(features, features).pow(2) / features.shape[1]
    return torch.logsumexp((-squares / temperature).flatten(), 0) - 2 * math.log(len(features))


LOSSES = {'meanflow': meanflow_loss, 'meanflow_partial_t': meanflow_partial_t_loss,
          'dpm': dpm_loss, 'central': central_loss, 'improved': improved_loss,
          'rf': rectified_flow_loss, 'l1': regression_loss}


def guided(u: Velocity, unconditional: Velocity, *, scale: float, mix: float,
           dropped: Tensor) -> Guide:
    """Return the guide v_g = scale v + mix u(z, t, 0 | c) + (1 - scale - mix) u(z, t, 0).

    The classifier-free guidance of arXiv 2505.13447, equation 19: the effective scale is
    scale / (1 - mix). Samples whose condition is `dropped` (B,) bool keep v. The network learns
    the guided field, so that inference costs nothing more.
    """
    @torch.no_grad()
    def guide(z: Tensor, v: Tensor, t: Tensor) -> Tensor:
        zero = torch.zeros_like(t)
        free = unconditional(z, t=t, h=zero)
        mixed = scale * v + (1 - scale - mix) * free
        if mix:
            mixed = mixed + mix * u(z, t=t, h=zero)
        return torch.where(_column(dropped), v, mixed)

    return guide


# --- samplers: from noise e to a chunk in [-1, 1], `steps` network evaluations (NFE) ------------

def sample(u: Velocity, e: Tensor, *, steps: int) -> Tensor:
    """Follow the average velocity: z <- z - u(z, t, 1/N) / N at t = N/N .. 1/N.

    One step is e - u(e, 1, 1). ValueError for steps below 1.
    """
    return _integrate(u, e, steps, h=1 / max(steps, 1))


def sample_euler(u: Velocity, e: Tensor, *, steps: int) -> Tensor:
    """Follow the instantaneous velocity (h = 0) by Euler steps: a rectified flow."""
    return _integrate(u, e, steps, h=0.0)


def sample_regression(u: Velocity, e: Tensor, *, steps: int) -> Tensor:
    """Return -u(0, 1, 1), what `regression_loss` trains; noise and steps change nothing."""
    return _integrate(u, torch.zeros_like(e), 1, h=1.0)


def _integrate(u: Velocity, z: Tensor, steps: int, h: float) -> Tensor:
    if steps < 1:
        raise ValueError(f'steps must be at least 1, got {steps}')
    for i in range(steps, 0, -1):
        t = torch.full((len(z),), i / steps, device=z.device)
        z = z - u(z, t=t, h=torch.full_like(t, h)) / steps
    return z.clamp(-1, 1)


SAMPLERS = {'average': sample, 'euler': sample_euler, 'regression': sample_regression}
