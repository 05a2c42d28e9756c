"""The `bench` command: what it counts, what it compares, and what it writes."""

import json
from unittest import mock

import numpy as np
import pytest
import torch

import micro_policy
from meanflow_ros.core import fp8
from meanflow_ros.core.policy import Policy
from meanflow_ros.evaluation.bench import command, device, plot, roofline, startup, subjects
from meanflow_ros.evaluation.bench.flower import FlowerPath, hold_weights_as
from test_runtime import a_policy, normalised, observations

torch.set_num_threads(1)


def test_the_path_in_flowers_manner_is_the_policys_rectified_flow():
    policy = a_policy(h_in='none', sampler='euler', sizes=((30, 40),) * 4)
    path, observation = FlowerPath(policy), observations(policy.robot)[0]
    path.prepare(observation)
    theirs = policy.act(observation, steps=4)
    assert np.abs(normalised(policy, path.act(observation))
                  - normalised(policy, theirs)).max() < 1e-5
    assert not np.allclose(theirs.actions, policy.act(observation, steps=3).actions, atol=1e-6)


def test_weights_are_held_in_bfloat16_but_for_the_time():
    network = micro_policy.make_policy().network
    hold_weights_as(network, torch.bfloat16)
    exact = {name for name, value in network.named_parameters() if value.dtype == torch.float32}
    assert exact and all('t_embedder' in name or 'h_embedder' in name for name in exact)


def test_percentiles_are_those_of_the_times():
    assert device.summary([float(value) for value in range(101)]) == {
        'p50': 50.0, 'p95': 95.0, 'p99': 99.0, 'max': 100.0, 'runs': 101}


def test_a_slow_row_ends_after_its_time_with_fewer_runs():
    with mock.patch.object(device.time, 'perf_counter', side_effect=range(1000)):
        values = device.host_ms(lambda: None, 100, warm_up=3, limit_s=9, fewest=2)
    assert len(values) == 4 and set(values) == {1000.0}


def test_weights_and_operations_are_counted_from_the_model():
    policy = a_policy(states=0, h_in='none')
    one, three = (roofline.work_of(policy, steps=steps, dtype=torch.bfloat16, sequence=64)
                  for steps in (1, 3))
    assert one['vision'] == three['vision'] and one['text'] == three['text']
    bart = sum(value.numel() for name, value in policy.network.encoder.language_model[
        'encoder'].layers.named_parameters())
    assert one['text']['mb'] == pytest.approx(2 * bart / 1e6, abs=1e-3)
    dense, tokens, width = 4 * 48 * 48 + 2 * 48 * 80, 64, 48   # multiplications of a token
    per_layer = 2 * tokens * dense + 4 * tokens * tokens * width
    assert one['text']['gflop'] == pytest.approx(2 * per_layer / 1e9, abs=1e-3)
    blocks = sum(value.numel() for name, value in policy.network.dit.blocks.named_parameters()
                 if any(part in name for part in ('qkv', 'self_attn.proj', 'cross_attn.q_proj',
                                                  'cross_attn.proj', 'mlp')))
    assert three['dit']['mb'] - one['dit']['mb'] > 2 * 2 * blocks / 1e6


def test_the_bound_is_the_larger_of_both_times_of_each_stage():
    work = {'vision': {'gflop': 780.0, 'mb': 425.0}, 'dit': {'gflop': 78.0, 'mb': 4250.0}}
    assert roofline.bound_ms(work, bandwidth_tb_s=4.25, matrix_tflop_s=780.0) == {
        'vision': 1.0, 'dit': 1.0, 'total': 2.0}


@pytest.fixture
def small(monkeypatch):
    """Let `bench` measure a small policy in place of a preset."""
    def make(preset, *, rectified_flow=False, device='cpu', **_):
        return a_policy(h_in='none' if rectified_flow else 'decoder',
                        sampler='euler' if rectified_flow else 'average',
                        sizes=((30, 40),) * 4)
    monkeypatch.setattr(subjects, 'random_policy', make)
    monkeypatch.setattr(device, 'ceilings', lambda *_: {'bandwidth_tb_s': 0.02,
                                                        'matrix_tflop_s': 0.1})


def test_bench_writes_every_row_its_stages_and_its_checks(small, tmp_path, capsys):
    out = tmp_path / 'new' / 'bench.json'
    assert command.main(['--preset', 'tiny', '--runs', '4', '--nfe', '2', '1', '--switches', '9',
                         '--no-compile', '--device', 'cpu', '--dtype', 'float32',
                         '--skip', 'start', '--out', str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(row['technique'], row['nfe']) for row in found['rows']] == [
        ('policy eager', 4), ('policy eager', 2), ('fast eager', 2), ('fast eager', 1),
        ('flower eager', 4)]
    assert found['problems'] == [] and len(found['latencies_ms']) == 4
    assert all(0 < value for value in found['latencies_ms'])
    fast = found['rows'][2]
    assert list(fast['stages_ms']) == ['upload', 'resize', 'vision', 'text', 'dit', 'download',
                                       'copy']
    assert fast['checks']['off_the_eager_policy']['2'] < 1e-5
    assert fast['checks']['repeats_that_differ'] == 0 and fast['checks']['switches'] == 9
    assert list(fast['roofline_fraction']) == ['host']   # a CPU has no graph from pinned memory
    assert 0 < fast['roofline_fraction']['host'] < 1
    assert 'flower eager' in capsys.readouterr().out


FP8 = ['--preset', 'tiny', '--runs', '2', '--nfe', '2', '--switches', '2', '--no-compile', '--fp8',
       '--device', 'cpu', '--dtype', 'bfloat16', '--skip', 'start', 'ceilings', 'flower', '--rows',
       'fast']


def test_bench_tells_how_far_fp8_is_off_beside_the_row_without(small, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8, 'why_not', lambda *_: '')
    out = tmp_path / 'bench.json'
    assert command.main([*FP8, '--out', str(out)]) == 0
    without, row = json.loads(out.read_text())['rows']
    assert (without['technique'], row['technique']) == ('fast eager', 'fast fp8')
    assert (without['why_not_fp8'], row['why_not_fp8']) == ('fp8 was not asked for', '')
    assert 0 < row['checks']['off_float32'] < 0.05
    assert row['checks']['off_float32'] != without['checks']['off_float32']
    assert 'work' in without and 'work' not in row


def test_bench_says_why_there_is_no_row_of_fp8(small, tmp_path):
    out = tmp_path / 'bench.json'
    assert command.main([*FP8, '--out', str(out)]) == 1
    found = json.loads(out.read_text())
    assert found['problems'] == [
        'own: fast fp8: fp8 is for bfloat16 on CUDA, not for torch.bfloat16 on cpu']
    assert [row['technique'] for row in found['rows']] == ['fast eager']


def test_a_part_that_fails_is_told_and_the_others_are_measured(small, tmp_path, capsys):
    out = tmp_path / 'bench.json'
    with mock.patch.object(device, 'ceilings', side_effect=RuntimeError('no memory left')):
        assert command.main(['--preset', 'tiny', '--runs', '2', '--rows', 'flower', '--device',
                             'cpu', '--dtype', 'float32', '--no-compile', '--skip', 'start',
                             '--out', str(out)]) == 1
    found = json.loads(out.read_text())
    assert found['problems'] == ['ceilings: no memory left']
    assert [row['technique'] for row in found['rows']] == ['flower eager']


def test_a_start_is_measured_from_the_disk_to_the_first_chunk(micro_checkpoint, capsys):
    assert startup.main([str(micro_checkpoint)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['why_eager'] == 'there are no CUDA graphs on cpu'
    assert 0 <= found['load_s'] + found['warm_up_s'] <= found['first_chunk_s']


def test_the_presets_have_the_sizes_that_are_asked_for():
    policy = subjects.random_policy('large', cameras=3, width=320, height=200, horizon=17,
                                    states=0, rectified_flow=True, device='meta')
    robot, config = policy.robot, policy.config
    assert (len(robot.cameras), robot.cameras[0].width, robot.horizon) == (3, 320, 17)
    assert (config.sampler, config.dit.h_in, robot.state_names) == ('euler', 'none', ())
    count = sum(value.numel() for value in policy.network.parameters())
    assert 900e6 < count < 1000e6


def test_a_random_policy_does_something():
    policy = subjects.random_policy('tiny', cameras=1, width=32, height=32)
    observation = subjects.observations(policy.robot, 1)[0]
    noise = policy.noise(observation.stamp_ns, 0)[0].clamp(-1, 1).numpy()
    assert np.abs(normalised(policy, policy.act(observation)) - noise).mean() > 0.02


def test_the_plot_shows_every_row(tmp_path):
    pytest.importorskip('matplotlib', reason='matplotlib is missing: pip install matplotlib')
    times = {'p50': 3.0, 'p95': 3.1, 'p99': 3.2, 'max': 5.0, 'runs': 9}
    rows = [{'technique': 'flower eager', 'nfe': 4, 'host_ms': {**times, 'p50': 110.0,
                                                                'p99': 120.0}},
            {'technique': 'fast graphed', 'nfe': 1, 'host_ms': times}]
    (tmp_path / 'a.json').write_text(json.dumps({'rows': rows}))
    assert plot.main([str(tmp_path / 'plot.png'), str(tmp_path / 'a.json')]) == 0
    assert (tmp_path / 'plot.png').stat().st_size > 5000


def test_no_policy_is_loaded_for_the_path_in_flowers_manner(micro_checkpoint, tmp_path, capsys):
    assert command.main(['--checkpoint', str(micro_checkpoint), '--runs', '2', '--nfe', '1',
                         '--rows', 'flower', '--device', 'cpu', '--dtype', 'float32', '--skip',
                         'ceilings', 'start', '--no-compile']) == 1
    assert 'is measured with --preset only' in capsys.readouterr().err
    assert Policy.load(micro_checkpoint).config.sampler == 'average'
