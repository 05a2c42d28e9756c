"""Replays of bags made by hand, whose metrics are known exactly."""

from __future__ import annotations

import dataclasses

import made_bags as made
import numpy as np
import pytest
from made_bags import MS, ROBOT, T0, Scene, status, text
from meanflow_ros.evaluation.replay.statistics import Sums, rank_correlation, with_interval
from replay_rig import Fake, commanded, offsets, replay

OFFSETS = (0.003, 0.007, 0.013, 0.029, 0.053)


def one_episode(path, length_ms: int = 800, camera_ms: int = 40, delay_ms: int = 0, **changes):
    """Write one episode: pictures every `camera_ms`, commands every 20 ms, the same stamps."""
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('pick up block 0'))
    end_ns = scene.robot(T0, length_ms * MS, camera_ns=camera_ms * MS, delay_ns=delay_ms * MS,
                         **changes)
    scene.add('episode', end_ns, status('success', 0))
    scene.write(path)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """Return a bag of one plain episode."""
    path = tmp_path_factory.mktemp('bags') / 'plain'
    one_episode(path)
    return path


def seconds_missing(document) -> dict[str, float]:
    return {what: cause['seconds'] for what, cause in document['missing_input']['causes'].items()}


def test_the_recorded_commands_as_the_policy_have_no_error_at_any_latency(plain):
    for latency_ms in (0, 35):
        document, _, _ = replay(plain, latency_ms=latency_ms)
        assert document['counts']['compared_steps'] > 30
        assert set(document['executed']['max'].values()) == {0.0}
        assert set(np.concatenate([document['horizon']['p99'][name]
                                   for name in ROBOT.action_space.dimensions])) == {0.0}
        assert document['relative_error']['value'] == 0.0


def test_every_step_of_the_horizon_has_its_own_error(plain):
    document, _, _ = replay(plain, Fake(error=offsets(*OFFSETS)))
    for what in ('mae', 'rmse', 'p50', 'p90', 'p99'):
        np.testing.assert_allclose(document['horizon'][what]['base'], OFFSETS, atol=1e-12)
        np.testing.assert_allclose(document['horizon'][what]['elbow'], 0.0, atol=1e-12)


def test_latency_decides_which_steps_of_a_chunk_are_executed(plain):
    # An observation is complete 1 ms after its stamp and its chunk is ready after 36 ms: step 2
    # (40 ms) is the first that is still due. The next chunk is ready 40 ms later: step 3 is last.
    document, (episode,), _ = replay(plain, Fake(error=offsets(*OFFSETS)), latency_ms=35)
    assert document['first_step_mae']['base'] == pytest.approx(OFFSETS[2], abs=1e-12)
    steps = episode.step[episode.source >= 0]
    assert steps.tolist() == [2, 3] * 19
    np.testing.assert_allclose(document['executed']['mae']['base'], np.mean(
        [OFFSETS[step] for step in steps]), atol=1e-12)
    np.testing.assert_allclose(document['executed']['rmse']['base'] ** 2,
                               (OFFSETS[2] ** 2 + OFFSETS[3] ** 2) / 2, rtol=1e-9)
    assert document['latency_ms']['p50'] == document['latency_ms']['max'] == 35.0
    # 40 and 60 ms after the stamp, by turns; after 41 ms a newer observation has been taken.
    assert document['observation_age_s']['p50'] == pytest.approx(0.05, abs=1e-9)
    assert document['observation_age_s']['max'] == pytest.approx(0.06, abs=1e-9)
    assert document['stale'] == {'count': 19, 'share': 0.5}
    assert document['start_s']['p50'] == pytest.approx(0.04)
    assert document['deadline_misses']['count'] == 0


def test_without_latency_the_newest_step_is_executed_and_nothing_is_stale(plain):
    document, (episode,), _ = replay(plain, Fake(error=offsets(*OFFSETS)))
    assert document['stale']['count'] == 0
    assert episode.step[episode.source >= 0][:4].tolist() == [1, 2, 1, 2]   # complete after 1 ms
    assert document['first_step_mae']['base'] == pytest.approx(OFFSETS[1], abs=1e-12)


def test_a_control_step_without_an_action_is_a_missed_deadline(tmp_path):
    # Every 200 ms a chunk of 100 ms: its steps 2, 3, 4 are due after 31 ms, the other 7 are not.
    one_episode(tmp_path / 'bag', length_ms=1000, camera_ms=200)
    document, (episode,), _ = replay(tmp_path / 'bag', Fake(), latency_ms=30)
    assert (episode.source >= 0).sum() == 5 * 3
    # From the first chunk (40 ms) to the last command (980 ms) there are 48 control steps.
    assert document['deadline_misses'] == {'count': 48 - 15, 'share': (48 - 15) / 48}
    assert document['expired']['share'] == 2 / 5
    assert document['verdict']['level'] == 'stop'


def test_chunks_that_come_too_late_are_refused_and_counted(plain):
    document, (episode,), _ = replay(plain, Fake(), latency_ms=250)
    assert document['guard']['interventions'] == {'expired': len(episode.stamp_ns) - 1}
    assert document['guard']['accepted'] == 0 and document['guard']['unfinished'] == 1
    assert document['counts']['compared_steps'] == 0
    assert document['verdict']['findings'][0]['text'].startswith('Nothing could be compared')


def test_a_seam_is_as_large_as_two_chunks_disagree(plain):
    def alternating(observation, seed, steps):
        sign = 1 if (observation.stamp_ns - T0) // (40 * MS) % 2 else -1
        return sign * np.array([0.021, 0.0, 0.0]) + sign * np.outer(np.arange(5), [0.002, 0, 0])

    document, _, _ = replay(plain, Fake(error=alternating))
    seams = document['seams']
    # At a seam the new chunk is at its step 1 and the old one at its step 3.
    assert seams['jump']['base']['p50'] == pytest.approx(2 * 0.021 + 0.002 * (1 + 3), abs=1e-9)
    assert seams['jump']['elbow']['max'] == pytest.approx(0.0, abs=1e-12)
    assert seams['velocity_jump']['base']['p50'] == pytest.approx(2 * 0.002 / 0.02, abs=1e-6)
    assert seams['jump_share_of_range']['p50'] == pytest.approx(
        seams['jump']['base']['p50'] / 6.0, abs=1e-9)


def test_jerk_is_the_third_difference_inside_a_chunk(plain):
    cubic = offsets(*(0.001 * step ** 3 for step in range(5)), dimension=1)
    document, _, _ = replay(plain, Fake(error=cubic))
    assert document['jerk']['elbow']['p50'] == pytest.approx(0.006 / 0.02 ** 3, rel=1e-6)


def test_the_guard_refuses_what_leaves_the_limits_and_says_which_kind(plain):
    def outside(observation, seed, steps):
        return 9.0 if (observation.stamp_ns - T0) // (40 * MS) == 3 else 0.0

    document, (episode,), _ = replay(plain, Fake(error=outside))
    assert document['guard']['interventions'] == {'position': 1}
    assert episode.outcome.tolist().count('position') == 1
    assert episode.outcome.tolist().index('position') == 3


# What recordings are like


def test_a_camera_that_joins_late_is_waited_for(tmp_path):
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('go'))
    scene.robot(T0, 800 * MS, camera_ns=40 * MS, delay_ns=0, without=('wrist',))
    for number, late in enumerate(range(280, 800, 40)):
        scene.add('camera/wrist/image_raw', T0 + late * MS,
                  made.image(T0 + late * MS, made.pixels('wrist', number)))
    scene.add('episode', T0 + 800 * MS, status('success', 0))
    scene.write(tmp_path / 'bag')
    document, (episode,), _ = replay(tmp_path / 'bag', Fake())
    assert seconds_missing(document) == {
        'camera/wrist: absent': pytest.approx(0.28, abs=1e-6)}
    assert episode.stamp_ns[0] == T0 + 280 * MS
    assert episode.start_ns == T0 and episode.source[0] == -1


def test_a_topic_that_starts_five_seconds_late_is_missing_for_five_seconds(tmp_path):
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('go'))
    scene.robot(T0, 6000 * MS, camera_ns=100 * MS, delay_ns=0, without=('states',))
    for late in range(5000, 6000, 10):
        scene.add('joint_states', T0 + late * MS, made.joint_state(T0 + late * MS, elbow=0.3,
                                                                   base=0.1))
    scene.add('episode', T0 + 6000 * MS, status('success', 0))
    scene.write(tmp_path / 'bag')
    wide = dataclasses.replace(ROBOT, action_space=dataclasses.replace(
        ROBOT.action_space, lower=[-9, -9, -9], upper=[9, 9, 9]))
    document, (episode,), _ = replay(tmp_path / 'bag', Fake(wide))
    # For the first millisecond the wrist's picture is waited for, for the last one the picture
    # that belongs to the first joint state.
    assert seconds_missing(document) == {
        'camera/wrist: absent': pytest.approx(0.001), 'camera/wrist: skew': pytest.approx(0.001),
        'joint_states: absent': pytest.approx(4.999)}
    assert document['missing_input']['share'] == pytest.approx(5.001 / 5.98, abs=1e-6)
    assert episode.stamp_ns[0] == T0 + 5000 * MS
    assert len(episode.stamp_ns) == 10
    assert document['start_s']['p50'] == pytest.approx(5.02)
    assert document['verdict']['level'] == 'stop'


def test_missing_first_pictures_shorten_what_is_compared_and_shift_nothing(tmp_path):
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('go'))
    scene.robot(T0, 200 * MS, delay_ns=0, without=('front', 'wrist'))
    scene.robot(T0 + 200 * MS, 400 * MS, camera_ns=40 * MS, delay_ns=0)
    scene.add('episode', T0 + 600 * MS, status('success', 0))
    scene.write(tmp_path / 'bag')
    document, (episode,), _ = replay(tmp_path / 'bag', Fake(error=offsets(*OFFSETS)))
    assert episode.tick_ns[0] == T0 and len(episode.tick_ns) == 30
    assert (episode.source >= 0).sum() == 19       # from 220 ms to 580 ms
    np.testing.assert_allclose(document['horizon']['mae']['base'], OFFSETS, atol=1e-12)
    assert sum(seconds_missing(document).values()) == pytest.approx(0.201, abs=1e-6)


def test_a_stamp_that_goes_back_stops_observations_until_a_good_one_comes(tmp_path):
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('go'))
    scene.robot(T0, 600 * MS, camera_ns=40 * MS, delay_ns=0)
    scene.add('camera/front/image_raw', T0 + 205 * MS,
              made.image(T0 + 90 * MS, made.pixels('front', 99)))
    scene.add('episode', T0 + 600 * MS, status('success', 0))
    scene.write(tmp_path / 'bag')
    acting = Fake()
    document, (episode,), _ = replay(tmp_path / 'bag', acting)
    assert seconds_missing(document) == {
        'camera/wrist: absent': pytest.approx(0.001), 'camera/front: order': pytest.approx(0.035)}
    assert all(np.diff(episode.stamp_ns) == 40 * MS)         # the bad picture was never used
    assert document['executed']['max']['base'] == pytest.approx(0.0, abs=1e-12)


def test_a_camera_that_hangs_is_missing_from_its_tenth_identical_picture_on(tmp_path):
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('go'))
    scene.robot(T0, 800 * MS, camera_ns=40 * MS, delay_ns=0, without=('wrist',))
    for number, late in enumerate(range(0, 800, 40)):
        scene.add('camera/wrist/image_raw', T0 + late * MS, made.image(
            T0 + late * MS, made.pixels('wrist', min(number, 5))))
    scene.add('episode', T0 + 800 * MS, status('success', 0))
    scene.write(tmp_path / 'bag')
    document, (episode,), _ = replay(tmp_path / 'bag', Fake())
    # The sixth picture, of 200 ms, is the first of them; the tenth comes at 560 ms.
    assert seconds_missing(document) == {'camera/wrist: frozen': pytest.approx(0.22)}
    assert episode.stamp_ns.max() == T0 + 520 * MS


def test_two_episodes_back_to_back_share_nothing(tmp_path):
    scene = Scene()
    for number, start in enumerate((0, 400)):
        start_ns = T0 + start * MS
        scene.add('instruction', start_ns - 1, text(f'pick up block {number}'))
        scene.add('index', start_ns, made.make('std_msgs/Int32', data=number))
        scene.robot(start_ns, 400 * MS, camera_ns=40 * MS, delay_ns=0)
    scene.write(tmp_path / 'bag')
    document, (first, second), _ = replay(
        tmp_path / 'bag', Fake(), latency_ms=35, data={'episode_topic': 'index'})
    assert (first.name, second.name) == ('bag episode 0', 'bag episode 1')
    assert first.instructions == ('pick up block 0',)
    assert second.instructions == ('pick up block 1',)
    assert second.stamp_ns.min() == T0 + 400 * MS
    assert second.tick_ns[0] == T0 + 400 * MS and second.source[0] == -1
    assert first.outcome.tolist()[-1] == 'unfinished'
    assert np.isnan(second.last_action[0]).all()    # no command came before it in its episode
    assert document['counts']['episodes'] == 2
    assert document['executed']['max']['base'] == 0.0


def test_ages_count_from_the_header_and_inputs_come_when_they_were_received(tmp_path):
    # Pictures arrive 70 ms after their stamps. Complete at 71 ms: step 4 (80 ms) is the first.
    one_episode(tmp_path / 'bag', delay_ms=70)
    document, (episode,), _ = replay(tmp_path / 'bag', Fake(error=offsets(*OFFSETS)))
    assert (episode.taken_ns - episode.stamp_ns).tolist()[:3] == [71 * MS] * 3
    assert document['observation_age_s']['max'] == pytest.approx(0.08, abs=1e-9)
    assert document['first_step_mae']['base'] == pytest.approx(OFFSETS[4], abs=1e-12)
    assert document['deadline_misses']['share'] == pytest.approx(0.5, abs=0.03)


def test_an_instruction_that_changes_throws_away_what_was_planned(tmp_path):
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('first'))
    scene.robot(T0, 400 * MS, camera_ns=40 * MS, delay_ns=0)
    scene.add('instruction', T0 + 205 * MS, text('second'))
    scene.add('episode', T0 + 400 * MS, status('success', 0))
    scene.write(tmp_path / 'bag')
    document, (episode,), _ = replay(tmp_path / 'bag', Fake(), latency_ms=35)
    assert episode.instructions == ('first', 'second')
    assert document['guard']['discarded'] == 1
    halted = (episode.tick_ns > T0 + 205 * MS) & (episode.source < 0)
    assert episode.tick_ns[halted].tolist() == [T0 + 220 * MS, T0 + 240 * MS, T0 + 260 * MS]
    assert document['deadline_misses']['count'] == 0    # the robot is meant to stand there


# Numbers beside the errors


def test_baselines_have_the_errors_that_arithmetic_gives(tmp_path):
    made.simple_bag(tmp_path / 'bag', length_ns=400 * MS, camera_ns=40 * MS, delay_ns=0)
    document, episodes, _ = replay(tmp_path / 'bag', Fake())
    repeat = document['baselines']['repeat_last']
    # Before an observation lies the command of 20 ms ago, or none at the first one of an episode:
    # then the mean of the other is taken. `base` grows by 20/1024 from step to step.
    step = 20 / 1024
    found = np.concatenate([np.abs(each.last_action[1:, None, 0] - each.reference[1:, :, 0])[
        each.recorded[1:]] for each in episodes])
    assert np.allclose(found / step, np.rint(found / step)) and found.min() >= step - 1e-12
    assert repeat['horizon']['p50']['base'] == pytest.approx(
        [step * (number + 1) for number in range(5)])
    means = [each.reference[:, 0][each.recorded[:, 0]].mean(0) for each in episodes]
    for step in range(5):
        size = np.concatenate([np.abs(mean - each.reference[:, step])[each.recorded[:, step]]
                               for mean, each in zip(means[::-1], episodes)])
        assert document['baselines']['mean_action']['horizon']['mae']['elbow'][
            step] == pytest.approx(size[:, 1].mean())
    nearest = document['baselines']['nearest_neighbour']['horizon']['mae']['base']
    # Poses go on from episode to episode: the nearest of another is at its near end.
    assert min(nearest) > 0.2
    better = document['baselines']['mean_action']['policy_better_by']
    assert better['value'] == pytest.approx(
        document['baselines']['mean_action']['relative_error']['value'])
    assert better['low'] <= better['value'] <= better['high']


def switched(time_ns: int) -> list[float]:
    """Return a command whose gripper opens, and whose motion turns, 400 ms after T0."""
    after = time_ns >= T0 + 400 * MS
    return [-0.25, 0.0, 0.75] if after else [0.25, 0.0, 0.25]


@pytest.fixture(scope='module')
def switching(tmp_path_factory):
    """Return a bag of one episode with one switch."""
    path = tmp_path_factory.mktemp('bags') / 'switching'
    one_episode(path, action=lambda time_ns: made.trajectory(
        time_ns, ROBOT.action_space.dimensions, [switched(time_ns)]))
    return path


def late(due_ns: int) -> list[float]:
    return switched(due_ns - 60 * MS)


def never(due_ns: int) -> list[float]:
    return switched(T0)


def again(due_ns: int) -> list[float]:
    return switched(T0 if T0 + 600 * MS <= due_ns < T0 + 640 * MS else due_ns)


@pytest.mark.parametrize('truth, wrong, missed, extra, late_s', [
    (switched, 0, 0, 0, 0.0), (late, 3, 0, 0, 0.06), (again, 2, 0, 2, 0.0),
    (never, 20, 1, 0, None)])
def test_a_gripper_switch_is_met_so_late_or_missed_or_there_are_others(
        switching, truth, wrong, missed, extra, late_s):
    document, _, _ = replay(switching, Fake(truth=truth))
    found, steps = document['gripper']['gripper'], document['counts']['compared_steps']
    assert steps == 39        # 20 to 780 ms, of which 20 are after the switch
    assert found['threshold'] == 0.5 and found['switches'] == 1
    assert found['agreement'] == pytest.approx(1 - wrong / steps)
    assert (found['missed'], found['extra']) == (missed, extra)
    assert found['late_s']['p50'] == found['late_s']['max'] == (
        None if late_s is None else pytest.approx(late_s, abs=1e-6))


def test_baselines_have_a_gripper_and_a_direction_too(switching):
    robot = dataclasses.replace(ROBOT, action_space=dataclasses.replace(
        ROBOT.action_space, rates=('base', 'elbow')))
    document, _, _ = replay(switching, Fake(robot, truth=switched))
    found = document['baselines']['repeat_last']
    # The observation of 400 ms was preceded by the old command, and the one of 0 ms by none: of
    # the 37 steps that are left, those at 400, 420 and 440 ms still follow the old one.
    assert found['gripper']['gripper']['agreement'] == pytest.approx(1 - 3 / 37)
    assert found['gripper']['gripper']['late_s']['p50'] == pytest.approx(0.06, abs=1e-6)
    assert (found['direction']['steps'], found['direction']['mean']) == (
        37, pytest.approx(1 - 2 * 3 / 37))
    assert found['direction']['against'] == pytest.approx(3 / 37)
    assert document['direction']['mean'] == pytest.approx(1.0)
    assert document['gripper']['gripper']['agreement'] == 1.0


def test_directions_are_compared_where_the_actions_are_rates(plain):
    robot = dataclasses.replace(ROBOT, action_space=dataclasses.replace(
        ROBOT.action_space, rates=('base', 'elbow')))

    def backward(due_ns):
        return commanded(due_ns) * (-1, -1, 1)

    same, _, _ = replay(plain, Fake(robot))
    against, _, _ = replay(plain, Fake(robot, truth=backward))
    assert same['direction']['mean'] == pytest.approx(1.0)
    assert same['direction']['dimensions'] == ['base', 'elbow']
    assert against['direction']['mean'] == pytest.approx(-1.0)
    assert against['direction']['against'] == 1.0
    assert 'missing' in replay(plain)[0]['direction']


def test_probes_say_what_the_policy_looks_at_and_listens_to(plain):
    def error(observation, seed, steps):
        told = 0.05 * (observation.instruction == 'pick up block 1')
        sees = 0.02 * (observation.images['wrist'].std() == 0)
        return told + sees + 0.011 * seed + (0.004 if steps == 4 else 0.0)

    document, (episode,), _ = replay(
        plain, Fake(error=error), probe_every_s=0.2, noise_seeds=3,
        swapped_instruction='pick up block 1')
    scale = np.array(list(document['scale'].values()))
    asked, probes = document['counts']['probed'], document['probes']
    assert asked == 4 and episode.probed.tolist() == [3, 8, 13, 18]
    assert probes['swapped instruction']['moved'] == pytest.approx(np.mean(0.05 / scale))
    assert probes['swapped instruction']['effect']['value'] == pytest.approx(np.mean(0.05 / scale))
    assert probes['blanked wrist']['moved'] == pytest.approx(np.mean(0.02 / scale))
    assert probes['blanked front']['moved'] == pytest.approx(0.0, abs=1e-12)
    assert probes['frozen front']['observations'] == 4
    assert probes['shuffled proprioception']['moved'] == pytest.approx(0.0, abs=1e-12)
    assert document['nfe']['4']['mae']['base'] == pytest.approx(0.004)
    assert document['nfe']['4']['effect']['value'] == pytest.approx(np.mean(0.004 / scale))
    assert document['nfe']['2']['moved'] == pytest.approx(0.0, abs=1e-12)
    # Draws 0, 0.011, 0.022 in every dimension.
    assert document['spread']['mean'] == pytest.approx(np.mean(0.011 / scale))
    texts = ' '.join(each['text'] for each in document['verdict']['findings'])
    assert "does not look at camera 'front'" in texts and 'It listens' in texts


@pytest.mark.parametrize('mode', ['open_loop', 'receding_horizon:2', 'ensemble:0.1'])
def test_the_other_modes_of_execution_leave_recorded_commands_without_error(plain, mode):
    document, (episode,), _ = replay(plain, Fake(), latency_ms=25, execution=mode)
    assert document['executed']['max']['base'] == pytest.approx(0.0, abs=1e-12)
    assert (episode.source >= 0).sum() > 30
    if mode == 'open_loop':    # a chunk is followed to its end: step 4
        assert 4 in episode.step and document['stale']['share'] < 1


def test_only_the_part_that_is_asked_for_is_replayed(tmp_path):
    made.simple_bag(tmp_path / 'bag', episodes=3)
    _, episodes, _ = replay(tmp_path / 'bag', episodes=(0, 2))
    assert [each.name for each in episodes] == ['bag episode 0', 'bag episode 2']
    _, episodes, skipped = replay(tmp_path / 'bag', start_s=0.9, duration_s=0.8)
    assert [each.name for each in episodes] == ['bag episode 1']
    assert skipped == []


def test_batches_change_no_result(plain):
    one, (first,), _ = replay(plain, Fake(error=offsets(*OFFSETS)), batch=1)
    many, (second,), _ = replay(plain, Fake(error=offsets(*OFFSETS)), batch=64)
    np.testing.assert_array_equal(first.executed, second.executed)
    assert one['executed'] == many['executed'] and one['seams'] == many['seams']


def test_intervals_draw_whole_episodes_and_weigh_them_by_their_steps():
    even = Sums.of([np.zeros((4, 2)), np.ones((4, 2)) * (1, 3)])
    # Two draws of two: 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    assert with_interval(2, lambda drawn: even.mean(drawn)[:, 0]) == {
        'value': 0.5, 'low': 0.0, 'high': 1.0}
    assert with_interval(2, lambda drawn: even.relative(drawn, np.array([2.0, 6.0]))) == {
        'value': 0.25, 'low': 0.0, 'high': 0.5}
    assert with_interval(2, lambda drawn: even.relative(drawn, np.array([0.0, 6.0])))[
        'value'] == 0.25                         # what never moves has no scale
    uneven = Sums.of([np.zeros((9, 1)), np.full((3, 1), 4.0), np.full((2, 1), np.nan)])
    assert uneven.mean(np.array([[1.0, 1, 1], [0, 2, 0], [0, 0, 3]]))[:2, 0].tolist() == [1.0, 4.0]
    assert np.isnan(uneven.mean(np.array([[0.0, 0, 3]]))).all()
    assert with_interval(1, lambda drawn: np.array([0.7])) == {
        'value': 0.7, 'low': None, 'high': None}
    many = Sums.of(list(np.random.default_rng(3).normal(5.0, 2.0, (400, 1, 1))))
    found = with_interval(400, lambda drawn: many.mean(drawn)[:, 0])
    width = (found['high'] - found['low']) / 2
    assert width == pytest.approx(1.96 * 2.0 / 400 ** 0.5, rel=0.15)      # the normal interval


def test_rank_correlation_is_one_for_any_rising_curve_and_none_where_nothing_varies():
    values = np.array([0.3, -2.0, 5.0, 1.1])
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1.0)
    assert rank_correlation(values, -values ** 3) == pytest.approx(-1.0)
    # Ranks 1.5 1.5 3 4 and 1 2 3.5 3.5: covariance 1, variances 1.125 each.
    assert rank_correlation(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 3, 3])) == pytest.approx(
        1.0 / 1.125)
    assert rank_correlation(values, np.ones(4)) is None
