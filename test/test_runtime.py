"""FastPolicy gives Policy's chunks, and holds no more than it says."""

import dataclasses
import os
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import micro_policy
from meanflow_ros.core import encoder_kernels, kernels, runtime
from meanflow_ros.core.captured import GraphCache, Replay, Request, StaticAct
from meanflow_ros.core.compiled import keep_compiled_in, users_cache
from meanflow_ros.core.contract import ActionSpace, CameraSpec, Observation, RobotSpec
from meanflow_ros.core.dit import DiTConfig
from meanflow_ros.core.fused_encoder import ActivatedLinear
from meanflow_ros.core.encoder import EncoderConfig, train_tokenizer
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import Policy, PolicyConfig
from meanflow_ros.core.runtime import FastPolicy, Recent, RuntimeOptions

torch.set_num_threads(1)

SHIPPED = Path(__file__).resolve().parents[1] / 'resource' / 'default_policy'
LOW, HIGH = np.array([-0.37, -41.3, 0.0021]), np.array([0.91, 17.9, 0.0133])
SIZES = ((30, 40), (64, 64), (61, 83), (17, 90))     # height and width, by camera


def a_policy(*, cameras=2, h_in='decoder', states=2, sampler='average', sizes=SIZES,
             spaces=('odd',), max_prefix=0) -> Policy:
    """Return `large` with small sizes and random weights: windows of 12 on grids of 16 to 2."""
    tokenizer = train_tokenizer(['push the lever', 'pull the lever'], 270)
    names = tuple(f'joint_{i}' for i in range(states))
    robot = RobotSpec(
        robot='small', state_names=names, horizon=7, period_s=0.1, first_step=2,
        cameras=tuple(CameraSpec(name=f'camera_{i}', height=height, width=width)
                      for i, (height, width) in enumerate(sizes[:cameras])),
        action_space=ActionSpace(name='odd', dimensions=('slide', 'swivel', 'pinch'),
                                 units=('m', 'deg', 'm'), lower=LOW - 0.1, upper=HIGH + 0.1))
    config = PolicyConfig(
        robot=robot, prompt='Task: {instruction}.',
        action_normalizer=Normalizer(low=LOW, high=HIGH),
        state_normalizer=(Normalizer(low=[-1.7, 0.3, 2.0][:states], high=[2.9, 0.8, 31.0][:states])
                          if states else None),
        encoder=EncoderConfig(
            image_size=64, token_dropout=0.0,
            vision={'embed_dim': [16, 32, 32, 64], 'depths': [1, 1, 2, 1],
                    'num_heads': [1, 2, 2, 4], 'num_groups': [1, 2, 2, 4],
                    'projection_dim': 48},
            text={'vocab_size': tokenizer.get_vocab_size(), 'd_model': 48, 'encoder_layers': 2,
                  'encoder_attention_heads': 3, 'encoder_ffn_dim': 80,
                  'max_position_embeddings': 160}),
        dit=DiTConfig(width=64, depth=3, heads=4, adaln_rank=5, h_in=h_in, max_frequency=11.0,
                      action_spaces={name: 3 if name == 'odd' else 5 for name in spaces},
                      state_sizes={'odd': states} if states else {}),
        sampler=sampler, sampler_steps=2, max_prefix=max_prefix)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        policy = Policy.create(config, tokenizer)
        for value in policy.network.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:     # norms and biases: 1 and 0
                value.add_(torch.randn_like(value) * 0.2)
            elif value.is_floating_point() and not value.any():   # gates and outputs begin as 0
                value.normal_(0.0, 0.2)
    return policy


def observations(robot, count=1, *, sizes=None, seed=0):
    random = np.random.default_rng(seed)
    texts = 'push the lever', 'pull', 'turn the big red wheel as far as it goes', 'press'
    cameras = [(c.name, (c.height, c.width)) for c in robot.cameras]
    return [Observation(
        stamp_ns=1_700_000_000_123_456_789 + 31 * number, instruction=texts[number % 4],
        state=random.uniform(-1.3, 2.1, len(robot.state_names)),
        images={name: random.integers(0, 256, (*(sizes or size), 3), np.uint8)
                for name, size in cameras}) for number in range(count)]


def normalised(policy, chunk):
    normalizer = policy.config.action_normalizer
    return (chunk.actions - normalizer.low) / (normalizer.high - normalizer.low) * 2 - 1


def off(policy, fast, observation, **given):
    a, b = (normalised(policy, p.act(observation, **given)) for p in (policy, fast))
    return np.abs(a - b).max()


@pytest.fixture(scope='module')
def policy():
    return a_policy()


@pytest.fixture(scope='module')
def fast(policy):
    return FastPolicy(policy)


# The same chunks

@pytest.mark.parametrize('given', [
    {}, {'cameras': 1, 'h_in': 'none', 'sampler': 'euler'}, {'cameras': 4, 'states': 3},
    {'states': 0, 'h_in': 'adaln'}, {'h_in': 'adaln_last_third'},
    {'h_in': 'adaln_last_third', 'states': 0, 'cameras': 3}, {'spaces': ('wide', 'odd')},
    {'sampler': 'regression', 'h_in': 'none'}], ids=str)
def test_chunks_are_those_of_the_policy(given):
    policy = a_policy(**given)
    fast = FastPolicy(policy)
    one, other = observations(policy.robot, 2)
    for steps in (1, 2, 3, 4):
        assert off(policy, fast, one, steps=steps) < 1e-5
    assert off(policy, fast, other) < 1e-5
    moved = normalised(policy, policy.act(one)) - policy.noise(one.stamp_ns, 0)[0, :, :3].numpy()
    assert np.abs(moved).mean() > 0.05   # the network does something


@pytest.mark.parametrize('make', [a_policy, micro_policy.make_policy])
def test_a_batch_of_mixed_prompts_equals_the_policys(make):
    policy = make()
    fast, seen = FastPolicy(policy), observations(policy.robot, 4)
    theirs = policy.act_batch(seen, seeds=[3, 1, 4, 1], steps=2)
    ours = fast.act_batch(seen, seeds=[3, 1, 4, 1], steps=2)
    for a, b, observation in zip(theirs, ours, seen):
        assert np.abs(normalised(policy, a) - normalised(policy, b)).max() < 1e-5
        assert (a.stamp_ns, a.period_s, a.first_step) == (b.stamp_ns, b.period_s, b.first_step)
        assert b.stamp_ns == observation.stamp_ns


@pytest.mark.parametrize('given', [
    {}, {'states': 0, 'h_in': 'adaln_last_third'}, {'h_in': 'none', 'sampler': 'euler'}], ids=str)
def test_a_prefix_is_continued_as_by_the_policy(given):
    policy = a_policy(max_prefix=3, **given)
    fast, seen = FastPolicy(policy), observations(policy.robot, 3)
    prefix = LOW + (HIGH - LOW) * [[0.31, 0.72, 0.11], [0.45, 0.7, 0.9], [0.1, 0.2, 0.77]]
    for steps in (1, 3):
        assert off(policy, fast, seen[0], prefix=prefix, steps=steps) < 1e-5
        assert off(policy, fast, seen[0], prefix=prefix[:1], steps=steps) < 1e-5
    prefixes = [None, prefix[:2], prefix]
    theirs, ours = (p.act_batch(seen, seeds=[0, 1, 2], prefixes=prefixes) for p in (policy, fast))
    for a, b in zip(theirs, ours):
        assert np.abs(normalised(policy, a) - normalised(policy, b)).max() < 1e-5
    assert np.array_equal(ours[2].actions[:3], prefix)
    assert off(policy, fast, seen[0], steps=3) < 1e-5   # and without one afterwards


def test_a_prefix_of_a_network_that_takes_none_is_refused(fast):
    with pytest.raises(ValueError, match='trained for at most 0'):
        fast.act(observations(fast.robot)[0], prefix=np.tile(LOW, (1, 1)))


@pytest.mark.parametrize('size', [(64, 64), (33, 130), (200, 71)])
def test_pictures_of_any_size_give_the_policys_chunk(policy, fast, size):
    assert off(policy, fast, observations(policy.robot, sizes=size)[0]) < 1e-5


@pytest.mark.parametrize('lengths', [(24, 40), (64,), (8,)])
def test_padding_the_prompt_changes_nothing(policy, lengths):
    padded = FastPolicy(policy, options=RuntimeOptions(lengths=lengths))
    for observation in observations(policy.robot, 4):
        assert off(policy, padded, observation) < 1e-5


def test_bfloat16_gives_nearly_the_same_chunk(policy):
    fast = FastPolicy(policy, options=RuntimeOptions(dtype=torch.bfloat16))
    differences = [off(policy, fast, observation) for observation in observations(policy.robot, 4)]
    assert 1e-6 < max(differences) < 0.05


def test_the_policy_that_it_is_made_from_is_not_changed(policy):
    before = {name: value.clone() for name, value in policy.network.state_dict().items()}
    FastPolicy(policy, options=RuntimeOptions(dtype=torch.bfloat16)).act(
        observations(policy.robot)[0])
    assert all(torch.equal(before[name], value) and value.dtype == before[name].dtype
               for name, value in policy.network.state_dict().items())


def test_nothing_of_the_policy_that_it_is_made_from_is_used_later():
    policy = a_policy(h_in='adaln_last_third')
    fast, observation = FastPolicy(policy), observations(policy.robot)[0]
    expected = FastPolicy(policy).act(observation, steps=3).actions
    for value in policy.network.state_dict().values():
        value.zero_()
    np.testing.assert_array_equal(fast.act(observation, steps=3).actions, expected)


def test_the_noise_that_is_given_is_where_the_flow_starts(policy, fast):
    observation, noise = observations(policy.robot)[0], torch.randn(1, 7, 3) * 0.31
    assert off(policy, fast, observation, noise=noise, steps=3) < 1e-5
    assert not np.array_equal(fast.act(observation, noise=noise).actions,
                              fast.act(observation, noise=-noise).actions)


def test_the_same_seed_gives_the_same_bits_and_another_another_chunk(fast):
    observation = observations(fast.robot)[0]
    first = fast.act(observation, seed=5).actions
    fast.act(observation, seed=6, steps=3)
    assert np.array_equal(first, fast.act(observation, seed=5).actions)
    assert not np.array_equal(first, fast.act(observation, seed=6).actions)


# Refusals

@pytest.mark.parametrize('given, words', [
    ({'images': {}}, "no picture of camera 'camera_0'"),
    ({'state': None}, r"2 states \['joint_0', 'joint_1'\], got None"),
    ({'state': np.zeros(3)}, r'2 states .*got \(3,\)')])
def test_a_wrong_observation_is_refused_as_by_the_policy(policy, fast, given, words):
    observation = dataclasses.replace(observations(policy.robot)[0], **given)
    for act in (policy.act, fast.act):
        with pytest.raises(ValueError, match=words):
            act(observation)


def test_a_number_of_steps_below_one_is_refused(fast):
    with pytest.raises(ValueError, match='steps must be at least 1, got -2'):
        fast.act(observations(fast.robot)[0], steps=-2)


def test_it_cannot_be_saved(fast, tmp_path):
    with pytest.raises(ValueError, match='save the Policy that it was made from'):
        fast.save(tmp_path / 'copy')
    assert not (tmp_path / 'copy').exists()


# What is held

def test_a_prompt_is_embedded_once_until_others_have_taken_its_place(policy):
    fast, observation = FastPolicy(policy), observations(policy.robot)[0]
    with mock.patch.object(fast.fused, 'embed_prompts', wraps=fast.fused.embed_prompts) as embed:
        first = fast.act(observation).actions
        fast.act(dataclasses.replace(observation, instruction='pull'))
        assert np.array_equal(fast.act(observation).actions, first)
        assert embed.call_count == 2
        for number in range(runtime.PROMPTS_KEPT):
            fast.request([dataclasses.replace(observation, instruction=f'go {number}')], 1, [0],
                         None)
        fast.act(observation)
        assert embed.call_count == 2 + runtime.PROMPTS_KEPT + 1


def test_a_thousand_switches_do_not_grow_what_is_held(policy):
    fast, observation = FastPolicy(policy), observations(policy.robot)[0]
    fast._graphs = GraphCache(lambda: lambda request: fast._eager, limit=5)
    for number in range(1000):
        fast._graphs.find(fast.request([dataclasses.replace(
            observation, instruction=f'go {number}')], 1 + number % 23, [0], None))
    fast._graphs.wait(fast.request([observation], 1, [0], None))
    fast._graphs._thread.submit(int).result()    # what was asked for before is captured by then
    assert (len(fast._prompts), len(fast._schedules)) == (64, 16)
    assert len(fast._graphs._graphs) == 5 and len(fast._graphs._pending) <= 1
    fast.close()


def test_recent_values_stay_and_the_oldest_goes():
    recent, made = Recent(2), []
    for key in 'abacab':
        recent.get(key, lambda: made.append(key))
    assert made == ['a', 'b', 'c', 'b'] and list(recent) == ['a', 'b']


# Graphs: a fake capture stands for a GPU's

class FakeCapture:
    """What CudaGraphs.capture does for GraphCache, under the test's control."""

    def __init__(self, act):
        self._act, self.go, self.captured, self.replayed = act, threading.Event(), [], 0
        self.problem = None

    def __call__(self, request: Request):
        self.go.wait(20)
        if self.problem:
            raise self.problem
        self.captured.append(request.shape)

        def replay(request):
            self.replayed += 1
            return self._act(request)
        return replay


@pytest.fixture
def captured(policy):
    """Yield a FastPolicy that captures, and its fake capture."""
    fast = FastPolicy(policy, options=RuntimeOptions(lengths=(24, 64)))
    fake = FakeCapture(fast._eager)
    fast._graphs = GraphCache(lambda: fake, limit=4)
    yield fast, fake
    fake.go.set()
    fast.close()


def test_chunks_are_eager_while_a_graph_is_captured_and_then_come_from_it(policy, captured):
    fast, fake = captured
    observation = observations(policy.robot)[0]
    eager = fast.act(observation, steps=1).actions
    assert fast.why_eager == 'its graph is being captured'
    fast.act(observation, steps=1)
    assert fake.replayed == 0
    fake.go.set()
    fast._graphs.wait(fast.request([observation], 1, [0], None))
    assert np.array_equal(fast.act(observation, steps=1).actions, eager)
    assert fast.why_eager == '' and fake.replayed == 1 and len(fake.captured) == 1


def test_another_nfe_size_or_length_takes_another_graph_and_another_prompt_does_not(
        policy, captured):
    fast, fake = captured
    fake.go.set()
    short, *_, last = observations(policy.robot, 3)   # the last has the longest instruction
    fast.warm_up(short, [1, 2])
    assert [(shape.steps, shape.length) for shape in fake.captured] == [
        (1, 24), (1, 64), (2, 24), (2, 64)]
    fast.act(dataclasses.replace(short, instruction='pull'), steps=2)
    assert fast.why_eager == '' and len(fake.captured) == 4
    fast.act(last, steps=2)
    assert fast.why_eager == '' and len(fake.captured) == 4
    fake.go.clear()
    fast.act(observations(policy.robot, sizes=(20, 20))[0], steps=2)
    assert fast.why_eager == 'its graph is being captured'
    fake.go.set()


def test_the_graph_that_was_used_last_stays(policy, captured):
    fast, fake = captured
    fake.go.set()
    observation = observations(policy.robot)[0]
    for steps in (1, 2, 3, 4, 1, 5):
        fast._graphs.wait(fast.request([observation], steps, [0], None))
        fast.act(observation, steps=steps)
    assert [shape.steps for shape in fast._graphs._graphs] == [3, 4, 1, 5]


def test_what_cannot_be_captured_is_said_and_not_tried_again(policy, captured):
    fast, fake = captured
    fake.problem = RuntimeError('operation not permitted')
    fake.go.set()
    observation = observations(policy.robot)[0]
    fast._graphs.wait(fast.request([observation], 1, [0], None))
    chunk = fast.act(observation, steps=1)
    assert fast.why_eager == ('its graph cannot be captured: RuntimeError: operation not '
                              'permitted')
    assert np.abs(normalised(policy, chunk)
                  - normalised(policy, policy.act(observation, steps=1))).max() < 1e-5
    fake.problem = None
    fast._graphs.wait(fast.request([observation], 1, [0], None))
    assert fake.captured == []


def test_a_device_without_graphs_makes_every_chunk_eager_and_says_so(policy):
    def make():
        raise RuntimeError('driver too old')
    fast = FastPolicy(policy)
    fast._graphs = GraphCache(make)
    assert 'driver too old' in fast.warm_up(observations(policy.robot)[0])
    fast.close()


def test_a_batch_is_eager_and_says_so(policy, captured):
    fast, _ = captured
    fast.act_batch(observations(policy.robot, 2), seeds=[0, 1])
    assert fast.why_eager == 'graphs are for one observation at a time'


@pytest.mark.parametrize('given', [{}, {'cameras': 3, 'states': 0, 'sizes': ((30, 40),) * 3}])
@pytest.mark.parametrize('count', [0, 2])
def test_what_is_captured_computes_the_chunk_on_buffers_that_never_move(given, count):
    policy = a_policy(max_prefix=2, **given)
    fast = FastPolicy(policy, options=RuntimeOptions(lengths=(64,)))
    requests = [fast.request([o], 2, [seed], prefixes=[LOW + seed * np.ones((count, 3))])
                for seed, o in enumerate(observations(policy.robot, 3))]
    with torch.inference_mode():
        act = StaticAct(fast.fused, requests[0], pinned=False)
        addresses = [buffer.data_ptr() for buffer in act._device]
        for request in (*requests, requests[0]):
            act.load_pictures(request)
            act.load_numbers(request)
            act.load_prompt(request)
            for stage in (act.see, act.tell, act.decide):
                stage()
            assert np.abs(act.result() - fast._eager(request)).max() < 1e-6
        assert [buffer.data_ptr() for buffer in act._device] == addresses


def test_pictures_that_are_loaded_once_are_computed_from_there_again_and_again(policy):
    fast = FastPolicy(policy, options=RuntimeOptions(lengths=(64,)))

    def capture(request):
        act = StaticAct(fast.fused, request, pinned=False)
        return Replay(act, act.see, act.tell, act.decide)

    first, second = (fast.request([o], 2, [0]) for o in observations(policy.robot, 2))
    with fast.from_pinned_memory(first) as act:
        assert act is None
    fast._graphs = GraphCache(lambda: capture)
    fast._graphs.wait(first)
    with torch.inference_mode():
        expected = [fast._eager(request) for request in (first, second)]
    for request, actions in zip((first, second), expected):
        with fast.from_pinned_memory(request) as act:
            assert np.abs(act() - actions).max() < 1e-6
            assert np.array_equal(act(), act())
    fast.close()


def test_on_a_cpu_the_reason_for_no_graph_is_the_cpu(fast):
    fast.act(observations(fast.robot)[0])
    assert fast.why_eager == 'there are no CUDA graphs on cpu'
    assert fast.why_not_compiled == 'compilation was not asked for'
    assert fast.why_no_kernels
    assert fast.why_not_one_kernel == 'there are no kernels for its blocks'


# Compilation

def test_compiled_blocks_give_the_same_chunk(policy):
    fast = FastPolicy(policy, options=RuntimeOptions(compile=True, backend='eager'))
    assert fast.why_not_compiled == 'the policy is not warmed up yet'
    observation = observations(policy.robot)[0]
    fast.warm_up(observation)
    assert fast.why_not_compiled == ''
    assert off(policy, fast, observation, steps=3) < 1e-5


def test_a_compiler_that_fails_is_left_out_and_the_reason_kept(policy):
    def broken(graph, inputs):
        raise RuntimeError('no C++ compiler here')
    fast = FastPolicy(policy, options=RuntimeOptions(compile=True, backend=broken))
    observation = observations(policy.robot)[0]
    fast.warm_up(observation)
    assert 'no C++ compiler here' in fast.why_not_compiled
    assert off(policy, fast, observation) < 1e-5


# Kernels that fail

@pytest.mark.parametrize('wrong, words', [
    (lambda x, weight, bias: 99 * (x @ weight.t()), 'off with the kernels'),
    (mock.Mock(side_effect=RuntimeError('out of resource')), 'RuntimeError: out of resource')])
def test_a_kernel_that_is_wrong_or_fails_is_left_out_and_the_reason_kept(
        policy, monkeypatch, wrong, words):
    monkeypatch.setattr(kernels, 'why_not', lambda *_: '')
    monkeypatch.setattr(encoder_kernels, 'linear_gelu', wrong)
    fast = FastPolicy(policy)
    for part in fast.fused.modules():
        if not isinstance(part, ActivatedLinear):
            part.kernels = False   # the others need Triton
    observation = observations(policy.robot)[0]
    fast.warm_up(observation)
    assert words in fast.why_no_kernels
    assert off(policy, fast, observation) < 1e-5


# Loading

def test_a_checkpoint_is_loaded_as_the_policy_loads_it(micro_checkpoint):
    fast, policy = FastPolicy.load(micro_checkpoint), Policy.load(micro_checkpoint)
    observation = observations(policy.robot)[0]
    assert off(policy, fast, observation) < 1e-5
    assert fast.device == torch.device('cpu') and fast.dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('name', ['shipped', 'stored as float32', 'stored as bfloat16'])
def test_weights_as_they_are_stored_give_the_bits_of_float32_weights(
        policy, tmp_path, monkeypatch, name, whole, dtype):
    path = SHIPPED
    if name != 'shipped':
        path = tmp_path / 'odd'
        policy.save(path, dtype=getattr(torch, name.split()[-1]))
    monkeypatch.setattr('meanflow_ros.core.policy.SMALL_FILE_BYTES', 2**26 if whole else 0)
    fast, expected = FastPolicy.load(path, dtype=dtype), FastPolicy(Policy.load(path, dtype=dtype))
    assert str(path) not in Path('/proc/self/maps').read_text()
    values = expected.fused.state_dict()
    for key, value in fast.fused.state_dict().items():
        assert value.dtype == values[key].dtype and torch.equal(value, values[key]), key
    for steps, observation in enumerate(observations(expected.robot, 2), start=1):
        np.testing.assert_array_equal(fast.act(observation, steps=steps).actions,
                                      expected.act(observation, steps=steps).actions)


def test_what_is_compiled_is_kept_where_nobody_else_can_write(tmp_path, monkeypatch):
    monkeypatch.setattr('os.environ', {'XDG_CACHE_HOME': str(tmp_path)})
    cache = users_cache()
    assert cache == tmp_path / 'meanflow_ros' / 'compiled'
    keep_compiled_in(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == str(cache)
    cache.chmod(0o720)
    keep_compiled_in(cache)     # the environment names both: it is not used
    del os.environ['TRITON_CACHE_DIR']
    with pytest.raises(ValueError, match='others may write'):
        keep_compiled_in(cache)


@pytest.mark.parametrize('words, fast', [
    ('flags : fpu avx512_bf16 avx2', True), ('flags : amx_bf16', True),
    ('Features : fp asimd i8mm bf16', True), ('flags : fpu avx512f avx2', False)])
def test_a_cpu_says_whether_it_multiplies_bfloat16(words, fast, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, 'CPU_INFO', tmp_path / 'cpuinfo')
    assert not runtime.multiplies_bfloat16(torch.device('cpu'))
    runtime.CPU_INFO.write_text(words)
    assert runtime.multiplies_bfloat16(torch.device('cpu')) is fast
