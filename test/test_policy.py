"""The policy: observation to chunk, and the checkpoint directory."""

import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from meanflow_ros.core.contract import ActionSpace, CameraSpec, Observation, RobotSpec
from meanflow_ros.core.dit import DiTConfig, dit_preset
from meanflow_ros.core.encoder import EncoderConfig, encoder_preset, train_tokenizer
from meanflow_ros.core.guard import Guard
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import (
    CheckpointError, NoRandomWeights, Policy, PolicyConfig, PolicyNetwork)

torch.set_num_threads(1)

SHIPPED = Path(__file__).resolve().parents[1] / 'resource' / 'default_policy'
LOW, HIGH = np.array([-0.31, 12.6, -0.9]), np.array([0.17, 13.3, -0.2])
ROBOT = RobotSpec(
    robot='arm', state_names=('elbow', 'base'), horizon=4, period_s=0.0333, first_step=2,
    cameras=tuple(CameraSpec(name=name, width=40, height=30) for name in ('front', 'wrist')),
    action_space=ActionSpace(name='eef', dimensions=('x', 'force', 'angle'),
                             units=('m', 'N', 'rad'), lower=[-0.37, 12.5, -1.0],
                             upper=[0.21, 13.7, 0.0]))
CONFIG = PolicyConfig(
    robot=ROBOT, action_normalizer=Normalizer(low=LOW, high=HIGH),
    state_normalizer=Normalizer(low=[-1.7, 0.3], high=[2.9, 0.8]), prompt='Task: {instruction}.',
    encoder=EncoderConfig(
        image_size=32, vision={
            'embed_dim': [8, 8, 16, 16], 'depths': [1, 1, 1, 1], 'num_heads': [2, 2, 2, 2],
            'num_groups': [2, 2, 2, 2], 'patch_stride': [4, 2, 2, 1], 'window_size': 4,
            'drop_path_rate': 0.0, 'projection_dim': 24},
        text={'vocab_size': 300, 'd_model': 24, 'encoder_layers': 1, 'encoder_ffn_dim': 32,
              'encoder_attention_heads': 2, 'max_position_embeddings': 512}),
    dit=DiTConfig(width=16, depth=2, heads=2, adaln_rank=4, h_in='adaln',
                  action_spaces={'wide': 5, 'eef': 3}, state_sizes={'eef': 2}))


@pytest.fixture(scope='module')
def policy():
    torch.manual_seed(0)
    made = Policy.create(CONFIG, train_tokenizer(['open it'], vocab_size=300))
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


@pytest.fixture(scope='module')
def saved(policy, tmp_path_factory):
    directory = tmp_path_factory.mktemp('checkpoints') / 'good'
    policy.save(directory)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    """Return a copy of a good checkpoint, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / 'copy'))


def an_observation(**changes):
    rng = np.random.default_rng(3)
    images = {name: rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
              for name in ('wrist', 'front')}
    return Observation(**{'stamp_ns': 1_700_000_000_123_456_789, 'images': images,
                          'instruction': 'open it', 'state': [0.31, 0.47], **changes})


def differs(a, b):
    return np.abs(a.actions - b.actions).max() > 1e-4


def test_a_chunk_answers_its_observation_in_the_robots_own_terms(policy):
    chunk = policy.act(an_observation())
    assert chunk.actions.shape == (4, 3) and chunk.actions.dtype == np.float64
    assert (chunk.stamp_ns, chunk.period_s, chunk.first_step) == (
        1_700_000_000_123_456_789, 0.0333, 2)
    assert (chunk.actions >= LOW - 1e-9).all() and (chunk.actions <= HIGH + 1e-9).all()
    Guard(ROBOT).check(chunk, now_ns=chunk.stamp_ns)


def test_the_network_output_is_turned_into_physical_units(policy):
    """One step of u = z - a lands on a; -1 is low, 1 is high, and what lies beyond is clamped."""
    a = torch.tensor([[-1.0, 1.0, 0.0], [7.0, -7.0, 0.5], [0.25, -0.5, -0.75], [0.0, 0.0, 0.0]])
    a = torch.nn.functional.pad(a, (0, 2))[None]
    with mock.patch.object(policy.network, 'velocity', lambda _: lambda z, t, h: z - a):
        chunk = policy.act(an_observation(), steps=1)
    expected = [[-0.31, 13.3, -0.55], [0.17, 12.6, -0.375], [-0.01, 12.775, -0.8125],
                [-0.07, 12.95, -0.55]]
    np.testing.assert_allclose(chunk.actions, expected, atol=1e-6)


def test_a_new_policy_returns_its_noise():
    fresh = Policy.create(CONFIG, train_tokenizer(['open it'], vocab_size=300))
    noise = torch.linspace(-0.9, 0.8, 20).view(1, 4, 5)
    chunk = fresh.act(an_observation(), noise=noise)
    np.testing.assert_allclose(
        chunk.actions, LOW + (noise[0, :, :3].numpy() + 1) / 2 * (HIGH - LOW), rtol=1e-6)


def test_the_same_seed_and_observation_give_the_same_chunk(policy):
    first, again = (policy.act(an_observation(), seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.actions, again.actions)
    assert differs(first, policy.act(an_observation(), seed=6))
    assert differs(first, policy.act(an_observation(stamp_ns=77), seed=5))


@pytest.mark.parametrize('seed', [0, -3, 2**31 - 1, 2**62])
def test_any_seed_and_stamp_give_noise_of_unit_variance(policy, seed):
    noise = torch.cat([policy.noise(stamp, seed) for stamp in range(10**18, 10**18 + 200)])
    assert noise.shape == (200, 4, 5)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize('changes', [
    {'instruction': 'shut it'}, {'state': [0.32, 0.48]}, {'state': [0.31, 0.7]}])
def test_instruction_and_state_matter(policy, changes):
    assert differs(policy.act(an_observation()), policy.act(an_observation(**changes)))


@pytest.mark.parametrize('camera', ['front', 'wrist'])
def test_each_camera_matters_and_its_name_not_its_place_in_the_mapping(policy, camera):
    seen = an_observation()
    images = dict(reversed(seen.images.items()))
    same = policy.act(an_observation(images=images))
    np.testing.assert_array_equal(same.actions, policy.act(seen).actions)
    images[camera] = 255 - images[camera]
    assert differs(same, policy.act(an_observation(images=images)))


def test_a_picture_that_no_camera_of_the_robot_took_is_not_used(policy):
    seen = an_observation()
    images = {**seen.images, 'other': np.zeros((5, 5, 3), np.uint8)}
    np.testing.assert_array_equal(policy.act(an_observation(images=images)).actions,
                                  policy.act(seen).actions)


@pytest.mark.parametrize('steps', [1, 2, 4])
def test_the_network_is_evaluated_once_per_step(policy, steps):
    calls = []
    hook = policy.network.dit.register_forward_hook(lambda *_: calls.append(1))
    chunk = policy.act(an_observation(), steps=steps)
    hook.remove()
    assert len(calls) == steps and np.isfinite(chunk.actions).all()
    assert differs(chunk, policy.act(an_observation(), steps=steps + 1))


def test_the_checkpoints_own_number_of_steps_is_the_default(policy):
    three = Policy(dataclasses.replace(CONFIG, sampler_steps=3), policy.network)
    np.testing.assert_array_equal(three.act(an_observation()).actions,
                                  policy.act(an_observation(), steps=3).actions)


def test_an_euler_policy_gives_its_network_h_zero(policy):
    asked = []
    flow = Policy(dataclasses.replace(CONFIG, sampler='euler'), policy.network)
    for each in (flow, policy):
        hook = policy.network.dit.register_forward_hook(
            lambda _, args, kwargs, result: asked.append(kwargs['h'].item()), with_kwargs=True)
        each.act(an_observation(), steps=2)
        hook.remove()
    assert asked == [0.0, 0.0, 0.5, 0.5]


def test_bfloat16_gives_nearly_the_same_chunk(policy):
    half = Policy(CONFIG, policy.network, dtype=torch.bfloat16)
    found, exact = half.act(an_observation()).actions, policy.act(an_observation()).actions
    assert (np.abs(found - exact) < 0.1 * (HIGH - LOW)).all()


@pytest.mark.parametrize('camera', ['front', 'wrist'])
def test_a_missing_camera_is_named(policy, camera):
    images = {name: image for name, image in an_observation().images.items() if name != camera}
    with pytest.raises(ValueError, match=f'no picture of camera {camera!r}'):
        policy.act(an_observation(images=images))


@pytest.mark.parametrize('state, got', [(None, 'None'), ([0.1], r'\(1,\)'),
                                        ([0.1, 0.2, 0.3], r'\(3,\)')])
def test_a_state_of_the_wrong_size_is_refused_with_the_names(policy, state, got):
    with pytest.raises(ValueError, match=rf"2 states \['elbow', 'base'\], got {got}"):
        policy.act(an_observation(state=state))


def test_a_negative_number_of_steps_is_refused(policy):
    with pytest.raises(ValueError, match='steps must be at least 1, got -2'):
        policy.act(an_observation(), steps=-2)


def test_a_loaded_policy_gives_the_same_bits(policy, saved):
    loaded = Policy.load(saved)
    for steps in (1, 3):
        np.testing.assert_array_equal(loaded.act(an_observation(), steps=steps).actions,
                                      policy.act(an_observation(), steps=steps).actions)
    assert yaml.safe_load((saved / 'policy.yaml').read_text())['format'] == 1


@pytest.mark.parametrize('name', ['uniform_', 'normal_', 'trunc_normal_', 'xavier_uniform_',
                                  'xavier_normal_', 'kaiming_uniform_', 'kaiming_normal_'])
def test_weights_that_will_be_read_are_not_drawn_before(name):
    value, state = torch.full((7, 5), 0.37), torch.get_rng_state()
    draw = getattr(torch.nn.init, name)
    with NoRandomWeights():
        draw(value)
        torch.empty(3).random_()
        torch.randn(2, 3)
    assert torch.equal(torch.get_rng_state(), state)
    if name != 'trunc_normal_':     # the others only draw
        assert (value == 0.37).all()
    draw(value)
    assert not torch.equal(torch.get_rng_state(), state) and value.std() > 0


def test_loading_draws_nothing(saved):
    state = torch.get_rng_state()
    Policy.load(saved)
    assert torch.equal(torch.get_rng_state(), state)
    PolicyNetwork(CONFIG, train_tokenizer(['open it'], vocab_size=300))
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('stored', [torch.float32, torch.bfloat16])
def test_weights_are_float32_unless_they_are_asked_for_as_they_are_stored(
        policy, tmp_path, monkeypatch, stored, whole):
    monkeypatch.setattr('meanflow_ros.core.policy.SMALL_FILE_BYTES', 2**26 if whole else 0)
    policy.save(tmp_path, dtype=stored)
    change_weights(tmp_path, put(FIRST, lambda w: w.half()))    # as float32: it is neither
    loaded, raw = Policy.load(tmp_path), Policy.load(tmp_path, as_stored=True)
    other = raw.network.state_dict()
    for name, value in loaded.network.state_dict().items():
        assert value.dtype == torch.float32
        assert other[name].dtype == (torch.float32 if name == FIRST else stored)
        assert torch.equal(value, other[name].float())
    assert not any(value.requires_grad for value in raw.network.parameters())
    torch.testing.assert_close(dict(raw.network.named_buffers()),
                               dict(loaded.network.named_buffers()), check_dtype=False)


def test_a_policy_saved_twice_is_the_same_files(saved, tmp_path):
    Policy.load(saved).save(tmp_path / 'again')
    for path in saved.iterdir():
        assert (tmp_path / 'again' / path.name).read_bytes() == path.read_bytes()


def test_weights_stored_as_bfloat16_are_half_the_size_and_give_nearly_the_same(
        policy, saved, tmp_path):
    policy.save(tmp_path, dtype=torch.bfloat16)
    full, half = ((d / 'model.safetensors').stat().st_size for d in (saved, tmp_path))
    assert half < 0.65 * full
    loaded = Policy.load(tmp_path)
    found, exact = loaded.act(an_observation()).actions, policy.act(an_observation()).actions
    assert (np.abs(found - exact) < 0.1 * (HIGH - LOW)).all()


def refused(directory, *words):
    with pytest.raises(CheckpointError) as caught:
        Policy.load(directory)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_missing_directory_is_named(tmp_path):
    refused(tmp_path / 'nowhere', 'checkpoint directory', 'nowhere', 'does not exist')


@pytest.mark.parametrize('name', ['policy.yaml', 'model.safetensors', 'tokenizer.json'])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    refused(checkpoint, f'has no {name}')


@pytest.mark.parametrize('kept', [0, 7, 1000, -1])
def test_truncated_weights_are_refused(checkpoint, kept):
    path = checkpoint / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:kept])
    refused(checkpoint, 'model.safetensors', 'cannot be read, it may be truncated')


def change_weights(checkpoint, change):
    weights = load_file(checkpoint / 'model.safetensors')
    change(weights)
    save_file(weights, checkpoint / 'model.safetensors')


def put(name, value):
    return lambda weights: weights.update({name: value(weights.get(name))})


FIRST = 'dit.action_decoders.eef.mlp.0.weight'


@pytest.mark.parametrize('change, words', [
    (lambda weights: weights.pop(FIRST), ['1 missing tensors', FIRST]),
    (put('dit.extra', lambda _: torch.zeros(2)), ['1 unknown tensors', "'dit.extra'"]),
    (put(FIRST, lambda w: w[:-1].clone()), [FIRST, 'shape (31, 16)', 'asks for (32, 16)']),
    (put(FIRST, lambda w: w.T.contiguous()), [FIRST, 'shape (16, 32)']),
    (put(FIRST, lambda w: w.clone().fill_diagonal_(float('nan'))), [FIRST, 'NaN or infinite']),
    (put(FIRST, lambda w: w.clone().fill_diagonal_(float('-inf'))), [FIRST, 'NaN or infinite']),
])
def test_wrong_weights_are_named(checkpoint, change, words):
    change_weights(checkpoint, change)
    refused(checkpoint, 'model.safetensors', *words)


@pytest.mark.parametrize('stored', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('place', [0, 37, -1])
def test_a_weight_that_is_no_number_is_found_wherever_it_is(checkpoint, stored, bad, place):
    def spoil(weights):
        weights.update({name: value.to(stored) for name, value in weights.items()})
        weights[FIRST].fill_(torch.finfo(stored).max).view(-1)[place] = bad
    change_weights(checkpoint, spoil)
    refused(checkpoint, FIRST, 'NaN or infinite')


def test_the_largest_weights_are_no_reason_to_refuse(checkpoint):
    change_weights(checkpoint, put(FIRST, lambda w: torch.full_like(w, torch.finfo().max)))
    Policy.load(checkpoint)


def test_a_missing_and_an_unknown_tensor_are_both_named(checkpoint):
    change_weights(checkpoint, lambda w: w.update({'dit.renamed': w.pop(FIRST)}))
    refused(checkpoint, FIRST, 'dit.renamed')


def change_yaml(checkpoint, path, value):
    """Set the field at `path` (keys joined by dots); `...` removes it."""
    file = checkpoint / 'policy.yaml'
    document = yaml.safe_load(file.read_text())
    *parents, last = [int(key) if key.isdigit() else key for key in path.split('.')]
    inner = document
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    file.write_text(yaml.safe_dump(document))


@pytest.mark.parametrize('path, value, words', [
    ('sampler_stepz', 1, ["unknown field 'sampler_stepz'", "did you mean 'sampler_steps'?"]),
    ('robot.horizont', 1, ["robot: unknown field 'horizont'", "did you mean 'horizon'?"]),
    ('robot.cameras.1.hight', 1, ['robot.cameras[1]', "did you mean 'height'?"]),
    ('dit.zzz', 1, ["dit: unknown field 'zzz'", 'known: width, depth']),
    ('encoder.vision.window_sise', 4, ['encoder: vision: unknown', "mean 'window_size'?"]),
    ('encoder.text.encoder_layer', 1, ['encoder: text: unknown', "mean 'encoder_layers'?"]),
    ('encoder.text', 3, ['encoder.text must be Mapping']),
    ('format', ..., ["missing field 'format'"]),
    ('robot', ..., ["missing field 'robot'"]),
    ('robot.period_s', ..., ["robot: missing field 'period_s'"]),
    ('robot.action_space.lower', ..., ["robot.action_space: missing field 'lower'"]),
    ('encoder.image_size', ..., ["encoder: missing field 'image_size'"]),
    ('action_normalizer.high', ..., ["action_normalizer: missing field 'high'"]),
    ('format', 2, ['format 2 is not supported', 'reads format 1']),
    ('format', 'one', ["format 'one' is not supported"]),
    ('sampler_steps', '4', ["sampler_steps must be int, got '4'"]),
    ('sampler_steps', True, ['sampler_steps must be int, got True']),
    ('sampler_steps', 0, ['sampler_steps must be 1 to 64, got 0']),
    ('sampler', 'eular', ['sampler must be one of', "'eular'"]),
    ('relative_to', ['', 'nobody', ''], ['relative_to']),
    ('robot', [1], ['robot must be a mapping, got list']),
    ('robot.cameras', 3, ['robot.cameras must be a list, got 3']),
    ('robot.cameras', None, ['robot.cameras must be a list, got None']),
    ('robot.cameras', [], ['cameras must be 1 to 4, got 0']),
    ('robot.cameras.0', 'front', ['robot.cameras[0] must be a mapping']),
    ('robot.cameras.0.width', 40.0, ['robot.cameras[0].width must be int, got 40.0']),
    ('robot.horizon', 0, ['robot: horizon must be at least 1']),
    ('robot.period_s', float('nan'), ['robot: period_s must be finite']),
    ('robot.state_names', 'elbow', ['robot.state_names must be tuple']),
    ('robot.action_space.lower', [0, 'x', 1], ['robot.action_space.lower must be']),
    ('robot.action_space.lower', [0.3, 12.5, -1.0], ["limits of 'x' must have lower < upper"]),
    ('robot.action_space.name', 'joint', ["dit.action_spaces must hold 'joint'"]),
    ('action_normalizer.low', [-0.38, 12.6, -0.9], ["action_normalizer of 'x' reaches outside"]),
    ('action_normalizer.high', [0.17, 13.3, 0.1], ["action_normalizer of 'angle' reaches outs"]),
    ('action_normalizer.high', [0.17, 12.6, -0.2], ['high must exceed low']),
    ('action_normalizer.low', [-0.3, 12.6], ['one size, got 2 and 3']),
    ('action_normalizer', None, ['action_normalizer must be a mapping']),
    ('state_normalizer', None, ['state_normalizer must have the 2 states']),
    ('robot.state_names', ['elbow'], ["must give 'eef' the 1 states"]),
    ('prompt', 'no field', ['prompt must contain {instruction}']),
    ('prompt', '{instruction} {task}', ['prompt must contain {instruction} and no other']),
    ('prompt', '{{instruction}}', ['prompt must contain {instruction}']),
    ('prompt', '{instruction} }', ['is not a template']),
    ('prompt', '{instruction.__class__}', ['no other field']),
    ('dit.width', 17, ['dit: width must be a multiple']),
    ('dit.heads', 0, ['dit: heads must be at least 1']),
    ('dit.h_in', 'everywhere', ['h_in must be one of']),
    ('dit.action_spaces', {'eef': 'three'}, ['dit']),
    ('dit.depth', 3, ['missing tensors', "'dit.blocks.2."]),
    ('encoder.image_size', 5, ['encoder: image_size must be 16 to 1024']),
    ('encoder.vision.depths', [], ['no network can be built from these sizes']),
    ('encoder.vision.num_heads', [0, 2, 2, 2], ['no network can be built']),
    ('encoder.vision.embed_dim', None, ['no network can be built', 'embed_dim']),
    ('encoder.vision.drop_path_rate', 10**20, ['no network can be built']),
    ('encoder.text.d_model', 25, ['no network can be built']),
    ('encoder.text.vocab_size', 100, ['the tokenizer has', 'embeds only 100']),
])
def test_a_wrong_policy_yaml_is_refused_with_the_field(checkpoint, path, value, words):
    change_yaml(checkpoint, path, value)
    refused(checkpoint, str(checkpoint), *words)


@pytest.mark.parametrize('text', [
    'robot: [1, 2', 'a: b: c', '\tx: 1', '', '- 1\n- 2', 'x', '[' * 2000, 'a: &x [*x]',
    '? [a]\n: 1', '\x00', 'format: 2020-99-99'])
def test_a_broken_policy_yaml_is_refused(checkpoint, text):
    (checkpoint / 'policy.yaml').write_text(text)
    refused(checkpoint, 'policy.yaml')


def test_a_policy_yaml_that_is_not_text_is_refused(checkpoint):
    (checkpoint / 'policy.yaml').write_bytes(b'\xff\xfe\xfd format: 1')
    refused(checkpoint, 'policy.yaml')


@pytest.mark.parametrize('tag', [
    '!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{mark}"]]',
    '!!python/object/apply:os.system ["touch {mark}"]', '!!python/name:os.system',
    '!!python/tuple [1]'])
def test_a_policy_yaml_with_a_python_tag_is_refused_and_runs_nothing(checkpoint, tmp_path, tag):
    mark = tmp_path / 'was_run'
    file = checkpoint / 'policy.yaml'
    file.write_text(file.read_text() + f'\nextra: {tag.format(mark=mark)}\n')
    refused(checkpoint, 'policy.yaml', 'could not determine a constructor')
    assert not mark.exists()


@pytest.mark.parametrize('text', ['', '{', '[]', '{"version": "1.0"}', 'x' * 100])
def test_a_broken_tokenizer_is_refused(checkpoint, text):
    (checkpoint / 'tokenizer.json').write_text(text)
    refused(checkpoint, 'tokenizer.json')


def test_the_shipped_policy_loads_is_small_and_acts_within_its_limits():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 25_000_000
    shipped = Policy.load(SHIPPED)
    robot = shipped.robot
    rng = np.random.default_rng(0)
    images = {camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
              for camera in robot.cameras}
    state = (shipped.config.state_normalizer.low + shipped.config.state_normalizer.high) / 2
    chunk = shipped.act(Observation(stamp_ns=10**18, images=images, state=state,
                                    instruction='open the faucet'))
    assert chunk.actions.shape == (robot.horizon, robot.action_space.size)
    assert np.isfinite(chunk.actions).all() and chunk.actions.std(0).min() > 0
    assert len(Guard(robot).check(chunk, now_ns=10**18).timed.actions) == robot.horizon


def test_the_full_size_policy_acts():
    """Florence-2-large and the DiT of FLOWER, 928 M weights, two cameras of 224 pixels."""
    size = 7
    robot = dataclasses.replace(
        ROBOT, horizon=10, action_space=ActionSpace(
            name='eef_delta', dimensions=tuple('abcdefg'), units=('1',) * size,
            lower=[-1.1] * size, upper=[0.9] * size))
    config = PolicyConfig(
        robot=robot, encoder=encoder_preset('large'), state_normalizer=CONFIG.state_normalizer,
        action_normalizer=Normalizer(low=[-1.1] * size, high=[0.9] * size),
        dit=dit_preset('large', {'eef_delta': size}, {'eef_delta': 2}))
    with NoRandomWeights():     # untouched pages take no time or memory
        network = PolicyNetwork(config, train_tokenizer(['open it']))
    assert sum(parameter.numel() for parameter in network.parameters()) > 900e6
    # every weight is a view of one random pool: the full forward pass in little memory
    pool = torch.randn(max(p.numel() for p in network.parameters()),
                       generator=torch.Generator().manual_seed(0)) * 0.02
    ones = torch.ones(2**16)
    for name, parameter in network.named_parameters():
        is_scale = 'norm' in name and name.endswith('weight') and parameter.ndim == 1
        source = ones if is_scale else pool
        parameter.data = source[:parameter.numel()].view(parameter.shape)
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
              for name in robot.camera_names}
    seen = []
    network.dit.register_forward_hook(lambda _, args, kwargs, result: seen.append(
        kwargs['conditioning'].keys_values), with_kwargs=True)
    chunk = Policy(config, network).act(an_observation(images=images))
    assert chunk.actions.shape == (10, 7)
    assert np.isfinite(chunk.actions).all() and chunk.actions.std() > 0.1
    assert (chunk.actions >= -1.1 - 1e-6).all() and (chunk.actions <= 0.9 + 1e-6).all()
    keys, values = seen[0][17]
    assert len(seen) == 1 and len(seen[0]) == 18 and keys.shape == values.shape
    assert keys.shape[:2] == (1, 16) and keys.shape[2] > 2 * 50 and keys.shape[3] == 64
