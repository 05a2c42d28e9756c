"""What the core made -> ROS messages, as pure functions."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping

import numpy as np
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.serialization import serialize_message
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from meanflow_ros.core.contract import NANOSECONDS, SafeChunk


def time(stamp_ns: int) -> Time:
    """Return nanoseconds as a builtin_interfaces/Time."""
    return Time(sec=stamp_ns // NANOSECONDS, nanosec=stamp_ns % NANOSECONDS)


def duration(length_ns: int) -> Duration:
    """Return nanoseconds as a builtin_interfaces/Duration."""
    return Duration(sec=length_ns // NANOSECONDS, nanosec=length_ns % NANOSECONDS)


def serialized_joint_trajectory(safe: SafeChunk) -> bytes:
    """Return a SafeChunk as a JointTrajectory in CDR, which publishers take as they take messages.

    Joint names are dimensions, positions their values; `header.stamp` is t_obs, and each point's
    `time_from_start` leads from there to its due time. Making the message and having it serialised
    takes several times as long.
    """
    timed = safe.timed
    template, first = _template(tuple(safe.space.dimensions), len(timed.actions))
    data, size = bytearray(template), 8 * timed.actions.shape[1]
    struct.pack_into('=iI', data, 4, *divmod(timed.stamp_ns, NANOSECONDS))
    step = size + _BETWEEN
    np.ndarray(timed.actions.shape, np.float64, data, first, (step, 8))[:] = timed.actions
    np.ndarray((len(timed.actions), 2), np.int32, data, first + size + 12, (step, 4))[:] = (
        np.stack(np.divmod(timed.due_ns - timed.stamp_ns, NANOSECONDS), axis=1))
    return bytes(data)


# Bytes of three empty sequences, time_from_start, and how many positions the next point has.
_BETWEEN = 24
_NO_NAME = -3.7e-201   # a number whose bytes are in no name


@functools.lru_cache
def _template(names: tuple[str, ...], points: int) -> tuple[bytes, int]:
    """Return a serialised trajectory of points that stand still, and where its first one lies."""
    data = serialize_message(JointTrajectory(joint_names=list(names), points=[
        JointTrajectoryPoint(positions=[_NO_NAME] * len(names)) for _ in range(points)]))
    first = data.index(struct.pack('=d', _NO_NAME))
    return data[:first + points * (8 * len(names) + _BETWEEN) - 4], first   # what follows is room


def diagnostic_status(name: str, level: bytes, message: str, hardware_id: str,
                      values: Mapping[str, object]) -> DiagnosticStatus:
    """Return one DiagnosticStatus; values are shown as text."""
    return DiagnosticStatus(
        name=name, level=level, message=message, hardware_id=hardware_id,
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()])


def diagnostic_array(stamp_ns: int, *statuses: DiagnosticStatus) -> DiagnosticArray:
    """Return the statuses under one stamp."""
    array = DiagnosticArray(status=list(statuses))
    array.header.stamp = time(stamp_ns)
    return array
