"""The maths against closed forms."""

import math

import pytest
import torch

from meanflow_ros.core import meanflow

torch.set_num_threads(1)

UGLY = (3, 4, 2)


def tensors(*shape, seed=0, count=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) * 1.7 + 0.3
            for _ in range(count)]


def column(values):
    return torch.tensor(values, dtype=torch.float64)


def broadcast(time):
    return time.view(-1, 1, 1)


def linear_field(z, t, h):
    """U = 2z + 3t - 5r."""
    return 2 * z + broadcast(3 * t - 5 * (t - h))


def wavy_field(z, t, h):
    """U = sin(2z) t^3 + z^2 exp(-0.7 r)."""
    r = t - h
    return torch.sin(2 * z) * broadcast(t)**3 + z**2 * torch.exp(-0.7 * broadcast(r))


def to_point(a):
    """Return the exact average velocity when all data is the point `a`: it does not ask for h."""
    return lambda z, t, h: (z - a) / broadcast(t)


def test_the_total_derivative_of_a_linear_field_is_2v_plus_3_exactly():
    z, v = tensors(*UGLY, count=2)
    t, r = column([0.9, 0.37, 1.0]), column([0.123, 0.37, 0.0])
    u, derivative = meanflow.total_derivative(linear_field, z, v, t=t, r=r)
    torch.testing.assert_close(u, 2 * z + broadcast(3 * t - 5 * r), rtol=0, atol=1e-14)
    torch.testing.assert_close(derivative, 2 * v + 3, rtol=0, atol=1e-14)


def test_the_total_derivative_of_a_wavy_field_is_the_analytic_one():
    z, v = tensors(*UGLY, seed=1, count=2)
    t, r = column([0.91, 0.377, 0.5]), column([0.123, 0.377, 0.0])
    _, derivative = meanflow.total_derivative(wavy_field, z, v, t=t, r=r)
    time, start = broadcast(t), broadcast(r)
    along_z = 2 * torch.cos(2 * z) * time**3 + 2 * z * torch.exp(-0.7 * start)
    along_t = 3 * torch.sin(2 * z) * time**2
    torch.testing.assert_close(derivative, along_z * v + along_t, rtol=0, atol=1e-12)


def test_the_path_starts_at_the_action_and_ends_at_the_noise():
    x, e = tensors(*UGLY, seed=2, count=2)
    t = column([0.0, 1.0, 0.31])
    z, v = meanflow.interpolate(x, e, t=t)
    torch.testing.assert_close(z[0], x[0])
    torch.testing.assert_close(z[1], e[1])
    torch.testing.assert_close(z[2], 0.69 * x[2] + 0.31 * e[2])
    torch.testing.assert_close(v, e - x)


def test_the_true_field_of_a_single_target_has_no_loss():
    a, = tensors(4, 2, seed=3)
    e, = tensors(*UGLY, seed=4)
    t, r = column([1.0, 0.83, 0.41]), column([0.0, 0.11, 0.41])
    loss = meanflow.meanflow_loss(to_point(a), a.expand(*UGLY), e, t=t, r=r)
    assert loss.item() < 1e-24
    without_z_term = meanflow.meanflow_loss(
        lambda z, t, h: (z - a) * broadcast(torch.log(t / (t - h).clamp(min=1e-9)) / h),
        a.expand(*UGLY)[:2], e[:2], t=t[:2], r=r[:2])
    assert without_z_term.item() > 0.1


@pytest.mark.parametrize('steps', [1, 2, 4])
def test_every_number_of_steps_lands_on_a_single_target(steps):
    a = tensors(4, 2, seed=5)[0].tanh()
    e, = tensors(*UGLY, seed=6)
    found = meanflow.sample(to_point(a), e, steps=steps)
    torch.testing.assert_close(found, a.expand(*UGLY), rtol=0, atol=1e-6)


def test_r_equal_t_gives_the_weighted_flow_matching_loss():
    x, e = tensors(*UGLY, seed=7, count=2)
    t = column([0.97, 0.03, 0.42])
    z, v = meanflow.interpolate(x, e, t=t)
    error = ((wavy_field(z, t, torch.zeros_like(t)) - v)**2).mean((1, 2))
    loss = meanflow.meanflow_loss(wavy_field, x, e, t=t, r=t)
    torch.testing.assert_close(loss, (error / (error + 0.01)).mean())
    flow = meanflow.rectified_flow_loss(wavy_field, x, e, t=t)
    torch.testing.assert_close(flow, error.mean())


def test_no_gradient_flows_through_target_or_weight():
    """U = k z: prediction k z, D = k v, target v - h k v held fixed, weight 1 / (E + 0.01)."""
    x, e = tensors(*UGLY, seed=8, count=2)
    t, r = column([0.9, 0.61, 1.0]), column([0.2, 0.61, 0.0])
    k = torch.tensor(1.37, dtype=torch.float64, requires_grad=True)
    meanflow.meanflow_loss(lambda z, t, h: k * z, x, e, t=t, r=r).backward()
    with torch.no_grad():
        z, v = broadcast(1 - t) * x + broadcast(t) * e, e - x
        residual = k * z - (v - broadcast(t - r) * k * v)
        weight = 1 / ((residual**2).mean((1, 2)) + 0.01)
        by_hand = (weight * (2 * residual * z).mean((1, 2))).mean()
    torch.testing.assert_close(k.grad, by_hand, rtol=1e-12, atol=0)


@pytest.mark.parametrize('loss', [
    lambda u, x, e, t, r, mask: meanflow.meanflow_loss(u, x, e, t=t, r=r, mask=mask),
    lambda u, x, e, t, r, mask: meanflow.rectified_flow_loss(u, x, e, t=t, mask=mask)])
def test_padded_steps_count_for_nothing(loss):
    x, e = tensors(*UGLY, seed=9, count=2)
    t, r = column([0.9, 0.61, 1.0]), column([0.2, 0.61, 0.0])
    mask = column([[1, 1, 0, 0]]).expand(3, 4)
    spoiled = x.clone()
    spoiled[:, 2:] = 1e3
    kept = loss(wavy_field, x[:, :2], e[:, :2], t, r, None)
    torch.testing.assert_close(loss(wavy_field, spoiled, e, t, r, mask), kept)
    assert loss(wavy_field, spoiled, e, t, r, None) > kept


def test_a_mask_of_another_length_for_each_sample_gives_each_its_own_mean():
    prediction, target = tensors(*UGLY, seed=10, count=2)
    mask = torch.tensor([[1., 1., 1., 1.], [1., 0., 0., 0.], [0., 0., 0., 0.]])
    error = meanflow.squared_error(prediction, target, mask)
    squares = (prediction - target)**2
    torch.testing.assert_close(error, torch.stack([
        squares[0].mean(), squares[1, 0].mean(), torch.zeros((), dtype=torch.float64)]))


def test_the_adaptive_weight_is_the_inverse_power_of_the_error():
    error = column([0.0, 0.37, 5.1]).requires_grad_()
    weight = meanflow.adaptive_weight(error)
    torch.testing.assert_close(weight, column([100.0, 1 / 0.38, 1 / 5.11]))
    assert not weight.requires_grad
    torch.testing.assert_close(meanflow.adaptive_weight(error, eps=0.1, power=0.5),
                               column([0.1**-0.5, 0.47**-0.5, 5.2**-0.5]))


def draw(batch=40_000, seed=0, **settings):
    return meanflow.sample_times(batch, generator=torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize('share', [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize('seed', [0, 1])
def test_times_are_ordered_and_the_share_of_equal_ones_is_as_asked(share, seed):
    t, r = draw(seed=seed, data_proportion=share)
    assert t.shape == r.shape == (40_000,)
    assert (0 <= r).all() and (r <= t).all() and (t <= 1).all()
    assert (t == r).float().mean().item() == pytest.approx(share, abs=0.01)


def test_the_one_step_pair_comes_as_often_as_asked_whatever_the_equal_share():
    t, r = draw(data_proportion=0.75, one_step_proportion=0.13)
    one_step = (t == 1) & (r == 0)
    assert one_step.float().mean().item() == pytest.approx(0.13, abs=0.01)
    assert (t == r).float().mean().item() == pytest.approx(0.75 * 0.87, abs=0.01)
    t, r = draw(data_proportion=0.5)
    assert not ((t == 1) & (r == 0)).any()


@pytest.mark.parametrize('probability', [0.1, 0.5, 0.9])
def test_the_times_are_the_larger_and_the_smaller_of_two_logit_normal_draws(probability):
    """P(max < q) = F(q)^2 and P(min < q) = 1 - (1 - F(q))^2."""
    t, r = draw(data_proportion=0.0, mean=-0.4, std=1.3)
    normal = torch.distributions.Normal(-0.4, 1.3)
    largest = torch.sigmoid(normal.icdf(torch.tensor(math.sqrt(probability))))
    smallest = torch.sigmoid(normal.icdf(torch.tensor(1 - math.sqrt(1 - probability))))
    assert (t < largest).float().mean().item() == pytest.approx(probability, abs=0.01)
    assert (r < smallest).float().mean().item() == pytest.approx(probability, abs=0.01)


def test_a_seeded_generator_repeats_the_times():
    first, again, other = draw(batch=7, seed=3), draw(batch=7, seed=3), draw(batch=7, seed=4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_sample_is_clamped():
    e = torch.tensor([[[7.0, -3.0, 0.25]]])
    found = meanflow.sample(lambda z, t, h: torch.zeros_like(z), e, steps=3)
    assert found.tolist() == [[[1.0, -1.0, 0.25]]]


@pytest.mark.parametrize('steps', [1, 3])
def test_the_sampler_asks_for_the_times_of_its_steps(steps):
    asked = []

    def u(z, t, h):
        asked.append((t.tolist(), h.tolist()))
        return torch.zeros_like(z)

    meanflow.sample(u, torch.zeros(2, 1, 1), steps=steps)
    expected = [([i / steps] * 2, [1 / steps] * 2) for i in range(steps, 0, -1)]
    torch.testing.assert_close(torch.tensor(asked), torch.tensor(expected))
    asked.clear()
    meanflow.sample(u, torch.zeros(2, 1, 1), steps=steps, instantaneous=True)
    assert len(asked) == steps and all(h == [0.0, 0.0] for _, h in asked)


@pytest.mark.parametrize('steps', [1, 2, 4])
def test_the_sampler_maps_a_gaussian_to_a_gaussian(steps):
    """For x ~ N(m, s^2) the flow keeps (z - (1 - t) m) / sqrt((1 - t)^2 s^2 + t^2)."""
    m, s = 0.21, 0.13

    def scale(t):
        return torch.sqrt((1 - t)**2 * s**2 + t**2)

    def u(z, t, h):
        t, r = broadcast(t), broadcast(t - h)
        at_r = (1 - r) * m + scale(r) * (z - (1 - t) * m) / scale(t)
        return (z - at_r) / broadcast(h)

    e = torch.tensor([[[0.0], [1.3], [-2.7]]], dtype=torch.float64)
    found = meanflow.sample(u, e, steps=steps)
    torch.testing.assert_close(found, m + s * e, rtol=0, atol=1e-6)


@pytest.mark.parametrize('steps', [0, -1])
def test_a_sampler_without_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f'steps must be at least 1, got {steps}'):
        meanflow.sample(linear_field, torch.zeros(1, 1, 1), steps=steps)
