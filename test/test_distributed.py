"""Several processes compute what one does."""

import os
import socket

import child
import pytest
import torch
import training_rig

from meanflow_ros.core.policy import Policy
from meanflow_ros.training.distributed import full_weights, join_group, leave_group, wrap
from meanflow_ros.training.draws import draw_rows
from meanflow_ros.training.gradients import Gradients, in_one_tensor
from meanflow_ros.training.objective import TrainingLoss
from meanflow_ros.training.policy import make_policy
from meanflow_ros.training.train import parts_of, train

pytestmark = pytest.mark.usefixtures('small_networks')
ALONE, losses_of = training_rig.ALONE, training_rig.losses_of


def on_ranks(function, *arguments, errors, size=2):
    """Run `function(group, *arguments)` in `size` processes that know each other."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [child.start(_rank, function, arguments, rank, size, port,
                             errors=errors / f'rank{rank}') for rank in range(size)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [None or 0] * size, (
        errors / 'rank0').read_text()[-3000:]


def _rank(function, arguments, rank, size, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    group = join_group('cpu')
    function(group, *arguments)
    leave_group(group)


def gradients(group, config, data, strategy, path):
    """Save the gradient of the first step and, if they are whole, nothing else."""
    torch.manual_seed(0)
    policy = make_policy(config, data)
    network = policy.network.train().requires_grad_(True)
    for value in network.dit.state_dict().values():     # gates begin as zero
        if value.is_floating_point() and not value.any():
            value.normal_(0.0, 0.3)
    loss = TrainingLoss(network, config, policy.config, data.instructions)
    model = wrap(loss, group, strategy, captured=strategy == 'graph')
    parameters = list(model.parameters())
    adder = Gradients(model, parameters, captured=False, scale=1 / config.accumulate)
    rows = draw_rows(config, 0, data.split(0.0)[0], group.share)
    batch = data.gather(rows).tensors()
    for index, (part, moving) in enumerate(parts_of(batch, config, 0, group)):
        adder.add(part, moving, synchronize=index + 1 == config.accumulate)
    if strategy == 'graph':
        group.average(in_one_tensor(parameters))
    whole = {name: value.grad.full_tensor() if hasattr(value.grad, 'full_tensor') else value.grad
             for name, value in loss.network.named_parameters()}
    assert full_weights(model, group) or group.rank
    if group.first:
        torch.save(whole, path)


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp', 'graph'])
@pytest.mark.parametrize('loss', ['meanflow', 'dpm'])
def test_the_gradients_of_two_processes_are_those_of_one(data, tmp_path, strategy, loss):
    config = training_rig.config(batch_size=8, loss=loss)
    gradients(ALONE, config, data, 'ddp', tmp_path / 'one')
    on_ranks(gradients, config, data, strategy, tmp_path / 'two', errors=tmp_path)
    one, two = torch.load(tmp_path / 'one'), torch.load(tmp_path / 'two')
    assert one.keys() == two.keys()
    scale = max(value.abs().max() for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5 * scale.item(), msg=name)


def test_a_batch_in_parts_has_the_gradients_of_the_whole(data, tmp_path):
    whole = training_rig.config(batch_size=8)
    gradients(ALONE, whole, data, 'ddp', tmp_path / 'one')
    gradients(ALONE, training_rig.config(batch_size=8, accumulate=4), data, 'ddp',
              tmp_path / 'four')
    one, four = torch.load(tmp_path / 'one'), torch.load(tmp_path / 'four')
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_recomputed_activations_give_the_same_gradients(data, tmp_path):
    for name, recompute in (('kept', False), ('again', True)):
        gradients(ALONE, training_rig.config(activation_checkpointing=recompute), data, 'ddp',
                  tmp_path / name)
    kept, again = torch.load(tmp_path / 'kept'), torch.load(tmp_path / 'again')
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-8, msg=name)


def whole_run(group, config, data, out, strategy):
    train(config, data, out, group, strategy=strategy)


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_a_run_of_two_processes_ends_in_one_checkpoint_and_goes_on_in_one(
        data, tmp_path, strategy):
    config = training_rig.config(steps=3, batch_size=8, save_every=2, learning_rate=1e-3)
    train(config, data, tmp_path / 'one', ALONE)
    on_ranks(whole_run, config, data, tmp_path / 'two', strategy, errors=tmp_path)
    one, two = losses_of(tmp_path / 'one'), losses_of(tmp_path / 'two')
    assert two == pytest.approx(one, rel=1e-4) and len(one) == 3
    Policy.load(tmp_path / 'two' / 'policy')
    (tmp_path / 'two' / 'snapshots' / 'step_00000003').rename(tmp_path / 'taken away')
    train(config, data, tmp_path / 'two', ALONE)
    assert losses_of(tmp_path / 'two') == pytest.approx(one, rel=1e-4)
