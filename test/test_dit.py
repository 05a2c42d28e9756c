"""The action network: routing, masks, derivatives, and h = 0."""

import dataclasses

import pytest
import torch

from meanflow_ros.core import meanflow
from meanflow_ros.core.dit import (
    FLOWER_ACTION_SPACES, H_PLACES, ActionDiT, DiTConfig, MeanFlowDecoder, TimeEmbedder,
    VelocityDecoder, dit_preset)

torch.set_num_threads(1)

CONTEXT, STEPS, TOKENS = 20, 5, 7
STATES = {'joint_single': 3, 'bimanual_nav': 11}   # eef_delta has none


def a_config(**changes):
    return DiTConfig(**{'width': 24, 'depth': 3, 'heads': 2, 'adaln_rank': 8, 'dropout': 0.1,
                        'action_spaces': {'eef': 5}, 'state_sizes': {'eef': 3}, **changes})


def a_network(seed=0, **changes):
    """Return a network whose every weight is random, also those that start as zero."""
    torch.manual_seed(seed)
    network = ActionDiT(a_config(**changes), CONTEXT)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.13)
    return network.eval().requires_grad_(False)


def inputs(batch=3, size=5, state=3, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * 1.3 + 0.2

    return draw(batch, STEPS, size), draw(batch, TOKENS, CONTEXT), draw(batch, state)


T, H = torch.tensor([0.93, 0.41, 0.07]), torch.tensor([0.61, 0.0, 0.07])


@pytest.mark.parametrize('max_frequency', [10.0, 1000.0])
def test_the_velocity_decoder_is_the_meanflow_decoder_at_h_zero(max_frequency):
    torch.manual_seed(3)
    average = MeanFlowDecoder(24, 7, max_frequency)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    instantaneous = VelocityDecoder.from_meanflow(average)
    features = torch.randn(3, STEPS, 24) * 2.1 - 0.4
    at_zero = average(features, torch.zeros(3))
    torch.testing.assert_close(instantaneous(features, torch.zeros(3)), at_zero,
                               rtol=1e-4, atol=1e-5)
    later = average(features, torch.tensor([0.013, 0.4, 1.0]))
    assert ((later - at_zero).abs().amax((1, 2)) > 1e-3).all()


def test_a_rectified_flow_network_with_converted_decoders_equals_the_meanflow_one_at_h_zero():
    network = a_network(h_in='decoder')
    plain = ActionDiT(dataclasses.replace(network.config, h_in='none'), CONTEXT)
    plain.action_decoders['eef'] = VelocityDecoder.from_meanflow(network.action_decoders['eef'])
    weights = {name: value for name, value in network.state_dict().items()
               if not name.startswith('action_decoders')}
    assert plain.load_state_dict(weights, strict=False).unexpected_keys == []
    plain.eval()
    z, context, state = inputs()
    found = [net(z, t=T, h=h, conditioning=net.condition(context, None, state))
             for net, h in ((network, torch.zeros(3)), (plain, torch.zeros(3)), (network, H))]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert (found[2] - found[0])[0].abs().max() > 1e-3


@pytest.mark.parametrize('h_in', H_PLACES)
def test_h_matters_unless_it_enters_nowhere(h_in):
    network = a_network(h_in=h_in)
    z, context, state = inputs()
    conditioning = network.condition(context, None, state)
    near, far = (network(z, t=T, h=torch.full((3,), h), conditioning=conditioning)
                 for h in (0.0, 0.7))
    assert (near == far).all() if h_in == 'none' else ((near - far).abs() > 1e-4).all()


def test_t_matters():
    network = a_network(h_in='none')
    z, context, state = inputs()
    conditioning = network.condition(context, None, state)
    first = network(z, t=T, h=H, conditioning=conditioning)
    assert ((network(z, t=T + 0.05, h=H, conditioning=conditioning) - first).abs() > 1e-5).all()


@pytest.mark.parametrize('h_in', H_PLACES)
def test_a_mixed_batch_equals_its_parts(h_in):
    network = a_network(action_spaces=FLOWER_ACTION_SPACES, state_sizes=STATES, h_in=h_in)
    names = list(FLOWER_ACTION_SPACES)
    space = torch.tensor([2, 0, 1, 0, 2])
    z, context, state = inputs(batch=5, size=16, state=11)
    t, h = torch.tensor([0.9, 0.5, 0.3, 0.8, 1.0]), torch.tensor([0.2, 0.5, 0.0, 0.7, 1.0])
    mask = torch.ones(5, TOKENS, dtype=torch.bool)
    mask[1, 4:] = False
    mixed = network(z, t=t, h=h, conditioning=network.condition(context, mask, state, space))
    assert mixed.shape == (5, STEPS, 16)
    for i, index in enumerate(space.tolist()):
        name, size = names[index], FLOWER_ACTION_SPACES[names[index]]
        # alone: a network that knows this action space only, fed with its own sizes
        alone = ActionDiT(dataclasses.replace(
            network.config, action_spaces={name: size},
            state_sizes={name: STATES[name]} if name in STATES else {}), CONTEXT)
        alone.load_state_dict({key: value for key, value in network.state_dict().items()
                               if key in alone.state_dict()})
        alone.eval()
        one = slice(i, i + 1)
        own = alone(z[one, :, :size], t=t[one], h=h[one], conditioning=alone.condition(
            context[one], mask[one], state[one, :STATES[name]] if name in STATES else None))
        torch.testing.assert_close(mixed[one, :, :size], own, rtol=1e-4, atol=1e-5)
        assert own.abs().min() > 0
        assert (mixed[i, :, size:] == 0).all()


def test_the_space_of_each_sample_is_asked_for_when_there_are_several():
    network = a_network(action_spaces=FLOWER_ACTION_SPACES, state_sizes={})
    with pytest.raises(ValueError, match='space is required: the network has 3 action spaces'):
        network.condition(inputs()[1])


def test_a_missing_state_is_refused():
    with pytest.raises(ValueError, match='state is required'):
        a_network().condition(inputs()[1])


@pytest.mark.parametrize('changed', range(STEPS))
def test_a_step_does_not_change_the_steps_before_it(changed):
    network = a_network()
    z, context, state = inputs()
    conditioning = network.condition(context, None, state)
    before = network(z, t=T, h=H, conditioning=conditioning)
    other = z.clone()
    other[:, changed] += 0.7
    after = network(other, t=T, h=H, conditioning=conditioning)
    moved = (after - before).abs().amax(-1)                        # (B, T)
    assert (moved[:, :changed] < 1e-6).all()
    assert (moved[:, changed:] > 1e-5).all()


def test_the_order_of_the_steps_is_seen():
    network = a_network()
    z, context, state = inputs()
    z[:, :] = z[:, :1]
    velocity = network(z, t=T, h=H, conditioning=network.condition(context, None, state))
    swapped = z.clone()
    swapped[:, 0] += 1.0
    other = z.clone()
    other[:, 1] += 1.0
    conditioning = network.condition(context, None, state)
    assert (velocity[:, 0] - velocity[:, 1]).abs().max() < 1e-5    # equal tokens so far
    a, b = (network(x, t=T, h=H, conditioning=conditioning)[:, 2] for x in (swapped, other))
    assert (a - b).abs().max() > 1e-4


def test_keys_and_values_computed_once_equal_those_recomputed():
    network = a_network()
    z, context, state = inputs()
    mask = torch.tensor([[True] * TOKENS, [True] * 4 + [False] * 3, [True] * 6 + [False]])
    held = network.condition(context, mask, state)
    for t, h in ((T, H), (T * 0.5, H * 0.1)):
        fresh = network(z, t=t, h=h, conditioning=network.condition(context, mask, state))
        assert torch.equal(network(z, t=t, h=h, conditioning=held), fresh)
    pick = torch.tensor([2, 0, 2])
    torch.testing.assert_close(
        network(z[pick], t=T[pick], h=H[pick], conditioning=held.select(pick)),
        network(z, t=T, h=H, conditioning=held)[pick], rtol=1e-5, atol=1e-6)


def test_padded_context_changes_nothing():
    network = a_network()
    z, context, state = inputs()
    mask = torch.tensor([[True] * TOKENS + [False] * 2] * 3)
    plain = network(z, t=T, h=H, conditioning=network.condition(context, None, state))
    for padding in (0.0, 57.3):
        padded = torch.cat([context, torch.full((3, 2, CONTEXT), padding)], 1)
        found = network(z, t=T, h=H, conditioning=network.condition(padded, mask, state))
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    unmasked = network(z, t=T, h=H, conditioning=network.condition(padded, None, state))
    assert (unmasked - plain).abs().max() > 1e-3


def test_a_repeated_conditioning_is_the_selected_one_and_has_its_gradient():
    network = a_network().requires_grad_(True)
    z, context, state = inputs()
    index = torch.arange(len(z)).repeat(3)
    gradients = []
    for change in (lambda held: held.repeat(3), lambda held: held.select(index)):
        network.zero_grad()
        held = change(network.condition(context, None, state))
        network(z[index], t=T[index], h=H[index], conditioning=held).square().sum().backward()
        gradients.append(network.context_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize('h_in', ['decoder', 'adaln', 'adaln_last_third'])
def test_the_derivative_of_the_whole_network_is_the_central_difference(h_in):
    network = a_network(h_in=h_in)
    z, context, state = inputs()
    v = inputs(seed=5)[0]
    r = T - H
    conditioning = network.condition(context, None, state)
    derivative = meanflow.total_derivative(
        lambda z, t, h, rows: network(z, t=t, h=h, conditioning=conditioning), z, v, t=T, r=r)

    exact = a_network(h_in=h_in).double()
    for module in exact.modules():   # time paths are float32 by design; here they are not
        if isinstance(module, TimeEmbedder):
            module.forward = lambda time, m=module: m.mlp(torch.cat(
                [(time[:, None] * m.frequency).cos(), (time[:, None] * m.frequency).sin()], -1))
    held = exact.condition(context.double(), None, state.double())
    held = dataclasses.replace(held, state=_Float64(held.state))

    def along_path(step):
        t = T.double() + step
        return exact(z.double() + step * v.double(), t=t, h=t - r.double(), conditioning=held)

    difference = (along_path(1e-5) - along_path(-1e-5)) / 2e-5
    torch.testing.assert_close(derivative.double(), difference, rtol=2e-3, atol=2e-3)
    assert difference.abs().max() > 0.1


class _Float64:
    """A tensor that stays in float64 when the network asks for float32."""

    def __init__(self, value):
        self.value = value

    def float(self):
        return self.value


@pytest.mark.parametrize('depth, blind', [(3, 2), (6, 4), (7, 5)])
def test_h_in_the_last_third_leaves_the_first_two_thirds_blind(depth, blind):
    network = a_network(h_in='adaln_last_third', depth=depth)
    signals = []
    for block in network.blocks:
        block.register_forward_hook(
            lambda module, args, result: signals.append(torch.cat(args[1:3], -1)))
    z, context, state = inputs()
    conditioning = network.condition(context, None, state)
    network(z, t=T, h=torch.zeros(3), conditioning=conditioning)
    network(z, t=T, h=torch.ones(3), conditioning=conditioning)
    for part in (slice(0, 24), slice(24, None)):   # the signal itself, and the shared AdaLN of it
        same = [torch.equal(a[..., part], b[..., part])
                for a, b in zip(signals[:depth], signals[depth:])]
        assert same == [True] * blind + [False] * (depth - blind)


def test_a_new_network_starts_at_zero_velocity():
    network = ActionDiT(a_config(), CONTEXT).eval()
    z, context, state = inputs()
    velocity = network(z, t=T, h=H, conditioning=network.condition(context, None, state))
    assert (velocity == 0).all() and velocity.shape == (3, STEPS, 5)


@pytest.mark.parametrize('max_frequency', [10.0, 1000.0])
def test_the_time_embedding_stays_float32_under_autocast(max_frequency):
    torch.manual_seed(0)
    embedder = TimeEmbedder(24, max_frequency)
    time = torch.tensor([0.123456, 0.1239, 1.0])
    plain = embedder(time)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.bfloat16
        found = embedder(time)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)


def test_the_network_runs_under_autocast_and_returns_the_type_of_z():
    network = a_network()
    z, context, state = inputs()
    plain = network(z, t=T, h=H, conditioning=network.condition(context, None, state))
    with torch.autocast('cpu', torch.bfloat16):
        found = network(z, t=T, h=H, conditioning=network.condition(context, None, state))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0.1, atol=0.1 * plain.abs().max().item())


@pytest.mark.parametrize('changes, message', [
    ({'width': 25}, 'width must be a multiple of 2 \\* heads, got width 25 and heads 2'),
    ({'width': 0}, 'width must be'), ({'width': 22, 'heads': 2}, 'width must be'),
    ({'heads': 0}, 'heads must be at least 1, got 0'),
    ({'depth': 0}, 'depth must be at least 1, got 0'),
    ({'adaln_rank': 0}, 'adaln_rank must be at least 1'),
    ({'dropout': 1.0}, r'dropout must be in \[0, 1\), got 1.0'),
    ({'dropout': float('nan')}, 'dropout must be'),
    ({'max_frequency': 0.0}, 'max_frequency must be finite and above 0'),
    ({'max_frequency': float('inf')}, 'max_frequency must be'),
    ({'rope_theta': float('nan')}, 'rope_theta must be finite and above 0'),
    ({'h_in': 'Decoder'}, "h_in must be one of .*'decoder'.*, got 'Decoder'"),
    ({'action_spaces': {}}, 'action_spaces must name at least one space'),
    ({'action_spaces': {'eef': 0}}, "action_spaces must .* got {'eef': 0}"),
    ({'state_sizes': {'joint': 3}}, r"state_sizes names unknown action spaces \['joint'\]"),
])
def test_a_bad_config_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        a_config(**changes)


def test_the_large_preset_has_the_size_of_flower():
    config = dit_preset('large', FLOWER_ACTION_SPACES, {})
    assert (config.depth, config.width, config.heads) == (18, 1024, 16)
    assert dict(config.action_spaces) == {'joint_single': 8, 'eef_delta': 7, 'bimanual_nav': 16}
    with torch.device('meta'):
        network = ActionDiT(config, 1024)
    assert len(network.blocks) == 18 and network.action_size == 16


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of \['large', 'tiny'\], got 'huge'"):
        dit_preset('huge', {'eef': 5}, {})
