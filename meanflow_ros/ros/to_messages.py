"""What the core made -> ROS messages, as pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from meanflow_ros.core.contract import NANOSECONDS, SafeChunk


def time(stamp_ns: int) -> Time:
    """Return nanoseconds as a builtin_interfaces/Time."""
    return Time(sec=stamp_ns // NANOSECONDS, nanosec=stamp_ns % NANOSECONDS)


def duration(length_ns: int) -> Duration:
    """Return nanoseconds as a builtin_interfaces/Duration."""
    return Duration(sec=length_ns // NANOSECONDS, nanosec=length_ns % NANOSECONDS)


def joint_trajectory(safe: SafeChunk) -> JointTrajectory:
    """Return a SafeChunk as a trajectory: joint names are dimensions, positions their values.

    `header.stamp` is t_obs; each point's `time_from_start` leads from there to its due time.
    """
    timed = safe.timed
    message = JointTrajectory(joint_names=list(safe.space.dimensions))
    message.header.stamp = time(timed.stamp_ns)
    message.points = [
        JointTrajectoryPoint(positions=action.tolist(),
                             time_from_start=duration(int(due_ns) - timed.stamp_ns))
        for due_ns, action in zip(timed.due_ns, timed.actions)]
    return message


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
