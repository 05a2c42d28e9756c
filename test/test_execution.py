"""Chunks that come late, followed on simulated time, and how smooth that is."""

import importlib.util
import json

import numpy as np
import pytest

from meanflow_ros.core.contract import ActionChunk, ActionSpace, CameraSpec, Observation, RobotSpec
from meanflow_ros.evaluation.delays import Cell, cells_of, rows_of, table
from meanflow_ros.evaluation.episodes import EpisodeResult
from meanflow_ros.evaluation.execution import Execution
from meanflow_ros.evaluation.smoothness import Recorder, Smoothness, percentiles, pooled

STEP_NS = 25_000_000
T0 = 10**9
SPACE = ActionSpace(name='odd', dimensions=('speed', 'place', 'grip'), units=('m/s', 'm', '1'),
                    lower=[-0.8, -0.3, -1.0], upper=[0.8, 0.1, 1.0], rates=('speed',),
                    gripper=('grip',))
ROBOT = RobotSpec(robot='arm', state_names=(), horizon=16, period_s=0.025, action_space=SPACE,
                  cameras=(CameraSpec(name='eye', width=8, height=8),))


def observation(now_ns):
    return Observation(stamp_ns=now_ns, state=None, instruction='go',
                       images={'eye': np.zeros((8, 8, 3), np.uint8)})


def chunk(now_ns, number):
    """Return a chunk whose speed is 0.1 number + 0.01 step."""
    actions = np.zeros((16, 3))
    actions[:, 0] = 0.1 * number + 0.01 * np.arange(16)
    return ActionChunk(actions=actions, stamp_ns=now_ns, period_s=0.025)


def run(kind, delay, steps=24, camera_every=4, recorder=None):
    """Return the speeds, the prefixes, and the steps at which a chunk was asked for."""
    execution = Execution(ROBOT, kind, delay_steps=delay, picture_ns=camera_every * STEP_NS)
    speeds, prefixes, asked = [], [], []
    for step in range(steps):
        now_ns = T0 + step * STEP_NS
        execution.receive(now_ns)
        if step % camera_every == 0 and execution.wants_chunk(now_ns):
            prefixes.append([round(float(row[0]), 3) for row in
                             execution.ask(observation(now_ns))])
            execution.answer(chunk(now_ns, len(asked)), now_ns)
            asked.append(step)
        due = execution.timeline.at(now_ns)
        speeds.append(None if due is None else round(float(due[0]), 3))
        followed = execution.timeline.followed
        if recorder is not None:
            recorder.note(due, followed.stamp_ns, now_ns, execution.planned(now_ns))
    return speeds, prefixes, asked


def test_without_a_delay_every_chunk_is_followed_from_its_first_step_on():
    speeds, prefixes, asked = run('receding_horizon', 0)
    assert asked == [0, 4, 8, 12, 16, 20] and speeds[:9] == [
        0.0, 0.01, 0.02, 0.03, 0.1, 0.11, 0.12, 0.13, 0.2]
    assert prefixes == [[]] * 6
    assert run('naive', 0)[0] == run('real_time', 0)[0] == speeds


def test_a_late_chunk_is_followed_by_its_due_times_and_a_naive_robot_begins_it_anew():
    speeds, _, asked = run('receding_horizon', 2)
    assert asked == [0, 4, 8, 12, 16, 20]
    assert speeds[:12] == [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.12, 0.13, 0.14, 0.15, 0.22, 0.23]
    speeds, _, _ = run('naive', 2)
    assert speeds[:12] == [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.11, 0.12, 0.13, 0.2, 0.21]


def test_one_chunk_is_asked_for_at_a_time():
    assert run('receding_horizon', 8)[2] == [0, 4, 12, 20]
    assert run('receding_horizon', 3)[2] == [0, 4, 8, 12, 16, 20]


def test_in_real_time_the_prefix_is_what_is_executed_while_the_chunk_comes():
    speeds, prefixes, asked = run('real_time', 4)
    assert asked == [0, 4, 8, 12, 16, 20] and prefixes[0] == []
    for step, prefix in zip(asked[1:-1], prefixes[1:]):
        assert prefix == speeds[step:step + 4] and len(prefix) == 4
    assert [len(prefix) for prefix in run('real_time', 8, steps=32)[1]] == [0, 8, 8, 8, 8]
    assert [len(prefix) for prefix in run('real_time:3', 2)[1]] == [0, 3, 3, 3, 3, 3]


def test_a_chunk_that_is_later_than_its_prefix_is_not_followed():
    speeds, _, _ = run('real_time:2', 4, steps=16)
    assert speeds == [round(0.01 * step, 3) for step in range(16)]


def test_an_open_loop_asks_at_the_last_picture_that_is_early_enough():
    assert run('open_loop', 0, steps=36)[2] == [0, 16, 32]
    speeds, _, asked = run('open_loop', 3, steps=36)
    assert asked[:2] == [0, 12] and None not in speeds
    assert speeds[15:18] == [0.15, 0.14, 0.15]


def test_a_seam_is_a_change_of_the_chunk_that_is_followed():
    recorder = Recorder(SPACE, 0.025, 16)
    run('naive', 2, steps=11, recorder=recorder)
    found = recorder.result()
    assert found.seams == (0.03125, 0.04375)          # 0.05 and 0.07 of 1.6 m/s
    assert len(found.inside) == 8 and set(found.inside) == {0.00625}
    # 0.04 + 0.05, then 0.12 + 0.13 m/s were commanded, and nothing of the new chunk, of 0.64 m.
    assert found.positions == pytest.approx((0.09 * 0.025 / 0.64, 0.25 * 0.025 / 0.64), abs=1e-5)
    jerk = np.diff(run('naive', 2, steps=11)[0], n=2) / 0.025**2
    assert found.jerk[1] == 9 + 8
    assert found.jerk[0] == pytest.approx(np.sqrt((jerk**2).sum() / 17))


def test_paths_that_agree_until_the_seam_do_not_jump_whatever_the_change_is():
    recorder = Recorder(SPACE, 0.025, 16)
    for step, (speed, place) in enumerate([(0.2, 0.1), (0.4, 0.0), (0.0, -0.2)]):
        planned = np.array([[0.3, 0.1, 1.0], [0.3, 0.0, 1.0]])   # as far, and at the same place
        recorder.note(np.array([speed, place, -1.0]), 7 if step < 2 else 8,
                      T0 + step * STEP_NS, (planned, T0))
    found = recorder.result()
    assert found.positions == (0.0,) and found.seams == (0.5,) and found.inside == (0.25,)
    recorder.note(np.array([0.0, -0.2, 1.0]), 9, T0 + 3 * STEP_NS,
                  (np.array([[0.0, -0.1, 1.0]]), T0 + 2 * STEP_NS))
    assert recorder.result().positions == (0.0, 0.25)           # 0.1 m of 0.4 m
    assert recorder.result().seams == (0.5, 0.0)                # the gripper does not count


def test_the_first_chunk_is_no_seam_and_a_stop_between_two_is():
    recorder = Recorder(SPACE, 0.025, 16)
    nothing = np.zeros((0, 3)), T0 + 10**9
    for step, (speed, stamp) in enumerate([(0.0, None), (0.8, 1), (0.8, 1), (0.0, None),
                                           (0.4, 2)]):
        recorder.note(np.array([speed, 0.0, 0.0]), stamp, T0 + step * STEP_NS, nothing)
    found = recorder.result()
    assert found.seams == (0.5, 0.25) and found.inside == (0.0,)


def result(execution='naive', delay=2, success=True, seams=(0.1, 0.2), task='reach'):
    return EpisodeResult(
        task=task, seed=1, instruction='do', success=success, steps=50, starved_steps=5, chunks=3,
        latency_p50_ms=7.5, latency_p99_ms=9.0, execution=execution, delay_steps=delay,
        smoothness=Smoothness(seams=seams, inside=(0.01,), positions=(), jerk=(3.0, 40)))


def test_episodes_are_pooled_by_mode_and_delay():
    rows = rows_of([result(), result(success=False, seams=(0.6,)), result(delay=4)])
    assert [(row['execution'], row['delay_steps'], row['successes'], row['episodes'])
            for row in rows] == [('naive', 2, 1, 2), ('naive', 4, 1, 1)]
    assert rows[0]['smoothness']['seams'] == percentiles([0.1, 0.2, 0.6])
    assert percentiles([0.1, 0.2, 0.6])['p50'] == 20.0 and percentiles([]) == {}
    assert rows[0]['tasks'] == {'reach': [1, 2]} and rows[0]['starved_steps'] == 10
    lines = table(rows).splitlines()
    assert len(lines) == 4 and '| 2 | `naive` | 1/2 (50.0%) |  | 20.0 / ' in lines[2]
    json.dumps(rows)


def test_the_jerk_of_many_episodes_is_that_of_all_their_steps():
    def jerky(rms, count):
        return Smoothness(seams=(), inside=(), positions=(), jerk=(rms, count))

    assert pooled([jerky(3.0, 10), jerky(5.0, 30)])['jerk_rms'] == pytest.approx(
        np.sqrt((9 * 10 + 25 * 30) / 40))


def test_what_a_checkpoint_was_not_trained_for_is_refused():
    assert cells_of(['naive', 'real_time'], [0, 3], ROBOT, 3) == [
        Cell('naive', 0), Cell('real_time', 0), Cell('naive', 3), Cell('real_time', 3)]
    for kinds, delays, longest, message in (
            (['real_time'], [4], 3, "'real_time' gives 4 steps .* at most 3 .train --max-prefix"),
            (['real_time:5'], [2], 3, 'gives 5 steps'), (['backward'], [0], 0, 'must be'),
            (['naive'], [16], 0, 'less than the horizon'), (['naive'], [-1], 0, 'must be 0 to')):
        with pytest.raises(ValueError, match=message):
            cells_of(kinds, delays, ROBOT, longest)


@pytest.mark.skipif(importlib.util.find_spec('metaworld') is None, reason='metaworld is missing')
def test_modes_and_delays_are_compared_by_one_command(tmp_path, capsys):
    from meanflow_ros.evaluation import evaluate
    out = tmp_path / 'delays.json'
    assert evaluate.main([
        'sim', '--in-process', '--execution', 'naive', 'real_time', '--delay-steps', '4',
        '--episodes', '1', '--tasks', 'drawer-close', '--workers', '1', '--out', str(out)]) == 0
    naive, real_time = json.loads(out.read_text())['rows']
    assert (naive['execution'], real_time['execution']) == ('naive', 'real_time')
    assert real_time['smoothness']['positions']['max'] < 0.01 < 5 < (
        naive['smoothness']['positions']['p50'])
    assert '| 4 | `real_time` | 1/1 (100.0%) |' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main(['sim', '--execution', 'naive'])
    assert evaluate.main(['sim', '--in-process', '--execution', 'real_time', '--delay-steps',
                          '9', '--tasks', 'drawer-close', '--episodes', '1']) == 1
    assert 'trained for at most 8' in capsys.readouterr().err
