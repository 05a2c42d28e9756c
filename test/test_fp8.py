"""The encoder's layers in fp8: what they give, what they weigh, and what is said without them."""

from unittest import mock

import numpy as np
import pytest
import torch

from meanflow_ros.core import fp8, runtime
from meanflow_ros.core.captured import GraphCache
from meanflow_ros.core.fp8 import Fp8Layers, Fp8Linear, quantised
from meanflow_ros.core.fused import FusedNetwork
from meanflow_ros.core.fused_encoder import ConstantLinear, Placement
from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions
from meanflow_ros.evaluation.bench import subjects
from test_runtime import FakeCapture, LOW, a_policy, normalised, observations, off

torch.set_num_threads(1)
CPU, BFLOAT16 = torch.device('cpu'), torch.bfloat16
ROUNDING, LOWEST = 2**-4, 2**-10   # of a number, and of a row's scale for those near zero
WANTED = RuntimeOptions(dtype=BFLOAT16, fp8=True)


@pytest.fixture(scope='module')
def policy():
    return a_policy()


@pytest.fixture
def anywhere(monkeypatch):
    """Let PyTorch's imitation of fp8 products on a CPU stand for a GPU's."""
    monkeypatch.setattr(fp8, 'why_not', lambda *_: '')


def layer_of(weight, bias=None) -> ConstantLinear:
    return Placement(CPU, BFLOAT16).linear(weight, bias)


# Numbers

def test_what_e4m3_can_say_is_kept_exactly():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    rows = every * 2.0 ** torch.arange(-40, 41)[:, None]     # each with its largest, 448
    values, scales = quantised(rows)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (81, 1)
    assert torch.equal(values.float() * scales, rows)


def test_a_number_is_off_by_no_more_than_e4m3_says():
    torch.manual_seed(0)
    x = torch.randn(64, 300) * 10.0 ** torch.randint(-9, 9, (64, 300))
    values, scales = quantised(x)
    assert ((values.float() * scales - x).abs() <= (
        ROUNDING * x.abs()).maximum(LOWEST * scales) * 1.0001).all()


@pytest.mark.parametrize('size', [0.0, 1e-38, 3e38])
def test_rows_of_zeros_and_of_huge_numbers_give_no_nan(size):
    x = torch.full((3, 32), size, dtype=BFLOAT16)
    x[1] = torch.linspace(-2, 2, 32)                         # beside a row as usual
    values, scales = quantised(x)
    assert torch.isfinite(values.float()).all() and (scales > 0).all()
    layer = Fp8Linear(layer_of(torch.zeros(16, 32), torch.ones(16)), fp8.scaled_within)
    assert torch.equal(layer(x), torch.ones(3, 16, dtype=BFLOAT16))
    layer = Fp8Linear(layer_of(torch.eye(32)), fp8.scaled_within)
    wrong = (layer(x).float() - x.float()).abs()             # nan is no less than anything
    assert (wrong <= 2 * ROUNDING * x.float().abs() + 2 * LOWEST / 448 + fp8.LEAST).all()


# Layers

@pytest.mark.parametrize('product', [fp8.scaled_within, fp8.scaled_afterwards])
@pytest.mark.parametrize('with_bias', [False, True])
def test_a_layer_is_off_float32_by_no_more_than_e4m3_says(product, with_bias):
    torch.manual_seed(1)
    x, weight, bias = torch.randn(2, 7, 96) * 3, torch.randn(48, 96), torch.randn(48)
    x[1] *= torch.randint(-9, 9, (7, 1)).exp2()
    weight *= torch.randint(-9, 9, (48, 1)).exp2()
    x, weight, bias = (value.to(BFLOAT16).float() for value in (x, weight, bias))
    layer = Fp8Linear(layer_of(weight, bias if with_bias else None), product)
    expected = x @ weight.t() + with_bias * bias
    given = layer(x.to(BFLOAT16)).float()
    wrong_x, wrong_weight = ((ROUNDING * value.abs()).maximum(
        LOWEST * value.abs().amax(-1, keepdim=True) / 448) for value in (x, weight))
    bound = (wrong_x @ weight.abs().t() + (x.abs() + wrong_x) @ wrong_weight.t()
             + 2**-7 * expected.abs() + 1e-6)
    assert ((given - expected).abs() <= bound).all()
    relative = (given - expected).norm() / expected.norm()   # sum of rounding that is unalike
    assert 0.01 < relative < 0.08


def test_both_products_give_the_same():
    torch.manual_seed(2)
    layer, x = layer_of(torch.randn(64, 32), torch.randn(64)), torch.randn(11, 32).to(BFLOAT16)
    within, after = (Fp8Linear(layer, product)(x).float()
                     for product in (fp8.scaled_within, fp8.scaled_afterwards))
    assert torch.allclose(within, after, rtol=2**-7, atol=2**-7)


def test_what_stands_around_a_layer_is_as_without_fp8():
    torch.manual_seed(3)
    plain = layer_of(torch.randn(64, 48), torch.randn(64))
    layer, x = Fp8Linear(plain, fp8.scaled_within), torch.randn(2, 5, 48).to(BFLOAT16)
    residual = torch.randn(2, 5, 64).to(BFLOAT16)
    for ours, exact in ((layer.gelu(x), plain.gelu(x)),
                        (layer.onto(residual.clone(), x), plain.onto(residual.clone(), x))):
        assert (ours.float() - exact.float()).norm() < 0.05 * exact.float().norm()
    held = residual.clone()
    assert layer.onto(held, x) is held                       # added in place
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)  # another order in memory
    assert torch.equal(layer(turned), layer(x))


def test_layers_of_other_sizes_stay_as_they_are():
    assert fp8.fits(layer_of(torch.zeros(16, 48)))
    assert not fp8.fits(layer_of(torch.zeros(17, 48)))
    assert not fp8.fits(layer_of(torch.zeros(16, 40)))
    assert not fp8.fits(torch.nn.Linear(16, 16))


def test_the_encoders_weights_take_about_half_the_memory():
    meta = torch.device('meta')
    policy = subjects.random_policy('large', device=meta)
    network = FusedNetwork(policy, Placement(meta, BFLOAT16))

    def weight_of(*parts) -> int:
        return sum(value.nbytes for part in parts for values in (
            part.parameters(), part.buffers()) for value in values)

    encoder, blocks = (network.see, network.read), network.dit.blocks
    before, of_blocks = weight_of(*encoder), weight_of(blocks)
    layers = Fp8Layers(network, fp8.scaled_within, kernels=False)
    assert 0.5 < weight_of(*encoder) / before < 0.53
    assert weight_of(blocks) == of_blocks
    layers.undo()
    assert weight_of(*encoder) == before


# What is there

def test_fp8_is_off_by_default(policy):
    assert not RuntimeOptions().fp8
    fast = FastPolicy(policy)
    fast.warm_up(observations(policy.robot)[0])
    assert fast.why_not_fp8 == 'fp8 was not asked for'


@pytest.mark.parametrize('device, dtype, capability, words', [
    ('cpu', BFLOAT16, None, 'fp8 is for bfloat16 on CUDA, not for torch.bfloat16 on cpu'),
    ('cuda', torch.float32, (9, 0), 'not for torch.float32 on cuda'),
    ('cuda', BFLOAT16, (8, 6), 'fp8 needs compute capability 8.9, this GPU has 8.6'),
    ('cuda', BFLOAT16, (8, 9), ''), ('cuda', BFLOAT16, (12, 0), '')])
def test_where_there_is_no_fp8_the_reason_is_said(device, dtype, capability, words):
    with mock.patch.object(torch.cuda, 'get_device_capability', return_value=capability):
        why = fp8.why_not(torch.device(device), dtype)
    assert words in why and bool(words) == bool(why)


def test_without_fp8_a_policy_goes_on_in_bfloat16(policy):
    fast = FastPolicy(policy, options=WANTED)
    observation = observations(policy.robot)[0]
    fast.warm_up(observation)
    assert fast.why_not_fp8.endswith('not for torch.bfloat16 on cpu')
    assert off(FastPolicy(policy, options=RuntimeOptions(dtype=BFLOAT16)), fast, observation) == 0


def refused(*_):
    raise RuntimeError('CUBLAS_STATUS_NOT_SUPPORTED\nand more')


def test_the_first_product_that_is_right_is_taken(monkeypatch):
    assert fp8.choose(CPU) == (fp8.scaled_within, '')
    monkeypatch.setattr(fp8, 'scaled_within', refused)
    assert fp8.choose(CPU) == (fp8.scaled_afterwards, '')
    right = fp8.scaled_afterwards
    for wrong in (lambda x, of_rows, *rest: right(x, torch.ones_like(of_rows), *rest),
                  lambda *given: right(*given[:-1], None),
                  lambda *given: torch.nan * right(*given)):
        wrong.__name__ = 'other'
        monkeypatch.setattr(fp8, 'scaled_afterwards', wrong)
        assert fp8.choose(CPU) == (None, (
            'there is no fp8 product on cpu: refused: RuntimeError: '
            'CUBLAS_STATUS_NOT_SUPPORTED; other: it is wrong'))


# Policies

@pytest.mark.parametrize('more', [{}, {'compile': True, 'backend': 'eager'}], ids=str)
def test_chunks_in_fp8_are_nearly_those_in_bfloat16(anywhere, more):
    policy = a_policy(max_prefix=2)
    plain, fast = (FastPolicy(policy, options=RuntimeOptions(dtype=BFLOAT16, fp8=wanted, **more))
                   for wanted in (False, True))
    seen = observations(policy.robot, 4)
    assert fast.why_not_fp8 == 'the policy is not warmed up yet'
    assert off(plain, fast, seen[0]) == 0
    fast.warm_up(seen[0])
    assert fast.why_not_fp8 == ''
    assert fast.why_not_compiled == '' or not more
    layers = [part for part in fast.fused.modules() if isinstance(part, Fp8Linear)]
    assert len(layers) == 5 * 2 * 4 + 2 * 4 + 2              # blocks, text, projection, keys
    differences = [off(plain, fast, one, prefix=prefix)
                   for one in seen for prefix in (None, np.tile(LOW, (2, 1)))]
    assert 1e-4 < max(differences) < 0.03
    assert max(off(policy, fast, one) for one in seen) < 0.05
    for a, b in zip(*(p.act_batch(seen, seeds=range(4)) for p in (plain, fast))):
        assert np.abs(normalised(policy, a) - normalised(policy, b)).max() < 0.03


def zeros_in_place_of(product):
    return lambda x, of_rows, *rest: product(x, of_rows, *rest) * (0 if len(x) > 17 else 1)


@pytest.mark.parametrize('wrong, words', [
    (zeros_in_place_of(fp8.scaled_within), 'off'),
    (mock.Mock(side_effect=RuntimeError('illegal instruction')),
     'fp8 failed: RuntimeError: illegal instruction')])
def test_a_product_that_is_wrong_or_fails_is_left_out_and_the_reason_kept(
        policy, anywhere, monkeypatch, wrong, words):
    monkeypatch.setattr(fp8, 'choose', lambda _: (wrong, ''))
    fast = FastPolicy(policy, options=WANTED)
    observation = observations(policy.robot)[0]
    fast.warm_up(observation)
    assert words in fast.why_not_fp8
    assert off(FastPolicy(policy, options=RuntimeOptions(dtype=BFLOAT16)), fast, observation) == 0


def test_a_single_wrong_layer_is_found_where_chunks_hardly_show_it(policy, anywhere, monkeypatch):
    def wrong(x, of_rows, weight, of_channels, bias):
        out = fp8.scaled_within(x, of_rows, weight, of_channels, bias)
        return out * (1.2 if weight.shape == (80, 48) else 1)

    monkeypatch.setattr(fp8, 'choose', lambda _: (wrong, ''))
    monkeypatch.setattr(runtime, 'FP8_TOLERANCE', 99)
    fast = FastPolicy(policy, options=WANTED)
    fast.warm_up(observations(policy.robot)[0])
    assert fast.why_not_fp8.startswith('a layer of (80, 48) was ')


def test_graphs_of_before_are_forgotten_with_the_weights_that_they_read(policy, anywhere):
    fast = FastPolicy(policy, options=WANTED)
    fake = FakeCapture(fast._eager)
    fast._graphs = GraphCache(lambda: fake)
    observation = observations(policy.robot)[0]
    fake.go.set()
    fast.act(observation)
    fast.warm_up(observation)
    fast.warm_up(observation)                                # nothing is due any more
    assert len(fake.captured) == 2 and fast.why_eager == '' and fast.why_not_fp8 == ''
    fast.close()
