"""The short form of the fault campaign, and the page that its long form writes.

test/reliability/campaign.py has all faults, `make faults` runs them.
"""

import dataclasses
import json
import re

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

from reliability import report  # noqa: E402, I001
from reliability.checks import PERIOD_S, Checker  # noqa: E402
from reliability.faults import all_faults  # noqa: E402
from reliability.graph import MODEL, Graph  # noqa: E402
from reliability.robot import (  # noqa: E402
    ACCELERATION, DIMENSIONS, JERK, LOWER, UPPER, VELOCITY)
from reliability.soak import failed, slope, verdict  # noqa: E402
from reliability.streams import FAULTS  # noqa: E402
from reliability.trial import attempt  # noqa: E402

BUSY_S = 5.0      # a computer that runs tests beside others is late; the campaign is not so kind
SHORT = [dataclasses.replace(fault, node=MODEL, within_s=fault.within_s + BUSY_S,
                             recovers_s=fault.recovers_s + BUSY_S)
         for fault in all_faults() if fault.short]


@pytest.fixture(scope='module')
def graph(tmp_path_factory):
    with Graph(tmp_path_factory.mktemp('graph')) as made:
        yield made


@pytest.mark.parametrize('fault', SHORT, ids=lambda fault: fault.name.replace(' ', '-'))
def test_a_fault_has_the_outcome_that_is_declared(graph, fault):
    outcome = attempt(graph, fault)
    assert outcome.problems == () and outcome.outside_limits == 0 and outcome.commands > 0
    assert outcome.recovered_s is not None


def test_there_are_forty_kinds_of_fault_and_more():
    names = [fault.name for fault in all_faults()]
    assert len(names) == len(set(names)) >= 100
    assert 8 <= len(SHORT) <= 10


def test_every_input_is_dropped_delayed_duplicated_reordered_frozen_corrupted_and_flooded():
    for faults in FAULTS.values():
        assert {'dropped', 'delayed', 'duplicated', 'reordered', 'frozen', 'truncated', 'garbled',
                'flooded'} <= set(faults)
    names = [fault.name for fault in all_faults()]
    for title in ('camera static', 'joint states', 'instruction', 'clock', 'robot description'):
        for kind in ('dropped', 'delayed', 'duplicated', 'reordered', 'frozen', 'truncated',
                     'garbled', 'flooded'):
            assert any(name.startswith(f'{title}: {kind}') for name in names), (title, kind)


# The checks of the campaign, on commands made by hand.

HOME = np.array([0.2, 0.1, 0.007, 0.0])


def checked(rows, period_s=PERIOD_S, arrival_s=None, stamp_s=None):
    """Return a checker that has taken these commands (N, 3) of elbow, grip and turn."""
    checker = Checker()
    for number, row in enumerate(rows):
        at = number * period_s if arrival_s is None else arrival_s[number]
        stamp = at if stamp_s is None else stamp_s[number]
        checker.take(['c', 5 + at, number + 1, round(1e9 * (7 + stamp)), *row])
    return checker


@pytest.mark.parametrize('column', [0, 1, 2])
def test_a_jump_is_a_violation_of_velocity_and_acceleration(column):
    rows = np.tile(HOME[1:], (6, 1))
    assert checked(rows).violated == 0
    rows[3:, column] += 1.5 * VELOCITY[1 + column] * PERIOD_S
    words = ' '.join(checked(rows).violations)
    name = DIMENSIONS[1 + column]
    assert f'velocity of {name} is 1.5 x' in words and f'acceleration of {name}' in words


def test_what_moves_at_its_limits_is_no_violation_and_a_thousandth_more_is():
    for share, wrong in ((1.0, False), (1.002, True)):
        times = np.arange(12) * PERIOD_S
        path = HOME[2] + share * ACCELERATION[2] * np.minimum(times, 0.04) ** 2 / 2
        rows = np.tile(HOME[1:], (12, 1))
        rows[:3, 1] = path[:3]
        rows[3:, 1] = path[2] + np.arange(1, 10) * (path[2] - path[1])
        assert (checked(rows).violated > 0) == wrong


def test_jerk_is_the_third_difference_though_periods_differ():
    """Jerk as large as allowed for 60 ms, then acceleration: x = j t^3/6, then a parabola."""
    times = np.cumsum([0.0, *[0.02] * 4, 0.013, 0.02, 0.007, 0.02, 0.02])
    since = times - 0.08
    for share, wrong in ((0.9, False), (1.0, False), (1.002, True)):
        jerking = np.clip(since, 0.0, 0.06)
        speed = share * JERK[1] * (jerking**2 / 2 + jerking * (np.maximum(since, 0.0) - jerking))
        assert speed.max() < VELOCITY[1]
        after = np.maximum(since, 0.0) - jerking
        rows = np.tile(HOME[1:], (len(times), 1))
        rows[:, 0] += share * JERK[1] * (jerking**3 / 6 + jerking**2 / 2 * after
                                         + jerking * after**2 / 2)
        found = checked(rows, arrival_s=times)
        assert (found.violated > 0) == wrong
        assert found.worst['jerk elbow'] == pytest.approx(share, rel=1e-6)
        assert 'jerk grip' not in found.worst


def test_what_servo_does_by_itself_is_motion_until_it_halts():
    checker = checked([HOME[1:]] * 3)
    checker.take(['h', 9.0])
    assert checker.moved['stream'] == 9.0 and checker.violated == 0


def test_after_a_gap_positions_hold_and_a_rate_is_over():
    moving = HOME[1:] + [0.0, 0.0, 0.2]
    arrivals = [0.0, 0.02, 0.5, 0.52]
    stopped = checked([HOME[1:], HOME[1:], moving, moving], arrival_s=arrivals)
    assert any('turn' in words for words in stopped.violations)
    small = HOME[1:] + [0.0, 0.0, ACCELERATION[3] * PERIOD_S**2 / 2]
    assert checked([HOME[1:], HOME[1:], small], arrival_s=arrivals).violated == 0


def test_after_a_command_that_was_held_up_only_its_position_and_velocity_are_known():
    """The node is stopped with a command on its way, which comes when it continues."""
    stamps = [0.0, 0.02, 0.04, 1.065, 1.085, 1.105, 1.125]
    arrivals = [0.0, 0.02, 1.06, *stamps[3:]]
    rows = np.tile(HOME[1:], (7, 1))
    rows[:, 0] += np.cumsum([0, 0.006, 0.006, 0, 0, 0, 0])
    found = checked(rows, arrival_s=arrivals, stamp_s=stamps)
    assert found.violated == 0 and found.refused['held up'] == 1
    fast = rows.copy()
    fast[2:, 0] += 1.2 * VELOCITY[1] * PERIOD_S
    assert 'velocity of elbow' in ' '.join(checked(fast, arrival_s=arrivals,
                                                   stamp_s=stamps).violations)
    far = rows.copy()
    far[2, 0] = 1.1 * UPPER[1]
    assert 'position of elbow' in ' '.join(checked(far, arrival_s=arrivals,
                                                   stamp_s=stamps).violations)
    later = rows.copy()
    later[5:, 0] += 1.5 * ACCELERATION[1] * PERIOD_S**2
    assert 'acceleration of elbow' in ' '.join(checked(later, arrival_s=arrivals,
                                                       stamp_s=stamps).violations)


def test_what_a_controller_does_after_a_trajectory_that_came_later_than_its_lead_is_no_violation():
    times, points = [0.1, 0.2], [[0.2], [0.2]]
    for late_s, violations in ((0.04, 2), (0.06, 1)):
        found = Checker(offset_s=4.0)
        found.take(['j', 1.0 + late_s, 5 * 10**9, times, points, [[0.0]] * 2])
        for later_s in (0.1, 0.4):
            found.take(['s', 1.0 + late_s + later_s, 0.2, 2 * VELOCITY[0]])
        late = found.refused['trajectory: later than its lead']
        assert (found.violated, late) == (violations, 2 - violations)


def test_a_position_outside_its_limits_is_a_violation():
    assert checked([UPPER[1:], LOWER[1:]]).violations[0].find('position') == -1
    outside = UPPER[1:] + [1e-3 * (UPPER[1] - LOWER[1]), 0, 0]
    assert 'position of elbow' in checked([outside]).violations[0]


def test_a_trajectory_is_checked_between_its_points():
    times = 0.1 * np.arange(1, 6)
    still = Checker()
    still.take(['j', 1.0, 0, times.tolist(), [[0.2]] * 5, [[0.0]] * 5])
    assert still.violated == 0 and still.commands == 1
    positions = 0.2 + 1.2 * VELOCITY[0] * (times - 0.1)
    fast = Checker()
    fast.take(['j', 1.0, 0, times.tolist(), positions[:, None].tolist(), [[0.0]] * 5])
    assert 'velocity of shoulder is 1.2 x' in fast.violations[0]
    fast.take(['j', 1.1, 0, times.tolist(), [[0.2], [0.2], [0.3], [0.2], [0.2]], [[0.0]] * 5])
    assert 'acceleration of shoulder' in ' '.join(fast.violations)


# What is written


def test_the_page_is_that_of_the_data():
    if not report.PAGE.is_file():
        pytest.skip('there is no reliability.md beside the tests')
    text = report.PAGE.read_text()
    assert report.page(text) == text
    result = json.loads(report.CAMPAIGN.read_text())
    assert {fault['name'] for fault in result['faults']} == {
        fault.name for fault in all_faults()}
    written = re.search(r'<!-- faults -->\n(\d+) kinds of fault', text)
    assert int(written[1]) == len(result['faults'])


def test_a_soak_that_grows_is_told_from_one_that_does_not():
    random = np.random.default_rng(3)
    rows = [{'minute': minute, 'p99_ms': 20 + random.normal(), 'memory_mib': 300 + minute / 4}
            for minute in range(60)]
    trend = slope(rows, 'memory_mib')
    assert trend['slope'] == pytest.approx(15.0) and trend['error'] < 1e-3
    flat = slope(rows, 'p99_ms')
    assert abs(flat['slope']) < 2 * flat['error'] < 2.0
    words = verdict({'minutes': 60.0, 'faults': 9, 'crashes': 0, 'commands': 5,
                     'outside_limits': 0, 'failures': [], 'p99_ms_per_hour': flat,
                     'memory_mib_per_hour': trend})
    assert '(flat)' in words and '(grows)' in words
    good = {'crashes': 0, 'outside_limits': 0, 'failures': [], 'p99_ms_per_hour': flat,
            'memory_mib_per_hour': None}
    assert not failed(good)
    assert failed({**good, 'memory_mib_per_hour': trend})
    assert failed({**good, 'memory_mib_per_hour': {'slope': 1.01, 'error': 0.5}})
    assert not failed({**good, 'memory_mib_per_hour': {'slope': 0.99, 'error': 0.1}})
    assert not failed({**good, 'p99_ms_per_hour': {'slope': 5.0, 'error': 3.0}})
    for key, value in (('crashes', 1), ('outside_limits', 1), ('failures', [{}])):
        assert failed({**good, key: value})
    assert slope(rows[:4], 'p99_ms') is None
