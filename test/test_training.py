"""From recordings to a checkpoint: the loop, its interruptions and its errors."""

import dataclasses
import errno
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import child
import numpy as np
import pytest
import torch
import training_rig
import yaml

from meanflow_ros.core.meanflow import LOSSES
from meanflow_ros.core.policy import Policy
from meanflow_ros.core.schema import to_plain
from meanflow_ros.training import train as train_module
from meanflow_ros.training.config import read_train_config
from meanflow_ros.training.optimizer import learning_rate
from meanflow_ros.training.train import NonFiniteLoss, main, train

CONFIG = Path(__file__).parent.parent / 'config' / 'train_metaworld.yaml'
pytestmark = pytest.mark.usefixtures('small_networks')
ALONE, config, losses_of = training_rig.ALONE, training_rig.config, training_rig.losses_of


def weights_of(run):
    return Policy.load(run / 'policy').network.state_dict()


@pytest.mark.parametrize('loss', LOSSES)
def test_training_writes_a_checkpoint_that_loads_with_the_statistics_of_the_data(
        data, tmp_path, loss):
    train(config(loss=loss, steps=2), data, tmp_path / 'run', ALONE)
    policy = Policy.load(tmp_path / 'run' / 'policy')
    actions = data.chunks[np.array(data.mask)].reshape(-1, 3)
    low = np.quantile(actions, 0.01, axis=0)
    np.testing.assert_allclose(policy.config.action_normalizer.low,
                               np.maximum(low, policy.robot.action_space.lower), rtol=1e-5)
    assert policy.config.sampler == {'rf': 'euler', 'l1': 'regression'}.get(loss, 'average')
    assert policy.config.training['loss'] == loss
    assert policy.config.training['instructions'] == data.instructions
    assert len(losses_of(tmp_path / 'run')) == 2
    record = json.loads((tmp_path / 'run' / 'validation.jsonl').read_text())
    assert record['step'] == 2 and set(record['error']) == {'1', '2', '4'}
    assert all(len(values) == 3 and min(values) > 0 for values in record['error'].values())
    assert (tmp_path / 'run' / 'validation.png').stat().st_size > 5000


@pytest.mark.parametrize('changes', [
    {'guidance': 1.8, 'guidance_mix': 0.2, 'condition_dropout': 0.3}, {'dispersive': 0.3},
    {'dropout': 0.2, 'loss': 'central'}, {'accumulate': 2}, {'freeze': 'vision'},
    {'activation_checkpointing': True}, {'time_sampling': 'v1', 'one_step_proportion': 0.2},
    {'loss': 'rf', 'time_sampling': 'beta'}, {'h_in': 'decoder', 'max_frequency': 1000.0},
    {'dimension_weights': (1.0, 0.0, 3.0)}, {'normalization': 'mean_std'}])
def test_every_option_trains(data, tmp_path, changes):
    train(config(steps=2, **changes), data, tmp_path / 'run', ALONE)
    assert np.isfinite(losses_of(tmp_path / 'run')).all()
    Policy.load(tmp_path / 'run' / 'policy')


def objective(data, spoil=None, **changes):
    """Return the loss of a fixed batch and fixed weights under these options."""
    settings = config(batch_size=6, condition_dropout=0.4, **changes)
    _, loss, batch = training_rig.fixed_objective(settings, data)
    if spoil is not None:
        batch['chunk'][..., spoil] = 0.0
    ((part, moving),) = train_module.parts_of(batch, settings, 0, ALONE)
    return loss(part, moving).item()


@pytest.mark.parametrize('changes', [
    {'guidance': 1.8}, {'guidance_mix': 0.4}, {'dispersive': 0.3}, {'weight_eps': 0.5},
    {'weight_power': 0.5}, {'dimension_weights': (1.0, 0.0, 3.0)}, {'loss': 'improved'},
    {'loss': 'dpm', 'dpm_h_step': 0.3}, {'data_proportion': 0.0}, {'time_sampling': 'v1'},
    {'colour': 0.0}, {'shift_pixels': 0.0}, {'max_frequency': 100.0}])
def test_every_option_of_the_objective_changes_the_loss_of_the_same_batch(data, changes):
    assert objective(data, **changes) != objective(data)


def test_a_dimension_without_weight_does_not_count(data):
    ignored = {'dimension_weights': (1.0, 0.0, 1.0), 'loss': 'l1'}
    assert objective(data, spoil=1, **ignored) == objective(data, **ignored)
    assert objective(data, spoil=0, **ignored) != objective(data, **ignored)


def test_training_lowers_the_error_on_what_it_has_seen(data, tmp_path):
    train(config(steps=60, batch_size=16, validate_every=30, ema=0.9, learning_rate=1e-2), data,
          tmp_path / 'run', ALONE)
    first, last = (json.loads(line)['error']['1'] for line in
                   (tmp_path / 'run' / 'validation.jsonl').read_text().splitlines())
    assert sum(last) < 0.9 * sum(first)


def test_a_run_that_is_killed_at_any_moment_goes_on_bit_for_bit(data, tmp_path):
    settings = config(steps=14, save_every=3, validate_every=100, dropout=0.1)
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    train(settings, data, whole, ALONE)
    kills = 0
    for lines in (2, 5, 10):
        process = child.start(train, settings, data, killed, ALONE, errors=tmp_path / 'errors')
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if (killed / 'losses.jsonl').exists() and len(
                    (killed / 'losses.jsonl').read_text().splitlines()) >= lines:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.join()
    train(settings, data, killed, ALONE)
    assert kills >= 2
    assert losses_of(killed) == losses_of(whole) and len(losses_of(whole)) == 14
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(killed)[name]), name


def test_a_run_goes_on_only_with_the_configuration_that_it_began_with(data, tmp_path):
    train(config(save_every=2), data, tmp_path / 'run', ALONE)
    with pytest.raises(ValueError, match='learning_rate: 0.003 then, 0.1 now'):
        train(config(learning_rate=0.1), data, tmp_path / 'run', ALONE)


def test_a_finished_run_started_again_only_writes_its_checkpoint(data, tmp_path):
    train(config(), data, tmp_path / 'run', ALONE)
    before = losses_of(tmp_path / 'run')
    train(config(), data, tmp_path / 'run', ALONE)
    assert losses_of(tmp_path / 'run') == before


def test_only_the_newest_two_snapshots_are_kept(data, tmp_path):
    train(config(steps=6, save_every=1), data, tmp_path / 'run', ALONE)
    assert sorted(path.name for path in (tmp_path / 'run' / 'snapshots').iterdir()) == [
        'step_00000005', 'step_00000006']


def test_a_nonfinite_loss_stops_and_says_which_batch_it_was(data, tmp_path, monkeypatch):
    broken = dict(LOSSES, meanflow=lambda u, x, e, times, weights, **_: (
        u(x, t=times.t, h=times.t) * float('nan')).mean())
    settings = config(save_every=1)
    train(dataclasses.replace(settings, steps=4), data, tmp_path / 'fine', ALONE)
    monkeypatch.setattr('meanflow_ros.core.meanflow.LOSSES', broken)
    with pytest.raises(NonFiniteLoss, match='the loss of step 0 is nan'):
        train(settings, data, tmp_path / 'run', ALONE)
    found = json.loads((tmp_path / 'run' / 'nonfinite_step_0.json').read_text())
    assert len(found['rows']) == 4 and set(found['episodes']) <= set(data.episode_names)
    assert not (tmp_path / 'run' / 'policy').exists()
    assert not list((tmp_path / 'run' / 'snapshots').glob('step_*'))


def write_config(tmp_path, **changes):
    document = {'robot': to_plain(training_rig.ROBOT), 'image_size': 32, 'steps': 4,
                'batch_size': 4, 'noise_samples': 1, 'save_every': 2, **changes}
    path = tmp_path / 'config.yaml'
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def command(tmp_path):
    bag = training_rig.write_bag(tmp_path / 'data' / 'bag', episodes=3, steps=5)
    return [str(write_config(tmp_path)), '--data', str(bag.parent), '--out',
            str(tmp_path / 'run'), '--device', 'cpu', '--workers', '1']


def test_the_command_trains_and_takes_options_as_the_documents_write_them(
        command, tmp_path, capsys):
    assert main([*command, '--loss', 'dpm', '--dpm-h-step', '0.05', '--stop-target', 'true']) == 0
    assert 'checkpoint written to' in capsys.readouterr().out
    trained = Policy.load(tmp_path / 'run' / 'policy').config.training
    assert trained['loss'] == 'dpm' and trained['dpm_h_step'] == 0.05
    assert trained['stop_target'] is True and trained['stop_weight'] is None


def test_ctrl_c_says_how_to_go_on_and_leaves_the_last_snapshot(command, tmp_path, monkeypatch,
                                                              capsys):
    real, calls = train_module.parts_of, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train_module, 'parts_of', interrupted)
    assert main(command) == 130
    assert 'goes on from the last snapshot' in capsys.readouterr().err
    assert not (tmp_path / 'run' / 'policy').exists()
    monkeypatch.setattr(train_module, 'parts_of', real)
    assert main(command) == 0
    assert len(losses_of(tmp_path / 'run')) == 4


@pytest.mark.parametrize('error,status,message', [
    (OSError(errno.ENOSPC, 'No space left on device'), 1, 'free some space'),
    (torch.OutOfMemoryError('CUDA out of memory.\nmore'), 1, '--accumulate')])
def test_a_full_disk_or_memory_is_a_clear_error_and_the_last_snapshot_stays(
        command, tmp_path, monkeypatch, capsys, error, status, message):
    real, calls = train_module.Snapshots.save, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(train_module.Snapshots, 'save', full)
    assert main(command) == status
    assert message in capsys.readouterr().err
    monkeypatch.setattr(train_module.Snapshots, 'save', real)
    assert main(command) == 0


def test_a_data_set_that_vanished_is_a_clear_error(command, tmp_path, capsys):
    import shutil
    shutil.rmtree(tmp_path / 'data')
    assert main(command) == 2
    assert str(tmp_path / 'data') in capsys.readouterr().err


def test_a_data_set_without_anything_usable_lists_what_was_found(tmp_path, capsys):
    training_rig.write_bag(tmp_path / 'data' / 'bag', episodes=1, outcome='failure')
    path = write_config(tmp_path)
    assert main([str(path), '--data', str(tmp_path / 'data'), '--out', str(tmp_path / 'run'),
                 '--device', 'cpu', '--workers', '1']) == 2
    assert 'bag episode 0' in capsys.readouterr().err


@pytest.mark.parametrize('changes,message', [
    ({'loss': 'meanflw'}, 'loss must be one of'),
    ({'loss': 'rf', 'time_sampling': 'v1'}, "time_sampling 'v1' is not for loss 'rf'"),
    ({'time_sampling': 'beta'}, "time_sampling 'beta' is not for loss 'meanflow'"),
    ({'guidance': 2.0}, 'condition_dropout above 0'),
    ({'batch_size': 5, 'accumulate': 2}, 'multiple of accumulate'),
    ({'dimension_weights': [1.0]}, 'dimension_weights must be 3 numbers'),
    ({'warmup': 0.7, 'hold': 0.7}, 'together at most 1'),
    ({'steps': 'many'}, 'steps must be int'), ({'stop_target': 3}, 'stop_target must be bool')])
def test_a_configuration_that_cannot_work_is_refused_with_a_reason(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_train_config(write_config(tmp_path, **changes))


def test_a_typo_in_the_configuration_is_refused_with_the_right_name(tmp_path):
    path = tmp_path / 'typo.yaml'
    path.write_text(CONFIG.read_text() + 'lerning_rate: 0.1\n')
    with pytest.raises(ValueError, match="lerning_rate.*did you mean 'learning_rate'"):
        read_train_config(path)


def test_the_shipped_configuration_is_read():
    assert read_train_config(CONFIG).robot.robot == 'metaworld-sawyer'


def test_relative_actions_are_learned_as_differences_and_given_back_as_positions(tmp_path):
    from meanflow_ros.core.contract import Observation
    settings = config(data=dataclasses.replace(config().data, relative=True), steps=2)
    from meanflow_ros.training.cache import build_cache, open_cache
    bag = training_rig.write_bag(tmp_path / 'bag')
    build_cache([bag], settings.robot, settings.data, 32, tmp_path / 'cache')
    relative = open_cache(tmp_path / 'cache')
    np.testing.assert_allclose(relative.chunks[0, 0], [0.05, -0.07, 0.1], atol=1e-6)
    train(settings, relative, tmp_path / 'run', ALONE)
    policy = Policy.load(tmp_path / 'run' / 'policy')
    assert policy.config.relative_to == ('base', 'elbow', '')
    images = {name: np.full((16, 20, 3), 80, np.uint8) for name in policy.robot.camera_names}

    def chunk(elbow, base):
        return policy.act(Observation(stamp_ns=1, images=images, instruction='reach left',
                                      state=np.array([elbow, base])),
                          noise=torch.zeros(1, 5, 3)).actions

    normalizer = policy.config.state_normalizer
    far = normalizer.high + 1.0   # both beyond what the network sees: only the offset differs
    difference = chunk(far[0] + 0.5, far[1] + 0.25) - chunk(*far)
    np.testing.assert_allclose(difference, np.tile([0.25, 0.5, 0.0], (5, 1)), atol=1e-6)


def test_a_run_can_start_from_another_runs_checkpoint(data, tmp_path):
    train(config(), data, tmp_path / 'first', ALONE)
    start = str(tmp_path / 'first' / 'policy')
    train(config(initial=start, steps=1, learning_rate=1e-9), data, tmp_path / 'second', ALONE)
    first, second = weights_of(tmp_path / 'first'), weights_of(tmp_path / 'second')
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0.02, atol=1e-4)
    with pytest.raises(ValueError, match="sampler 'euler'"):
        train(config(initial=start, loss='rf'), data, tmp_path / 'third', ALONE)


def test_what_is_frozen_stays_as_it_was(data, tmp_path):
    train(config(freeze='encoder', ema=0.0), data, tmp_path / 'a', ALONE,
          weights_dtype=torch.float32)
    torch.manual_seed(0)
    fresh = train_module.make_policy(config(freeze='encoder', ema=0.0), data)
    trained = weights_of(tmp_path / 'a')
    for name, value in fresh.network.state_dict().items():
        same = torch.equal(value, trained[name])
        assert same == name.startswith('encoder.') or 'norm' in name, name


def test_tensorboard_gets_losses_and_errors_where_it_is_installed(data, tmp_path, monkeypatch):
    board = pytest.importorskip('tensorboard', reason='tensorboard is missing: .[train]')
    assert board
    monkeypatch.undo()
    training_rig.make_networks_small(monkeypatch)
    train(config(), data, tmp_path / 'run', ALONE)
    assert list((tmp_path / 'run' / 'tensorboard').glob('events.*'))


class WeightsAndBiases:
    """Takes the calls to the package `wandb`, and to the run that it gives."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_losses_rates_and_errors_of_every_joint(
        data, tmp_path, monkeypatch):
    stub = WeightsAndBiases()
    monkeypatch.setitem(sys.modules, 'wandb', stub)
    settings, out = config(steps=4, validate_every=3, save_every=2), tmp_path / 'run-7'
    train(settings, data, out, ALONE, wandb_project='arm')
    (begun,) = stub.begun
    assert begun['project'] == 'arm' and begun['id'] == 'run-7' and begun['dir'] == str(out)
    assert begun['config']['learning_rate'] == 3e-3 and begun['config']['loss'] == 'meanflow'
    assert begun['resume'] == 'allow' and stub.finished == 1
    losses = losses_of(out)
    scalars = [(step, values) for step, values in stub.logged if 'loss' in values]
    assert [step for step, _ in scalars] == [0, 1, 3]
    assert [values['loss'] for _, values in scalars] == pytest.approx(
        [losses[0], losses[1], (losses[2] + losses[3]) / 2])
    assert [values['learning_rate'] for _, values in scalars] == pytest.approx(
        [learning_rate(step, settings) for step in (0, 1, 3)])
    errors = [entry for entry in stub.logged if 'loss' not in entry[1]]
    written = [json.loads(line) for line in
               (out / 'validation.jsonl').read_text().splitlines()]
    names = training_rig.ROBOT.action_space.dimensions
    assert [step for step, _ in errors] == [3, 4]
    assert [values for _, values in errors] == [
        {f'error_nfe{steps}/{name}': value for steps in (1, 2, 4)
         for name, value in zip(names, record['error'][str(steps)], strict=True)}
        for record in written]


def test_weights_and_biases_that_is_not_installed_is_a_clear_error(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    logging.disable()
    with pytest.raises(ValueError, match='pip install wandb'):
        train(config(), data, tmp_path / 'run', ALONE, wandb_project='arm')
    logging.disable(logging.NOTSET)
