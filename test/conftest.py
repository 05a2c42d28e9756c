"""Every test run has ROS to itself, on this computer and in a domain of its own."""

import os

import pytest

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(os.getpid() % 101 + 1))
os.environ.setdefault('OMP_NUM_THREADS', '1')  # on a busy machine more threads wait for each other


@pytest.fixture(scope='session')
def micro_checkpoint(tmp_path_factory):
    """Return the directory of a tiny checkpoint with random weights, see micro_policy.py."""
    from micro_policy import make_policy
    path = tmp_path_factory.mktemp('checkpoints') / 'micro'
    make_policy().save(path)
    return path
