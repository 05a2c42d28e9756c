"""Chunks whose first steps are given: the maths, the network, the policy and the training."""

import dataclasses

import numpy as np
import pytest
import torch
import training_rig
from micro_policy import LOWER, UPPER, make_policy
from test_dit import H, T, a_network, inputs
from test_meanflow import UGLY, broadcast, column, tensors, times, wavy_field

from meanflow_ros.core import meanflow
from meanflow_ros.core.contract import Observation
from meanflow_ros.core.meanflow import LOSSES, with_prefix
from meanflow_ros.core.policy import CheckpointError, Policy
from meanflow_ros.core.prefix import checked_prefix
from meanflow_ros.core.times import sample_pairs, sample_single
from meanflow_ros.training import train as train_module
from meanflow_ros.training.draws import Share, draw, draw_prefixes

GIVEN = torch.tensor([[True, True, False, False], [False] * 4, [True, False, False, False]])


def summing_field(z, t, h, rows=None):
    """U = sin(z_1 + .. + z_i) t^3 + 0.3 r: every step sees those before it."""
    return torch.sin(z.cumsum(1)) * broadcast(t)**3 + 0.3 * broadcast(t - h)


def test_a_given_step_is_seen_clean_and_at_rest_whatever_z_holds():
    x, z = tensors(*UGLY, count=2)
    t, h = column([0.9, 0.37, 1.0]), column([0.5, 0.0, 1.0])
    clean = torch.where(GIVEN[..., None], x, z)
    expected = torch.where(GIVEN[..., None], 0.0, summing_field(clean, t, h))
    held = with_prefix(summing_field, x, GIVEN)
    assert torch.equal(held(z, t=t, h=h), expected)
    some = held(z[:2], t=t[:2], h=h[:2], rows=slice(0, 2))
    assert torch.equal(some, expected[:2])


def test_the_derivative_with_a_prefix_is_the_difference_along_a_path_on_which_it_rests():
    x, e = tensors(*UGLY, count=2)
    t, r = column([0.9, 0.37, 0.81]), column([0.5, 0.1, 0.0])
    held = with_prefix(summing_field, x, GIVEN)
    z, v = meanflow.interpolate(x, e, t=t)
    found = meanflow.total_derivative(held, z, v, t=t, r=r)

    def on_path(time):
        moved = meanflow.interpolate(x, torch.where(GIVEN[..., None], x, e), t=time)[0]
        return torch.where(GIVEN[..., None], 0.0, summing_field(moved, time, time - r))

    expected = (on_path(t + 1e-6) - on_path(t - 1e-6)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    moving = meanflow.total_derivative(summing_field, z, v, t=t, r=r)
    assert (found - moving)[0, 2:].abs().max() > 0.1
    central = meanflow.central_derivative(held, z, v, t=t, r=r, step=1e-5)
    torch.testing.assert_close(central, found, rtol=0, atol=1e-7)
    dpm = meanflow.dpm_derivative(held, z, v, t=t, r=r, step=1e-3)
    torch.testing.assert_close(dpm, found, rtol=0, atol=0.02)


@pytest.mark.parametrize('name', LOSSES)
def test_the_noise_of_given_steps_enters_no_loss_and_their_clean_actions_do(name):
    x, e = tensors(*UGLY, seed=9, count=2)
    t, r = column([0.9, 0.61, 1.0]), column([0.2, 0.5, 0.0])
    weights = (~GIVEN[..., None]).double().expand(UGLY)

    def loss(x, e, field):
        return LOSSES[name](with_prefix(field, x, GIVEN), x, e, times(t, r), weights)

    other = torch.where(GIVEN[..., None], e + 3.1, e)
    assert torch.equal(loss(x, e, summing_field), loss(x, other, summing_field))
    changed = torch.where(GIVEN[..., None], x + 0.7, x)
    assert not torch.isclose(loss(x, e, summing_field), loss(changed, e, summing_field))
    torch.testing.assert_close(loss(x, e, wavy_field), loss(changed, e, wavy_field))


def continuing(z, t, h, rows=None):
    """Return the exact average velocity where every later step is a function of the first one."""
    a = torch.sin(1.3 * z[:, :1]) - 0.2
    return (z - a) / broadcast(t)


def a_continuation(prefix):
    """Return chunks (B, 4, 2) in which the first step decides the others."""
    return torch.cat([prefix, (torch.sin(1.3 * prefix) - 0.2).expand(-1, 3, -1)], 1)


FIRST = torch.tensor([[True, False, False, False]])


@pytest.mark.parametrize('name', ['meanflow', 'improved', 'central', 'dpm'])
def test_a_field_that_follows_its_prefix_has_no_loss_with_it_and_much_without(name):
    x = a_continuation(tensors(3, 1, 2)[0])
    e, = tensors(*UGLY, seed=4)
    t, r = column([1.0, 0.83, 0.41]), column([0.0, 0.11, 0.41])
    given = FIRST.expand(3, -1)
    weights = (~given[..., None]).double().expand(UGLY)
    settings = {'step': 1e-4} if name == 'dpm' else {}
    loss = LOSSES[name](with_prefix(continuing, x, given), x, e, times(t, r), weights, **settings)
    assert loss.item() < 1e-5
    assert LOSSES[name](continuing, x, e, times(t, r), weights, **settings).item() > 0.1


@pytest.mark.parametrize('steps', [1, 2, 4])
def test_every_number_of_steps_lands_on_what_continues_the_prefix(steps):
    prefix = tensors(3, 1, 2)[0].tanh()
    x = a_continuation(prefix).clamp(-1, 1)
    e, = tensors(*UGLY, seed=6)
    seen = []

    def u(z, *, t, h, rows=None):
        seen.append(z[:, :1])
        return continuing(z, t, h)

    found = meanflow.sample(with_prefix(u, x, FIRST.expand(3, -1)), e, steps=steps)
    torch.testing.assert_close(found[:, 1:], x[:, 1:], rtol=0, atol=1e-6)
    assert len(seen) == steps and all(torch.equal(each, prefix) for each in seen)


@pytest.mark.parametrize('name', ['meanflow', 'improved', 'central', 'rf', 'l1'])
def test_a_network_learns_to_continue_either_of_two_ways(name):
    """A chunk is all +0.6 or all -0.6; its first step tells which, where it is given."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3 + 3 + 3, 64), torch.nn.Tanh(),
                              torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))

    def field(given):
        def u(z, t, h, rows=None):
            own = given[:len(z)] if rows is None else given[rows]
            return net(torch.cat([z[..., 0], own.float(), t[:, None], h[:, None],
                                  (t * h)[:, None]], -1))[..., None]
        return u

    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(400):
        for group in optimizer.param_groups:
            group['lr'] = 5e-3 * (1 - step / 400)
        x = (0.6 * (2 * torch.randint(2, (128, 1, 1), generator=generator) - 1)).expand(-1, 3, -1)
        given = torch.arange(3) < torch.randint(2, (128, 1), generator=generator)
        draws = (sample_single('uniform', 128, generator) if name in ('rf', 'l1') else
                 sample_pairs('sorted', 128, generator, data_proportion=0.5,
                              one_step_proportion=0.2))
        loss = LOSSES[name](with_prefix(field(given), x, given), x,
                            torch.randn(128, 3, 1, generator=generator), draws,
                            (~given[..., None]).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampler = {'rf': meanflow.sample_euler, 'l1': meanflow.sample_regression}.get(
        name, meanflow.sample)
    x = torch.tensor([0.6, -0.6]).repeat(32).view(64, 1, 1).expand(-1, 3, -1)
    given = torch.tensor([[True, False, False]]).expand(64, -1)
    with torch.no_grad():
        found = sampler(with_prefix(field(given), x, given),
                        torch.randn(64, 3, 1, generator=generator), steps=4 if name == 'rf' else 1)
    assert (found - x)[:, 1:].abs().mean() < 0.15 and (found * x > 0)[:, 1:].all()


# --- the network --------------------------------------------------------------------------------

@pytest.mark.parametrize('h_in', ['none', 'decoder', 'adaln', 'adaln_last_third'])
def test_a_given_step_has_the_time_of_a_clean_action_and_the_others_their_own(h_in):
    network = a_network(h_in=h_in)
    z, context, state = inputs()
    held = network.condition(context, None, state)
    plain = network(z, t=T, h=H, conditioning=held)
    nothing = torch.zeros(z.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(
        network(z, t=T, h=H, conditioning=held, given=nothing), plain)
    zero = torch.zeros(3)
    clean = network(z, t=zero, h=zero, conditioning=held)
    shown = H if h_in == 'decoder' else zero   # h in the decoder alone is that of the sample
    torch.testing.assert_close(
        network(z, t=T, h=shown, conditioning=held, given=~nothing),
        clean if h_in != 'decoder' else network(z, t=zero, h=H, conditioning=held))
    some = nothing.clone()
    some[1, :2] = True
    mixed = network(z, t=T, h=H, conditioning=held, given=some)
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]])
    assert (mixed - plain)[1, 2:].abs().max() > 1e-3


# --- the policy ---------------------------------------------------------------------------------

def a_policy(**changes):
    micro = make_policy()
    return Policy(dataclasses.replace(micro.config, max_prefix=5, **changes), micro.network)


def an_observation(**changes):
    rng = np.random.default_rng(3)
    images = {name: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
              for name in ('static', 'wrist')}
    return Observation(**{'stamp_ns': 1_700_000_000_123_456_789, 'images': images,
                          'instruction': 'push the lever', 'state': [0.31, 0.47, 3.3], **changes})


def a_prefix(steps, seed=0):
    shares = np.random.default_rng(seed).uniform(0.05, 0.9, (steps, 3))
    return LOWER + shares * (UPPER - LOWER)


@pytest.mark.parametrize('nfe', [1, 3])
def test_a_prefix_comes_back_as_it_is_and_the_rest_continues_it(nfe):
    policy, prefix = a_policy(), a_prefix(3)
    chunk = policy.act(an_observation(), steps=nfe, prefix=prefix)
    np.testing.assert_array_equal(chunk.actions[:3], prefix)
    plain = policy.act(an_observation(), steps=nfe)
    other = policy.act(an_observation(), steps=nfe, prefix=a_prefix(3, seed=1))
    span = UPPER - LOWER
    assert (np.abs(chunk.actions - plain.actions)[3:] / span).max() > 1e-3
    assert (np.abs(chunk.actions - other.actions)[3:] / span).max() > 1e-3
    for none in (None, np.array([]), np.zeros((0, 3))):
        again = policy.act(an_observation(), steps=nfe, prefix=none)
        np.testing.assert_array_equal(again.actions, plain.actions)


@pytest.mark.parametrize('nfe', [1, 3])
@pytest.mark.parametrize('relative_to', [(), ('b', '', 'a')])
def test_the_network_sees_the_normalised_prefix_at_every_step(nfe, relative_to):
    policy, prefix = a_policy(relative_to=relative_to), a_prefix(2)
    observation, seen = an_observation(), []
    hook = policy.network.dit.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].clone(), kwargs['given'])),
        with_kwargs=True)
    chunk = policy.act(observation, steps=nfe, prefix=prefix)
    hook.remove()
    np.testing.assert_array_equal(chunk.actions[:2], prefix)
    origin = [0.47, 0.0, 0.31] if relative_to else [0.0, 0.0, 0.0]
    expected = policy.config.action_normalizer.apply(prefix - origin)
    assert len(seen) == nfe
    for z, given in seen:
        np.testing.assert_allclose(z[0, :2].numpy(), expected, atol=1e-6)
        assert given.tolist() == [[True, True] + [False] * 6]


def test_prefixes_of_several_lengths_go_together_as_they_go_alone():
    policy, observation = a_policy(), an_observation()
    prefixes = [a_prefix(3), None, a_prefix(5, seed=2)]
    together = policy.act_batch([observation] * 3, seeds=[4, 5, 6], prefixes=prefixes)
    for chunk, seed, prefix in zip(together, (4, 5, 6), prefixes):
        alone = policy.act(observation, seed=seed, prefix=prefix)
        np.testing.assert_allclose(chunk.actions, alone.actions, rtol=0,
                                   atol=1e-5 * (UPPER - LOWER).max())


@pytest.mark.parametrize('prefix, message', [
    (a_prefix(6), 'has 6 steps, but this checkpoint was trained for at most 5.*--max-prefix 6'),
    (a_prefix(2)[:, :2], r'a prefix is \(n, 3\).*got \(2, 2\)'),
    (a_prefix(1)[0], r'a prefix is \(n, 3\).*got \(3,\)'),
    (np.where(np.arange(6).reshape(2, 3) == 4, np.nan, 0.0), 'not finite'),
    (np.full((2, 3), np.inf), 'not finite')])
def test_a_prefix_that_cannot_be_used_is_refused(prefix, message):
    with pytest.raises(ValueError, match=message):
        a_policy().act(an_observation(), prefix=prefix)


def test_a_network_that_was_not_trained_for_it_takes_no_prefix():
    with pytest.raises(ValueError, match='at most 0'):
        make_policy().act(an_observation(), prefix=a_prefix(1))
    assert checked_prefix(None, make_policy().robot, 0).shape == (0, 3)


def test_the_longest_prefix_travels_with_the_checkpoint_and_is_0_in_older_ones(tmp_path):
    a_policy().save(tmp_path / 'policy')
    path = tmp_path / 'policy' / 'policy.yaml'
    assert Policy.load(tmp_path / 'policy').config.max_prefix == 5
    text = path.read_text()
    path.write_text(text.replace('max_prefix: 5\n', ''))
    assert Policy.load(tmp_path / 'policy').config.max_prefix == 0
    for wrong in ('8', '-1', 'many'):
        path.write_text(text.replace('max_prefix: 5\n', f'max_prefix: {wrong}\n'))
        with pytest.raises(CheckpointError, match='max_prefix'):
            Policy.load(tmp_path / 'policy')


# --- training -----------------------------------------------------------------------------------

def test_half_of_the_samples_have_no_prefix_and_the_others_any_length():
    lengths = draw_prefixes(4, 40_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(lengths, minlength=5) / len(lengths)
    assert shares.tolist() == pytest.approx([0.5, *[0.125] * 4], abs=0.01)


def test_a_prefix_changes_no_other_random_number_and_each_part_gets_its_own():
    plain, with_some = (training_rig.config(max_prefix=longest, batch_size=6, noise_samples=3)
                        for longest in (0, 2))
    before, after = draw(plain, 5, Share()), draw(with_some, 5, Share())
    assert before.prefix is None and 'prefix' not in before.tensors()
    for name, value in before.tensors().items():
        assert torch.equal(value, after.tensors()[name])
    assert after.prefix.shape == (18,) and set(after.prefix.tolist()) == {0, 1, 2}
    part = draw(with_some, 5, Share(index=1, count=2))
    assert torch.equal(part.prefix, after.prefix.view(3, 6)[:, 1::2].flatten())


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return training_rig.make_data(tmp_path_factory.mktemp('prefix'))


def objective(data, spoiled=None, prefix=None, executed=None, **changes):
    """Return the loss of a fixed batch; noise `spoiled`, lengths `prefix`, steps `executed`."""
    settings = training_rig.config(batch_size=6, **changes)
    policy, loss, batch = training_rig.fixed_objective(settings, data)
    ((part, moving),) = train_module.parts_of(batch, settings, 0, training_rig.ALONE)
    if prefix is not None:
        part['prefix'] = torch.full_like(part['prefix'], prefix)
    if executed is not None:
        part['executed'][:, executed] += 0.2
    if spoiled is not None:
        part['e'][:, spoiled] = 7.0
    result = loss(part, moving)
    result.backward()
    return result.item(), policy.config.max_prefix


@pytest.mark.parametrize('name', LOSSES)
def test_the_training_loss_is_of_the_steps_after_the_prefix(data, monkeypatch, name):
    training_rig.make_networks_small(monkeypatch)
    options = {'loss': name, 'max_prefix': 3, 'condition_dropout': 0.4 if name != 'l1' else 0.0,
               'guidance': 1.4 if name != 'l1' else 1.0, 'guidance_mix': 0.2 * (name != 'l1')}
    value, longest = objective(data, prefix=2, **options)
    assert longest == 3 and np.isfinite(value) and value > 0
    assert objective(data, spoiled=slice(0, 2), prefix=2, **options)[0] == value
    if name != 'l1':
        assert objective(data, spoiled=slice(2, 3), prefix=2, **options)[0] != value
    assert objective(data, executed=slice(2, 5), prefix=2, **options)[0] == value
    assert abs(objective(data, executed=slice(1, 2), prefix=2, **options)[0] - value) > 1e-6
    without = objective(data, prefix=0, **options)[0]
    plain = objective(data, **{**options, 'max_prefix': 0})[0]
    assert without == pytest.approx(plain, rel=1e-5) and abs(without - value) > 1e-4


def test_a_checkpoint_can_be_trained_on_with_a_prefix(data, tmp_path, monkeypatch):
    training_rig.make_networks_small(monkeypatch)
    first = training_rig.config(steps=2)
    start = train_module.train(first, data, tmp_path / 'first', training_rig.ALONE)
    on = dataclasses.replace(first, initial=str(start), max_prefix=3)
    policy = Policy.load(train_module.train(on, data, tmp_path / 'on', training_rig.ALONE))
    assert policy.config.max_prefix == 3 and policy.config.training['max_prefix'] == 3
    assert np.isfinite(training_rig.losses_of(tmp_path / 'on')).all()


@pytest.mark.parametrize('longest', [-1, 8])
def test_a_prefix_as_long_as_the_chunk_is_refused(longest):
    with pytest.raises(ValueError, match='max_prefix must be 0 to'):
        training_rig.config(max_prefix=longest)
