"""The whole system: two processes on real DDS, driven as `demo` and `evaluate` drive it."""

import importlib.util
import json
import subprocess
import sys

import pytest

for package, extra in (('rclpy', 'ROS 2'), ('metaworld', '.[sim]'), ('av', '.[sim]')):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'{package} is missing: install {extra}', allow_module_level=True)

from meanflow_ros.evaluation import evaluate  # noqa: E402
from meanflow_ros.evaluation.episodes import (  # noqa: E402
    EpisodeResult, success_interval, summarize)


def result(task, success, steps=10):
    return EpisodeResult(task=task, seed=1, instruction='do', success=success, steps=steps,
                         starved_steps=0, chunks=3, latency_p50_ms=7.5, latency_p99_ms=9.0)


def test_the_interval_of_a_rate_is_wilsons():
    low, high = success_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert success_interval(50, 50)[1] == 1.0


def test_a_summary_counts_each_task_by_itself():
    summary = summarize([result('a', True, 11), result('b', False), result('a', False, 14)])
    assert summary['a']['rate'] == 0.5 and summary['a']['steps'] == 12.5
    assert summary['b'] | {'low': 0, 'high': 0} == {
        'episodes': 1, 'successes': 0, 'rate': 0.0, 'low': 0, 'high': 0, 'steps': 10.0,
        'latency_p50_ms': 7.5}


def test_demo_runs_episodes_and_leaves_video_plot_and_bag(tmp_path):
    from meanflow_ros.ros.bag import read_messages
    ended = subprocess.run(
        [sys.executable, '-m', 'meanflow_ros.evaluation.demo', '--out', str(tmp_path),
         '--episodes', '2', '--tasks', 'faucet-open', 'faucet-close'],
        capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert '2 of 2 episodes succeeded' in ended.stdout
    topics = [topic for topic, _, _ in read_messages(tmp_path / 'bag')]
    chunks = topics.count('/action_chunk')
    assert chunks >= 10 and topics.count('/camera/static/image_raw') == chunks
    for name in ('demo.mp4', 'motion.png', 'strip.png'):
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_node_that_dies_ends_the_evaluation_with_what_it_said(tmp_path, capsys):
    code = evaluate.main(['sim', '--episodes', '1', '--tasks', 'faucet-open',
                          '--checkpoint', str(tmp_path / 'nowhere')])
    assert code == 1
    assert 'nowhere does not exist' in capsys.readouterr().err


def test_evaluation_in_one_process_writes_every_episode(tmp_path):
    out = tmp_path / 'result.json'
    assert evaluate.main(['sim', '--in-process', '--episodes', '1', '--tasks', 'drawer-close',
                          '--out', str(out)]) == 0
    document = json.loads(out.read_text())
    assert document['summary']['drawer-close']['successes'] == 1
    assert document['episodes'][0]['seed'] == 100_000
