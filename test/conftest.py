"""Every test run has ROS to itself, on this computer and in a domain of its own."""

import os

import pytest

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(os.getpid() % 101 + 1))
if 'PYTEST_XDIST_WORKER' in os.environ:    # so has each of the processes that share the tests
    number = int(os.environ['PYTEST_XDIST_WORKER'].lstrip('gw'))
    os.environ['ROS_DOMAIN_ID'] = str((int(os.environ['ROS_DOMAIN_ID']) + 13 * number) % 101 + 1)
os.environ.setdefault('OMP_NUM_THREADS', '1')  # on a busy machine more threads wait for each other


@pytest.fixture(scope='session')
def micro_checkpoint(tmp_path_factory):
    """Return the directory of a tiny checkpoint with random weights, see micro_policy.py."""
    from micro_policy import make_policy
    path = tmp_path_factory.mktemp('checkpoints') / 'micro'
    make_policy().save(path)
    return path


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Return the training pairs of a tiny bag, see training_rig.py."""
    import training_rig
    return training_rig.make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture
def small_networks(monkeypatch):
    """Let the trainer build tiny networks, on one thread and without TensorBoard."""
    import torch
    import training_rig
    torch.set_num_threads(1)
    training_rig.make_networks_small(monkeypatch)
    monkeypatch.setattr('meanflow_ros.training.record._tensorboard', lambda *_: None)
