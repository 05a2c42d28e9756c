"""Limits: from a checkpoint, tightened by parameters, and from a robot description."""

import numpy as np
import pytest

from meanflow_ros.core.contract import ActionSpace
from meanflow_ros.core.limits import Limits
from meanflow_ros.core.urdf import limits_from_urdf

SPACE = {'name': 'arm', 'dimensions': ('a', 'b'), 'units': ('rad', 'rad'),
         'lower': [-1.0, -2.0], 'upper': [1.0, 2.0]}


def test_what_a_checkpoint_does_not_say_is_no_limit():
    limits = Limits.of(ActionSpace(**SPACE, max_velocity=[3.0, np.inf]))
    assert limits.velocity.tolist() == [3.0, np.inf]
    assert np.isinf(limits.acceleration).all() and np.isinf(limits.jerk).all()


@pytest.mark.parametrize('changes, message', [
    ({'max_velocity': [1.0]}, 'max_velocity .* must be 2 numbers above 0'),
    ({'max_acceleration': [1.0, 0.0]}, 'above 0'), ({'max_jerk': [np.nan, 1.0]}, 'above 0'),
    ({'rates': ('c',)}, "rates names 'c', which is no dimension"),
    ({'gripper': ('a', 'a')}, 'gripper of action space .* must be unique')])
def test_an_action_space_with_senseless_limits_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ActionSpace(**SPACE, **changes)


def test_at_rest_rates_are_zero_and_the_rest_stays():
    space = ActionSpace(**SPACE, rates=('b',))
    last = np.array([0.31, -0.83])
    assert space.at_rest(last).tolist() == [0.31, 0.0] and last.tolist() == [0.31, -0.83]


@pytest.mark.parametrize('what, name, strict, loose', [
    ('lower', 'a', -0.5, -1.001), ('upper', 'b', 1.5, 2.001), ('velocity', 'a', 2.0, 3.001),
    ('jerk', 'b', 50.0, np.nan)])
def test_limits_are_tightened_and_never_loosened(what, name, strict, loose):
    limits = Limits.of(ActionSpace(**SPACE, max_velocity=[3.0, 3.0]))
    index = limits.names.index(name)
    assert getattr(limits.tightened(what, {name: strict}), what)[index] == strict
    with pytest.raises(ValueError, match=f'{what} limit .* of {name!r} would loosen'):
        limits.tightened(what, {name: loose})


def test_an_unknown_dimension_and_an_empty_range_are_named():
    limits = Limits.of(ActionSpace(**SPACE))
    with pytest.raises(ValueError, match="unknown dimension 'aa' .did you mean 'a'"):
        limits.tightened('upper', {'aa': 0.0})
    with pytest.raises(ValueError, match="'a' has no room left: lower limit -1 above upper"):
        limits.tightened('upper', {'a': -1.5})


URDF = """<?xml version="1.0"?>
<robot name="r">
  <joint name="b" type="revolute"><limit lower="-1.5" upper="2.5" velocity="2.1"/></joint>
  <joint name="wheel" type="continuous"><limit velocity="7" effort="1"/></joint>
  <joint name="slide" type="prismatic"><limit lower="0" upper="0.04"/></joint>
  <joint name="weld" type="fixed"/>
  <joint name="stuck" type="revolute"/>
</robot>"""


def test_a_robot_description_gives_the_limits_of_its_joints():
    limits = limits_from_urdf(URDF, ['slide', 'b', 'wheel'])
    assert limits.lower.tolist() == [0.0, -1.5, -np.inf]
    assert limits.upper.tolist() == [0.04, 2.5, np.inf]
    assert limits.velocity.tolist() == [np.inf, 2.1, 7.0]


def test_of_two_sources_the_stricter_limit_counts():
    own = Limits.of(ActionSpace(**SPACE, max_velocity=[3.0, 3.0]))
    both = own.within(limits_from_urdf(URDF, ['b']))
    assert both.lower.tolist() == [-1.0, -1.5] and both.upper.tolist() == [1.0, 2.0]
    assert both.velocity.tolist() == [3.0, 2.1]


@pytest.mark.parametrize('text, joint, message', [
    ('<robot', 'b', 'no XML'), ('<sdf/>', 'b', 'begins with <sdf>'),
    ('<!DOCTYPE x [<!ENTITY a "b">]><robot/>', 'b', 'document type'),
    (URDF, 'weld', "no moving joint 'weld'"), (URDF, 'slider', "did you mean 'slide'"),
    (URDF, 'stuck', 'has no <limit>'),
    (URDF.replace('2.5', 'nan'), 'b', "upper of joint 'b' .* is 'nan', not a number"),
    (URDF.replace('2.5', '-1.5'), 'b', 'cannot move'), ('x' * 17_000_000, 'b', 'at most')])
def test_a_bad_robot_description_is_refused_by_name(text, joint, message):
    with pytest.raises(ValueError, match=message):
        limits_from_urdf(text, [joint])
