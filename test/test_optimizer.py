"""The rate of each step against its formula, and which weights decay."""

import math

import pytest
import torch
import training_rig

from meanflow_ros.training.optimizer import (
    AveragedWeights, freeze, learning_rate, make_optimizer, parameter_groups, set_rate)
from meanflow_ros.training.policy import make_policy

PEAK = 3.7e-4
# The rate rises to step 0.13 * 997 = 129.61, stays to 0.42 * 997 = 418.74, then falls.
UGLY = training_rig.config(steps=997, learning_rate=PEAK, warmup=0.13, hold=0.29,
                           initial_rate=0.07, final_rate=0.011)


@pytest.mark.parametrize('step,share', [
    (0, 0.07), (53, 0.07 + 0.93 * 53 / 129.61), (129, 0.07 + 0.93 * 129 / 129.61),
    (130, 1.0), (418, 1.0),
    (419, 0.011 + 0.989 * math.cos(math.pi / 2 * 0.26 / 578.26)**2),
    (701, 0.011 + 0.989 * math.cos(math.pi / 2 * 282.26 / 578.26)**2),
    (996, 0.011 + 0.989 * math.cos(math.pi / 2 * 577.26 / 578.26)**2), (997, 0.011)])
def test_the_rate_rises_stays_and_falls_as_its_formula_says(step, share):
    assert learning_rate(step, UGLY) == pytest.approx(PEAK * share, rel=1e-9)


@pytest.mark.parametrize('stages,shares', [
    ({'warmup': 0.0, 'hold': 0.0}, [1.0, 0.011 + 0.989 * 0.75, 0.011 + 0.989 * 0.25]),
    ({'warmup': 1.0, 'hold': 0.0}, [0.07, 0.07 + 0.93 / 3, 0.07 + 0.93 * 2 / 3]),
    ({'warmup': 0.0, 'hold': 1.0}, [1.0, 1.0, 1.0])])
def test_a_stage_may_be_missing_or_be_the_whole_run(stages, shares):
    config = training_rig.config(steps=3, learning_rate=PEAK, initial_rate=0.07,
                                 final_rate=0.011, **stages)
    assert [learning_rate(step, config) for step in range(3)] == pytest.approx(
        [PEAK * share for share in shares], rel=1e-9)


@pytest.fixture
def network(data, small_networks):
    return make_policy(training_rig.config(), data).network


def names_of(group, network):
    chosen = {id(parameter) for parameter in group['params']}
    return {name for name, parameter in network.named_parameters() if id(parameter) in chosen}


@pytest.mark.parametrize('frozen,start', [
    ('none', ()), ('vision', 'encoder.vision_tower.'), ('encoder', 'encoder.')])
def test_matrices_decay_and_norms_biases_and_embeddings_do_not(network, frozen, start):
    freeze(network, frozen)
    decayed, free = parameter_groups(network, 0.037)
    assert decayed['weight_decay'] == 0.037 and free['weight_decay'] == 0.0
    assert 'lr' not in decayed and 'lr' not in free
    sizes = {name: parameter.ndim for name, parameter in network.named_parameters()
             if not name.startswith(start)}
    vectors = {name for name, dimensions in sizes.items() if dimensions < 2}
    embeddings = {name for name in sizes if 'embed' in name or name.endswith('null_context')}
    assert vectors and embeddings
    assert names_of(free, network) == vectors | embeddings
    assert names_of(decayed, network) == sizes.keys() - vectors - embeddings
    assert len(decayed['params']) + len(free['params']) == len(sizes)


def test_every_group_gets_the_rate_and_only_matrices_shrink_without_a_gradient(network):
    config = training_rig.config(learning_rate=PEAK, weight_decay=0.3)
    optimizer = make_optimizer(network.requires_grad_(True), config)
    assert [(group['lr'], group['betas'], group['weight_decay'])
            for group in optimizer.param_groups] == [
        (PEAK, (0.9, 0.95), 0.3), (PEAK, (0.9, 0.95), 0.0)]
    set_rate(optimizer, 0.21)
    assert [group['lr'] for group in optimizer.param_groups] == [0.21, 0.21]
    decayed = names_of(optimizer.param_groups[0], network)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in network.named_parameters():
        factor = 1 - 0.21 * 0.3 if name in decayed else 1.0
        torch.testing.assert_close(value.detach(), factor * before[name], rtol=1e-6, atol=0)


def test_the_average_forgets_its_beginning_faster_while_it_is_young():
    weight = torch.nn.Parameter(torch.tensor([2.0, -7.0]))
    average = AveragedWeights([weight], decay=0.3)
    expected = weight.detach().clone()
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        with torch.no_grad():
            weight.add_(1.37)
        expected = decay * expected + (1 - decay) * weight.detach()
        average.update(step)
        torch.testing.assert_close(average.values[0], expected)
    kept = weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(weight.detach(), kept)
