"""Which action is due: modes, interpolation, counting, epochs, and the stop on the last path."""

import itertools

import numpy as np
import pytest

from meanflow_ros.core.contract import ActionChunk, TimedActions
from meanflow_ros.core.timeline import (
    OpenLoop, RealTime, RecedingHorizon, StopAlongPath, TemporalEnsemble, Timeline,
    steps_still_due)

STAMP_NS = 1_700_000_000_123_456_789
DUE_NS = [STAMP_NS + 99_900_000, STAMP_NS + 133_200_000, STAMP_NS + 166_500_000]
GOOD = np.array([[0.2, 12.6], [-0.3, 13.1], [0.0, 13.69]])


def chunk(actions=GOOD, **changes):
    return ActionChunk(**{'actions': actions, 'stamp_ns': STAMP_NS, 'period_s': 0.0333,
                          'first_step': 3, **changes})


@pytest.mark.parametrize('now_ns, dropped', [
    (0, 0), (DUE_NS[0], 0), (DUE_NS[0] + 1, 1), (DUE_NS[1], 1), (DUE_NS[1] + 1, 2),
    (DUE_NS[2], 2)])
def test_a_step_is_dropped_one_nanosecond_after_its_due_time(now_ns, dropped):
    timed = steps_still_due(chunk(), now_ns=now_ns)
    assert timed.stamp_ns == STAMP_NS
    assert timed.due_ns.tolist() == DUE_NS[dropped:]
    np.testing.assert_array_equal(timed.actions, GOOD[dropped:])


def test_nothing_is_left_after_the_last_due_time():
    assert steps_still_due(chunk(), now_ns=DUE_NS[2] + 1) is None


def timed(stamp_ns, values, first_due_ns=None):
    """One-dimensional actions, 10 ns apart from first_due_ns on."""
    start = stamp_ns if first_due_ns is None else first_due_ns
    return TimedActions(stamp_ns=stamp_ns, due_ns=start + 10 * np.arange(len(values)),
                        actions=np.array(values)[:, None])


def played(timeline, times):
    return [None if (action := timeline.at(now)) is None else action.item() for now in times]


def test_the_last_action_holds_for_its_period_and_there_is_none_before_and_after():
    timeline = Timeline(period_ns=10)
    assert timeline.at(100) is None
    timeline.add(timed(100, [1.1, 1.2, 1.3]))
    assert played(timeline, [99, 100, 110, 120, 129, 130]) == [
        None, 1.1, 1.2, 1.3, 1.3, None]


@pytest.mark.parametrize('order', list(itertools.permutations(range(3))))
def test_the_newest_chunk_wins_where_it_has_steps_and_an_older_one_serves_the_rest(order):
    chunks = [timed(100, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]),
              timed(110, [2.1, 2.2], first_due_ns=120),
              timed(115, [3.3], first_due_ns=131)]
    timeline = Timeline(period_ns=10)
    for index in order:
        timeline.add(chunks[index])
    assert played(timeline, [100, 110, 120, 130, 131, 140, 141, 150, 159, 160]) == pytest.approx(
        [1.0, 1.1, 2.1, 2.2, 3.3, 3.3, 1.41, 1.5, 1.5, None])


def test_a_gap_wider_than_a_period_has_no_action():
    timeline = Timeline(period_ns=10)
    timeline.add(TimedActions(stamp_ns=0, due_ns=[0, 35], actions=[[1.0], [2.0]]))
    assert played(timeline, [9, 10, 34, 35]) == [1.0, None, None, 2.0]


def test_clear_forgets_every_chunk():
    timeline = Timeline(period_ns=10)
    timeline.add(timed(100, [1.0]))
    timeline.clear()
    assert timeline.at(100) is None


def test_a_period_below_a_nanosecond_is_refused():
    with pytest.raises(ValueError, match='period_ns must be at least 1, got 0'):
        Timeline(period_ns=0)


def test_between_steps_the_action_lies_on_the_line_that_joins_them():
    timeline = Timeline(period_ns=10)
    timeline.add(timed(100, [1.0, 2.0, -4.0]))
    assert played(timeline, [100, 103, 110, 114, 120]) == pytest.approx(
        [1.0, 1.3, 2.0, -0.4, -4.0])


@pytest.mark.parametrize('mode, times, expected', [
    (OpenLoop(), range(100, 150, 10), [1.0, 1.1, 1.2, 2.3, 2.4]),
    (RecedingHorizon(), range(100, 150, 10), [2.0, 2.1, 2.2, 2.3, 2.4]),
    (RecedingHorizon(steps=2), range(100, 150, 10), [2.0, 2.1, 2.2, 2.3, 2.4])])
def test_with_two_chunks_at_hand_a_mode_chooses_which_is_followed(mode, times, expected):
    timeline = Timeline(period_ns=10, mode=mode)
    timeline.add(timed(100, [1.0, 1.1, 1.2]))
    if isinstance(mode, OpenLoop):
        timeline.at(100)
    timeline.add(timed(101, [2.0, 2.1, 2.2, 2.3, 2.4], first_due_ns=100))
    assert played(timeline, times) == expected


@pytest.mark.parametrize('steps, expected', [
    (0, [1.0, 2.1, 2.2, 2.3]), (1, [1.0, 2.1, 2.2, 2.3]), (2, [1.0, 1.1, 2.2, 2.3]),
    (3, [1.0, 1.1, 1.2, 2.3]), (99, [1.0, 1.1, 1.2, 2.3])])
def test_receding_horizon_waits_until_its_steps_were_handed_out_or_the_chunk_ends(steps, expected):
    timeline = Timeline(period_ns=10, mode=RecedingHorizon(steps=steps))
    timeline.add(timed(100, [1.0, 1.1, 1.2]))
    values = played(timeline, [100])
    timeline.add(timed(105, [2.0, 2.1, 2.2, 2.3], first_due_ns=100))
    assert values + played(timeline, [110, 120, 130]) == expected


def test_the_velocity_is_that_of_the_line_and_not_of_the_step_from_chunk_to_chunk():
    timeline = Timeline(period_ns=10)
    assert timeline.velocity(100) is None
    timeline.add(timed(100, [1.1, 1.2, 1.5]))
    timeline.add(timed(105, [7.0, 7.2], first_due_ns=111))
    assert [round(timeline.velocity(now).item()) for now in (100, 109, 110, 111, 120, 121)] == [
        10_000_000, 10_000_000, 30_000_000, 20_000_000, 20_000_000, 0]


def test_a_step_counts_once_however_often_it_is_asked_for_and_a_skipped_one_does_not():
    timeline = Timeline(period_ns=10, mode=RecedingHorizon(steps=2))
    timeline.add(timed(100, [1.0, 1.1, 1.2, 1.3]))
    played(timeline, [100, 101, 105, 109])
    assert timeline.consumed == 1
    timeline.add(timed(101, [2.0] * 6, first_due_ns=100))
    assert played(timeline, [120, 130]) == [1.2, 2.0]      # step 1 was never asked for
    assert timeline.consumed == 3


@pytest.mark.parametrize('newest_first, expected', [
    (False, (1.0 + np.exp(-0.5) * 2.0 + np.exp(-1.0) * 4.0)),
    (True, (4.0 + np.exp(-0.5) * 2.0 + np.exp(-1.0) * 1.0))])
def test_the_ensemble_weighs_chunks_by_rank_from_the_end_that_it_names(newest_first, expected):
    timeline = Timeline(period_ns=10, mode=TemporalEnsemble(decay=0.5, newest_first=newest_first))
    for stamp, value in ((100, 1.0), (90, 4.0), (80, 2.0)):
        order = {100: 4.0, 90: 2.0, 80: 1.0}[stamp]
        timeline.add(timed(stamp, [order] * 5, first_due_ns=100))
    total = 1 + np.exp(-0.5) + np.exp(-1.0)
    assert timeline.at(110).item() == pytest.approx(expected / total, rel=1e-12)


def test_a_mode_can_be_changed_while_chunks_are_followed():
    timeline = Timeline(period_ns=10, mode=OpenLoop())
    timeline.add(timed(100, [1.0] * 6))
    first = timeline.at(100)
    timeline.add(timed(110, [3.0] * 6))
    values = [first, timeline.at(110)]
    timeline.mode = TemporalEnsemble(decay=0.0)
    values.append(timeline.at(120))
    timeline.mode = RecedingHorizon()
    values.append(timeline.at(130))
    assert [value.item() for value in values] == [1.0, 1.0, 2.0, 3.0]


def test_real_time_gives_what_will_be_executed_and_switches_where_that_ends():
    timeline = Timeline(period_ns=10, mode=RealTime(delay_steps=2))
    assert timeline.prefix(100).actions.shape == (0,)
    timeline.add(timed(100, [1.0, 1.1, 1.2, 1.3, 1.4]))
    prefix = timeline.prefix(110)
    assert prefix.actions[:, 0].tolist() == [1.1, 1.2] and prefix.until_ns == 130
    assert timeline.add(timed(110, [9.0, 9.0, 2.0, 2.1], first_due_ns=110), now_ns=125,
                        prefix=prefix)
    assert played(timeline, [110, 120, 130, 140]) == [1.1, 1.2, 2.0, 2.1]


def test_real_time_refuses_an_answer_that_comes_after_its_prefix():
    timeline = Timeline(period_ns=10, mode=RealTime(delay_steps=2))
    timeline.add(timed(100, [1.0, 1.1, 1.2, 1.3, 1.4]))
    prefix = timeline.prefix(110)
    assert not timeline.add(timed(110, [9.0] * 5), now_ns=131, prefix=prefix)
    assert timeline.discarded == {'late': 1} and timeline.at(140).item() == 1.4


def test_a_prefix_is_no_longer_than_what_is_left_in_the_buffer():
    timeline = Timeline(period_ns=10, mode=RealTime(delay_steps=5))
    timeline.add(timed(100, [1.0, 1.1, 1.2]))
    prefix = timeline.prefix(110)
    assert prefix.actions[:, 0].tolist() == [1.1, 1.2] and prefix.until_ns == 130


def test_a_chunk_of_an_earlier_epoch_is_discarded_under_the_name_of_what_ended_it():
    timeline = Timeline(period_ns=10)
    seen = timeline.epoch
    timeline.add(timed(100, [1.0, 1.1]), epoch=seen)
    timeline.begin_epoch('instruction')
    assert timeline.at(100) is None
    assert not timeline.add(timed(101, [1.0]), epoch=seen)
    assert timeline.add(timed(101, [2.0]), epoch=timeline.epoch)
    assert timeline.discarded == {'instruction': 1} and timeline.at(101).item() == 2.0


@pytest.mark.parametrize('mode', [OpenLoop(), RecedingHorizon(), RecedingHorizon(steps=2),
                                  RecedingHorizon(steps=3),
                                  TemporalEnsemble(decay=0.3, newest_first=True)])
def test_the_plan_is_what_is_then_handed_out(mode):
    timeline = Timeline(period_ns=10, mode=mode)
    timeline.add(timed(100, [1.0, 1.5, 1.1, 1.3]))
    timeline.at(100)
    timeline.add(timed(110, [2.0, 2.7, 2.1, 2.4, 2.2]))
    plan = timeline.plan(105)
    assert plan.due_ns.tolist() == [110, 120, 130, 140, 150] and plan.stamp_ns == 110
    assert played(timeline, plan.due_ns) == pytest.approx(plan.actions[:, 0].tolist(), rel=1e-12)
    assert timeline.plan(161) is None


def test_an_open_loop_wants_a_chunk_only_when_its_end_is_near():
    timeline = Timeline(period_ns=10, mode=OpenLoop())
    assert timeline.wants_chunk(100)
    timeline.add(timed(100, [1.0, 1.1, 1.2]))
    timeline.at(100)
    assert [timeline.wants_chunk(now, lead_ns=10) for now in (100, 119, 120)] == [
        False, False, True]
    timeline.mode = RecedingHorizon()
    assert timeline.wants_chunk(100)


def test_the_buffer_does_not_grow_without_end():
    timeline = Timeline(period_ns=10)
    for number in range(1000):
        timeline.add(timed(number, [float(number)] * 3, first_due_ns=10**9))
    assert len(timeline._chunks) <= 64 and timeline.at(10**9).item() == 999.0


@pytest.mark.parametrize('bad', [
    lambda: RecedingHorizon(steps=-1), lambda: RealTime(delay_steps=-1),
    lambda: TemporalEnsemble(decay=-0.1), lambda: TemporalEnsemble(decay=float('nan'))])
def test_a_mode_with_a_senseless_number_is_refused(bad):
    with pytest.raises(ValueError, match='must be at least 0'):
        bad()


def ramp(slope=1.0, count=101):
    """Return a position that moves at `slope` per second, and its rate, every 10 ms from 0 s."""
    seconds = np.arange(count) * 0.01
    return TimedActions(stamp_ns=0, due_ns=np.arange(count) * 10_000_000,
                        actions=np.stack([slope * seconds, np.full(count, slope)], axis=1))


def test_a_stop_stays_on_the_path_and_slows_by_its_formula():
    stop = StopAlongPath(ramp(), start_ns=200_000_000, stop_s=0.4, is_rate=np.array([False, True]))
    for u in (0.0, 0.1, 0.37, 0.5, 0.93, 1.0):
        position, rate = stop.at(200_000_000 + round(0.4e9 * u))
        assert position == pytest.approx(0.2 + 0.4 * (u - u ** 3 + u ** 4 / 2), abs=1e-9)
        assert rate == pytest.approx(1 - 3 * u ** 2 + 2 * u ** 3, abs=1e-9)
    assert stop.at(10**12).tolist() == pytest.approx([0.4, 0.0])
    assert stop.at(0).tolist() == pytest.approx([0.2, 1.0])


def test_a_stop_never_leaves_the_end_of_the_path():
    stop = StopAlongPath(ramp(), start_ns=900_000_000, stop_s=5.0, is_rate=np.array([False, True]))
    assert stop.length_ns == 200_000_000
    values = np.array([stop.at(round(t)) for t in np.linspace(0.9e9, 1.3e9, 81)])
    assert values[:, 0].max() == pytest.approx(1.0) and values[-1].tolist() == [1.0, 0.0]
    assert (np.diff(values[:, 0]) >= -1e-12).all()


@pytest.mark.parametrize('start_ns', [1_000_000_000, 2_000_000_000])
def test_a_stop_at_or_after_the_end_is_rest_at_once(start_ns):
    stop = StopAlongPath(ramp(), start_ns=start_ns, stop_s=1.0, is_rate=np.array([False, True]))
    assert stop.at(start_ns).tolist() == [1.0, 0.0]
