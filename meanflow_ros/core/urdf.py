"""Joint limits from a robot description (URDF)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np

from meanflow_ros.core.limits import Limits
from meanflow_ros.core.schema import known_or_hint

MAX_BYTES = 16 * 2**20
_MOVING = ('revolute', 'prismatic', 'continuous')


def limits_from_urdf(description: str, joints: Sequence[str]) -> Limits:
    """Return position and velocity limits of `joints`, from their <limit> elements.

    A continuous joint has no position limit. ValueError if the text is no URDF, holds a document
    type (entities could expand without end) or lacks a joint.
    """
    if len(description) > MAX_BYTES:
        raise ValueError(f'the robot description has {len(description)} characters, '
                         f'at most {MAX_BYTES} are read')
    if '<!DOCTYPE' in description or '<!ENTITY' in description:
        raise ValueError('the robot description holds a document type or entities: refused')
    try:
        root = ElementTree.fromstring(description)
    except ElementTree.ParseError as error:
        raise ValueError(f'the robot description is no XML: {error}') from None
    if root.tag != 'robot':
        raise ValueError(f'the robot description begins with <{root.tag}>, not with <robot>')
    found = {joint.get('name'): joint for joint in root.iter('joint')
             if joint.get('type') in _MOVING}
    rows = []
    for name in joints:
        if name not in found:
            raise ValueError(f'the robot description has no moving joint {name!r} '
                             f'({known_or_hint(name, sorted(filter(None, found)))})')
        rows.append(_limits_of(found[name], name))
    lower, upper, velocity = np.array(rows).T.reshape(3, -1)
    none = np.full(len(joints), np.inf)
    return Limits(names=tuple(joints), lower=lower, upper=upper, velocity=velocity,
                  acceleration=none, jerk=none)


def _limits_of(joint: ElementTree.Element, name: str) -> tuple[float, float, float]:
    """Return lower, upper and velocity of a moving joint.

    The specification has lower and upper as 0 where they are not given: such a joint could not
    move, and is refused.
    """
    limit = joint.find('limit')
    if joint.get('type') == 'continuous':
        return -math.inf, math.inf, _number(limit, 'velocity', math.inf, name)
    if limit is None:
        raise ValueError(f'joint {name!r} of the robot description has no <limit>')
    lower, upper = (_number(limit, bound, 0.0, name) for bound in ('lower', 'upper'))
    if not lower < upper:
        raise ValueError(f'joint {name!r} of the robot description cannot move: its limits are '
                         f'[{lower:g}, {upper:g}]')
    return lower, upper, _number(limit, 'velocity', math.inf, name)


def _number(limit: ElementTree.Element | None, attribute: str, default: float,
            name: str) -> float:
    text = None if limit is None else limit.get(attribute)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError(f'{attribute} of joint {name!r} in the robot description is {text!r}, '
                         f'not a number')
    return value
