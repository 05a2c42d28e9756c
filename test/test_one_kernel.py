"""The action network as one kernel: what can be checked without a GPU, and on one."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

from meanflow_ros.core import persistent
from meanflow_ros.core.dit import ActionDiT, DiTConfig, dit_preset
from meanflow_ros.core.fused_dit import FusedDiT
from meanflow_ros.core.fused_encoder import Placement

LARGE = persistent.Sizes(width=1024, hidden=2816, decoded=2048, heads=16, blocks=18, rows=10,
                         actions=7)
SOURCE = persistent.SOURCE.read_text()
CUDA = torch.device('cuda', 0)
on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(persistent.why_not(LARGE, CUDA)),
    reason='the kernel is for GPUs like the H100')


def constants(sizes):
    """Evaluate the constants of velocity.cu."""
    known = {name.upper(): value for name, value in dataclasses.asdict(sizes).items()}
    known |= {'WARPS': persistent.WARPS, 'most': max, 'parts': lambda all, size: -(-all // size)}
    for line in re.findall(r'^constexpr int ([^;]+);', SOURCE, re.MULTILINE):
        for name, value in re.findall(r'(\w+) = ((?:[^,()]|\((?:[^()]|\([^()]*\))*\))+)', line):
            known[name] = eval(re.sub('/', '//', value), {}, known)
    return SimpleNamespace(**known)


@pytest.fixture
def hopper(monkeypatch):
    """Pretend to have a GPU on which the kernel can be expected to run."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132,
                                 shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda _: properties)
    monkeypatch.setattr(persistent, 'driver', object())
    return properties


def test_the_kernel_takes_the_arguments_that_it_is_given():
    body = re.search(r'struct Arguments \{(.*?)\n\};', SOURCE, re.DOTALL).group(1)
    body = re.sub(r'//[^\n]*', '', body)
    theirs = [re.sub(r'.*[ *]', '', name.strip()) for statement in body.split(';')
              for name in statement.split(',') if name.strip()]
    assert theirs == [name for name, _ in persistent._Arguments._fields_]


@pytest.mark.parametrize('sizes', [LARGE, dataclasses.replace(
    LARGE, width=512, hidden=1408, decoded=1024, heads=8, blocks=3, rows=14)])
def test_the_place_where_programs_tell_each_other_is_as_large_as_the_kernel_says(sizes):
    known = constants(sizes)
    last = known.SECOND + known.ROWS * known.DECODED + known.HINTS
    assert 2 * last == sizes.exchange
    assert all(getattr(known, name) * 2 % 16 == 0 for name in (
        'ATTENDED', 'X1', 'QUERY_AT', 'CROSSED', 'X2', 'MIDDLE', 'X3', 'OF_BLOCK', 'ENCODED',
        'X0', 'FIRST', 'SECOND', 'STREAM', 'HINTS'))


def test_a_hopper_gpu_runs_the_large_network_as_one_kernel(hopper):
    assert persistent.why_not(LARGE, CUDA) == ''


def test_there_is_room_for_as_many_numbers_of_keys_however_wide_a_head_is():
    assert LARGE.most_keys == 512
    assert dataclasses.replace(LARGE, heads=8).most_keys == 256


@pytest.mark.parametrize('change, why', [
    ({'rows': 15}, 'chunks of 14 steps at most, these have 15'),
    ({'width': 1280, 'heads': 20}, '160 multiprocessors, there are 132'),
    ({'heads': 32}, 'not for sizes as these'),
    ({'hidden': 2824}, 'not for sizes as these')])
def test_sizes_that_the_kernel_does_not_take_are_told(hopper, change, why):
    assert why in persistent.why_not(dataclasses.replace(LARGE, **change), CUDA)


def test_a_smaller_or_older_gpu_and_missing_bindings_are_told(hopper, monkeypatch):
    hopper.shared_memory_per_block_optin = 101376
    assert 'shared memory, there are 101376' in persistent.why_not(LARGE, CUDA)
    hopper.major = 8
    assert 'compute capability 9' in persistent.why_not(LARGE, CUDA)
    assert 'is for CUDA' in persistent.why_not(LARGE, torch.device('cpu'))
    monkeypatch.setattr(persistent, 'driver', None)
    assert 'pip install cuda-bindings' in persistent.why_not(LARGE, CUDA)


def networks(config, horizon):
    """Return a network in float32 by PyTorch, in bfloat16 by PyTorch, and as one kernel."""
    with CUDA:
        torch.manual_seed(0)
        dit = ActionDiT(config, 96).eval()
        for value in dit.state_dict().values():
            if value.is_floating_point() and not value.any():
                value.normal_(0, 0.1)
    made = [FusedDiT(dit, 'a', horizon, Placement(CUDA, dtype, kernels=kernels)) for dtype, kernels
            in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))]
    assert made[2].why_apart == ''
    return made


def conditioned(network, context, state, bias, given):
    """Return z -> velocity for a context."""
    dtype = network.place.dtype
    schedule = network.schedule([(0.7, 0.3)])
    keys, values = network.laid_out(*network.keys_and_values(context.to(dtype)))
    if not network.why_apart:   # what lies between rows is nobody's
        keys[..., -32:], values[..., -8:] = torch.nan, torch.nan
    modulation, clean = network.modulations(schedule, state)
    bias = None if bias is None else bias.to(dtype)
    given = None if given is None else (given, clean)
    return lambda z: network.velocity(z, modulation, schedule.offsets[0], keys, values, bias,
                                      given)


@on_a_gpu
@pytest.mark.parametrize('width, heads, depth, horizon, actions, states, count, padded, given', [
    (1024, 16, 3, 10, 7, 7, 128, 15, 0), (1024, 16, 2, 10, 7, 7, 96, 0, 3),
    (1024, 8, 2, 14, 16, 0, 256, 5, 14), (512, 8, 2, 1, 1, 2, 192, 0, 0),
    (768, 12, 2, 8, 8, 3, 512, 100, 1)])
def test_one_kernel_is_as_near_to_float32_as_pytorch_in_bfloat16_is(
        width, heads, depth, horizon, actions, states, count, padded, given):
    config = DiTConfig(width=width, heads=heads, depth=depth, adaln_rank=32,
                       action_spaces={'a': actions}, state_sizes={'a': states} if states else {})
    with torch.inference_mode():
        made = networks(config, horizon)
        z = torch.randn(1, horizon, actions, device=CUDA)
        context = torch.randn(1, count, 96, device=CUDA)
        state = torch.rand(1, states, device=CUDA) if states else None
        bias = torch.zeros(1, 1, 1, count, device=CUDA) if padded else None
        if padded:
            bias[..., -padded:] = -torch.inf
        steps = torch.arange(horizon, device=CUDA)[None] < given if given else None
        *_, run = runs = [conditioned(network, context, state, bias, steps) for network in made]
        exact, rounded, ours = (of(z) for of in runs)
        assert (ours - exact).norm() < 1.3 * (rounded - exact).norm()
        for _ in range(50):
            assert torch.equal(run(z), ours)


@on_a_gpu
def test_a_captured_kernel_gives_the_same_bits_again():
    with torch.inference_mode():
        *_, fast = networks(dataclasses.replace(dit_preset('large', {'a': 7}, {}), depth=3), 10)
        z, context = torch.randn(1, 10, 7, device=CUDA), torch.randn(1, 64, 96, device=CUDA)
        run = conditioned(fast, context, None, None, None)
        expected, graph = run(z), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(z)
        for _ in range(200):
            found.fill_(torch.nan)
            graph.replay()
            assert torch.equal(found, expected)
