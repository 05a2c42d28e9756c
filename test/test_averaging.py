"""A direct regression (L1) of the experts' commands, from the state: where averaging fails."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec('metaworld') is None:
    pytest.skip('the simulator (pip install metaworld==3.1.1 packaging) is missing',
                allow_module_level=True)

from meanflow_ros.sim.demonstrations import disturbances  # noqa: E402
from meanflow_ros.sim.metaworld_robot import ACTION_SPACE, MetaWorldRobot  # noqa: E402

torch.set_num_threads(1)
STEPS, EVERY = 16, 8
UPPER = ACTION_SPACE.upper


@pytest.fixture(scope='module')
def robot():
    made = MetaWorldRobot(image_width=16, image_height=16)
    try:
        made.reset('reach', 0)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def state_of(robot):
    """Return where the hand, the goal and the obstacle are."""
    env = robot._scene.env
    return np.array([*env.get_endeff_pos(), *env._target_pos, getattr(env, '_wall', 0.0)])


def demonstrations(robot, task, seeds):
    """Return states (N, 7) and the chunks (N, 16, 4) of the expert that follow, in -1 to 1."""
    states, chunks = [], []
    for seed in seeds:
        robot.reset(task, seed)
        noise, seen, told = disturbances(0.09, seed, quiet_steps=4), [], []
        for _ in range(80):
            told.append(robot.expert_action() / UPPER)
            seen.append(state_of(robot))
            if robot.step(told[-1] * UPPER + next(noise)).success:
                break
        told += [told[-1]] * STEPS
        states += seen
        chunks += [np.array(told[start:start + STEPS]) for start in range(len(seen))]
    return np.array(states), np.array(chunks)


def regression(states, chunks):
    """Return a function from state to chunk that was trained with an absolute error."""
    torch.manual_seed(0)
    mean, deviation = states.mean(axis=0), states.std(axis=0) + 1e-6
    x = torch.tensor((states - mean) / deviation, dtype=torch.float32)
    y = torch.tensor(chunks, dtype=torch.float32).flatten(1)
    network = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 128), torch.nn.GELU(), torch.nn.Linear(128, 128),
        torch.nn.GELU(), torch.nn.Linear(128, y.shape[1]))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(600):
        for group in optimizer.param_groups:
            group['lr'] = 3e-3 * (1 - step / 600)
        rows = torch.randint(len(x), (128,))
        loss = (network(x[rows]) - y[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def chunk(state):
        seen = torch.tensor((state - mean) / deviation, dtype=torch.float32)
        return network(seen).view(STEPS, -1).numpy().clip(-1, 1)

    return chunk


@pytest.mark.parametrize('task, succeeds', [('reach', 6), ('pass-wall', 0), ('pass-block', 0)])
def test_direct_regression_does_what_has_one_way_and_fails_between_two(robot, task, succeeds):
    chunk = regression(*demonstrations(robot, task, range(1000, 1060)))
    successes = 0
    for seed in range(100_000, 100_006):
        robot.reset(task, seed)
        for step in range(120):
            if step % EVERY == 0:
                actions = chunk(state_of(robot))
            if robot.step(actions[step % EVERY] * UPPER).success:
                successes += 1
                break
    assert successes == succeeds
