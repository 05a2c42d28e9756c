"""Many robots in processes of their own, and one process that answers them."""

import importlib.util
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec('metaworld') is None:
    pytest.skip('the simulator (pip install metaworld==3.1.1 packaging) is missing',
                allow_module_level=True)

import torch  # noqa: E402
from micro_policy import make_policy  # noqa: E402

from meanflow_ros.core.contract import ActionChunk, CameraSpec, RobotSpec  # noqa: E402
from meanflow_ros.core.dit import DiTConfig  # noqa: E402
from meanflow_ros.core.normalize import Normalizer  # noqa: E402
from meanflow_ros.core.policy import Policy  # noqa: E402
from meanflow_ros.evaluation import closed_loop, evaluate  # noqa: E402
from meanflow_ros.evaluation.closed_loop import EXPERT, Job, run_episodes  # noqa: E402
from meanflow_ros.evaluation.episodes import (  # noqa: E402
    EpisodeResult, print_summary, summarize)
from meanflow_ros.sim.metaworld_robot import ACTION_SPACE, MetaWorldRobot  # noqa: E402
from meanflow_ros.sim.scene import CAMERAS, JOINTS  # noqa: E402

WIDTH, HEIGHT = 40, 24
SPEC = RobotSpec(
    robot='sawyer', state_names=JOINTS[:3], action_space=ACTION_SPACE, horizon=16, period_s=0.025,
    cameras=tuple(CameraSpec(name=name, width=WIDTH, height=HEIGHT) for name in CAMERAS))


@pytest.fixture(scope='module', autouse=True)
def simulator():
    try:
        MetaWorldRobot(image_width=16, image_height=16).reset('reach', 0)
    except RuntimeError as error:
        pytest.skip(str(error))


def job(task='reach', seed=100_000, **changes):
    return Job(**{'policy': 'p', 'task': task, 'seed': seed, 'instruction': 'go',
                  'max_steps': 12, **changes})


@dataclass
class Acts:
    """Answers with `velocity(observation)` for as many steps as the horizon."""

    velocity: object
    robot: RobotSpec = SPEC
    batches: list = None

    def __call__(self, observations, noise_seeds, prefixes):
        if self.batches is not None:
            self.batches.append(len(observations))
        return [ActionChunk(
            actions=np.tile([*self.velocity(observation, seed), 1.0], (SPEC.horizon, 1)),
            stamp_ns=observation.stamp_ns, period_s=SPEC.period_s)
            for observation, seed in zip(observations, noise_seeds)]


class OneByOne:
    """The micro policy for the simulated robot; its chunk does not depend on who else asks."""

    def __init__(self):
        micro = make_policy()
        limits = ACTION_SPACE.upper
        config = replace(
            micro.config, robot=SPEC,
            action_normalizer=Normalizer(low=-limits, high=limits),
            state_normalizer=Normalizer(low=np.full(3, -3.1), high=np.full(3, 3.3)),
            dit=replace(micro.config.dit, action_spaces={'eef_velocity': 4},
                        state_sizes={'eef_velocity': 3}))
        assert isinstance(config.dit, DiTConfig)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self._policy = Policy.create(config, micro.network.encoder.tokenizer)
            for value in self._policy.network.dit.state_dict().values():
                if value.is_floating_point() and not value.any():
                    value.normal_(0.0, 0.3)
        self.robot = SPEC
        self.seen = {}

    def __call__(self, observations, noise_seeds, prefixes):
        chunks = [self._policy.act(observation, seed=seed)
                  for observation, seed in zip(observations, noise_seeds)]
        for chunk, seed in zip(chunks, noise_seeds):
            self.seen.setdefault(seed, []).append(chunk.actions.copy())
        return chunks


def without_times(result):
    return replace(result, latency_p50_ms=0.0, latency_p99_ms=0.0)


def test_many_robots_give_the_bits_of_one_after_the_other():
    jobs = [job(seed=100_000 + number, noise_seed=number, task=task, max_steps=48)
            for number, task in enumerate(['reach', 'press-any', 'reach'])]
    together, alone = OneByOne(), OneByOne()
    batched = run_episodes({'p': together}, jobs, 2, camera_every=8)
    robot = MetaWorldRobot(image_width=WIDTH, image_height=HEIGHT)
    single = [closed_loop.run_episode(alone, robot, each, camera_every=8) for each in jobs]
    robot.close()
    assert list(map(without_times, batched)) == list(map(without_times, single))
    assert together.seen.keys() == alone.seen.keys() == {0, 1, 2}
    for seed, chunks in alone.seen.items():
        assert len(chunks) == 6 or batched[seed].success
        np.testing.assert_array_equal(together.seen[seed], chunks)


def test_results_come_in_the_order_of_the_jobs_whoever_ends_first():
    told = []
    acts = {'still': Acts(lambda *_: (0.0, 0.0, 0.0)),
            'up': Acts(lambda observation, seed: (0.0, 0.0, 0.3 * seed))}
    jobs = [job('press-any', 100_000 + seed, policy=policy, noise_seed=seed % 2, max_steps=40)
            for seed in range(3) for policy in acts]
    jobs.insert(2, job('press-any', 100_001, policy=EXPERT))
    results = run_episodes(acts, jobs, 2, camera_every=30,
                           progress=lambda _, result: told.append(result))
    assert [(r.task, r.seed) for r in results] == [(j.task, j.seed) for j in jobs]
    assert sorted(map(id, told)) == sorted(map(id, results))
    expert = results[2]
    assert expert.success and expert.mode in ('left', 'right', 'far') and expert.steps < 15
    assert not any(r.success or r.mode for r in results if r is not expert)
    assert {r.starved_steps for r in results if r is not expert} == {40 - SPEC.horizon - 10}


def test_whatever_waits_is_answered_as_one_batch():
    acts = Acts(lambda *_: time.sleep(0.05) or (0.0, 0.0, 0.0), batches=[])
    run_episodes({'p': acts}, [job(seed=100_000 + n) for n in range(3)], 3, camera_every=1)
    assert sum(acts.batches) == 36 and max(acts.batches) > 1


def test_a_blanked_camera_is_grey_and_the_other_is_not():
    seen = []
    acts = Acts(lambda observation, _: seen.append(observation.images) or (0.0, 0.0, 0.0))
    robot = MetaWorldRobot(image_width=WIDTH, image_height=HEIGHT)
    closed_loop.run_episode(acts, robot, job(blank_cameras=('wrist',)))
    robot.close()
    assert len(seen) == 3   # at steps 0, 4 and 8
    for images in seen:
        assert (images['wrist'] == 128).all() and images['wrist'].shape == (HEIGHT, WIDTH, 3)
        assert len(np.unique(images['static'])) > 20


def test_the_policy_sees_what_the_worker_saw():
    def look(kept):
        return Acts(lambda observation, _: kept.append(
            (observation.state, *map(np.copy, observation.images.values()),
             observation.instruction)) or (0.1, 0.0, 0.0))

    here, there = [], []
    robot = MetaWorldRobot(image_width=WIDTH, image_height=HEIGHT)
    closed_loop.run_episode(look(here), robot, job(blank_cameras=('static',)))
    robot.close()
    run_episodes({'p': look(there)}, [job(blank_cameras=('static',))], 1)
    for one, other in zip(here, there):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(here) == 3 and here[0][3] == 'go' and here[0][0].shape == (3,)


def test_an_error_in_a_worker_names_task_and_seed_and_leaves_no_process(monkeypatch):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(closed_loop.subprocess, 'Popen',
                        lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    acts = Acts(lambda *_: (0.0, 0.0, 0.0))
    jobs = [job(seed=100_000), job('push', seed=-1), job(seed=100_001)]
    with pytest.raises(RuntimeError, match='episode push with seed -1 failed: ValueError: seed'):
        run_episodes({'p': acts}, jobs, 2)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_worker_that_dies_is_named_by_its_episode(monkeypatch):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(closed_loop.subprocess, 'Popen',
                        lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    acts = Acts(lambda *_: started[0].kill() or (0.0, 0.0, 0.0))
    with pytest.raises(RuntimeError, match='reach with seed 100000 failed: .* code -9'):
        run_episodes({'p': acts}, [job()], 1)


def test_a_policy_that_fails_ends_the_run_and_every_worker(monkeypatch):
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(closed_loop.subprocess, 'Popen',
                        lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    with pytest.raises(ZeroDivisionError):
        run_episodes({'p': Acts(lambda *_: 1 / 0)}, [job()], 1)
    assert all(process.poll() is not None for process in started)


def test_ctrl_c_leaves_no_process_behind():
    script = ('from meanflow_ros.evaluation import closed_loop\n'
              'real = closed_loop.subprocess.Popen\n'
              'def start(*a, **k):\n'
              '    child = real(*a, **k); print(child.pid, flush=True); return child\n'
              'closed_loop.subprocess.Popen = start\n'
              'closed_loop.expert_ceiling(["reach"], range(9999), 1,\n'
              '                           progress=lambda *_: print("one", flush=True))\n')
    parent = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == 'one\n' and Path(f'/proc/{pid}').exists()
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode != 0 and 'KeyboardInterrupt' in errors
    assert not Path(f'/proc/{pid}').exists()


@pytest.mark.parametrize('changes, message', [
    ({'workers': 0}, 'workers must be at least 1, got 0'),
    ({'camera_every': 0}, 'camera_every must be at least 1'),
    ({'jobs': [job('dance')]}, "unknown task 'dance'"),
    ({'jobs': [job(policy='q')]}, "asks for the policy 'q', there is p"),
    ({'jobs': [job(blank_cameras=('top',))]}, "no camera 'top' to blank"),
    ({'robot': replace(SPEC, cameras=(CameraSpec(name='top', width=9, height=9),))},
     "has no camera 'top', only static, wrist"),
    ({'robot': replace(SPEC, cameras=(SPEC.cameras[0], CameraSpec(
        name='wrist', width=9, height=9)))}, 'have one size'),
    ({'robot': replace(SPEC, action_space=replace(
        ACTION_SPACE, dimensions=('a', 'b', 'c', 'd'), rates=(), gripper=()))},
     "the policy commands .'a', 'b'"),
])
def test_what_cannot_run_is_refused_before_it_starts(changes, message):
    changes = {'jobs': [job()], 'workers': 1, **changes}
    acts = Acts(None, changes.pop('robot', SPEC))
    with pytest.raises(ValueError, match=message):
        run_episodes({'p': acts}, **changes)


def test_the_ceiling_is_what_the_experts_reach():
    results = closed_loop.expert_ceiling(['press-any'], range(99_999, 100_002), 1)
    assert all(result.success for result in results)
    assert sorted(result.mode for result in results) == ['far', 'left', 'right']


def test_a_worker_does_not_load_torch():
    code = ('import sys, meanflow_ros.evaluation.episode_worker\n'
            'sys.exit("torch" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def result(task, *, success, mode=''):
    return EpisodeResult(task=task, seed=1, instruction='go', success=success, steps=7,
                         starved_steps=0, chunks=2, latency_p50_ms=3.0, latency_p99_ms=4.0,
                         mode=mode)


def test_the_summary_shows_the_share_of_each_mode_where_there_are_modes(capsys):
    summary = summarize([
        result('pass-wall', success=True, mode='right'), result('pass-wall', success=False),
        result('pass-wall', success=True, mode='left'), result('reach', success=True),
        result('pass-wall', success=True, mode='right')])
    assert summary['pass-wall']['modes'] == {'left': 1, 'right': 2}
    assert 'modes' not in summary['reach']
    print_summary(summary)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith('left 33%, right 67%') and lines[2].endswith('3.0')


def test_a_camera_is_blanked_without_ros_only(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(['sim', '--blank-camera', 'wrist'])
    assert '--blank-camera needs --in-process' in capsys.readouterr().err
