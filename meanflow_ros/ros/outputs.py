"""SafeChunks and SafeCommands -> the messages of the controllers that people run.

An output is a publisher with what it must know of its controller:
joint_trajectory_controller takes a whole trajectory, replaces the old one by time, and rejects one
that ends in the past or, by default, in motion. forward_command_controller holds the last value.
MoveIt Servo drops a command whose stamp is older than its time-out, 0.1 s, so commands are stamped
when they are sent.
"""

from __future__ import annotations

import importlib
import os

import numpy as np
from geometry_msgs.msg import TwistStamped
from std_msgs.msg import Bool, Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from meanflow_ros.core.contract import ActionSpace, SafeChunk, SafeCommand
from meanflow_ros.ros import to_messages
from meanflow_ros.ros.motion_config import (
    AUTO, ZERO, ForwardCommandOutput, GripperOutput, JointJogOutput, JointTrajectoryOutput,
    TwistOutput)


class Output:
    """A publisher of one controller. streams: it takes commands, otherwise whole chunks."""

    message_type: type

    def __init__(self, node, config, space: ActionSpace):
        self.config = config
        self.streams = config.streams
        self._columns = [space.dimensions.index(name) for name in config.dimensions]
        self.publisher = node.create_publisher(self.message_type, config.topic, 10)

    def send_command(self, command: SafeCommand) -> None:
        """Publish one command of a stream."""
        self.publisher.publish(self.message(command.values[self._columns], command.stamp_ns))

    def message(self, values: np.ndarray, stamp_ns: int):
        """Return the message for these values of its dimensions."""
        raise NotImplementedError


class _ForwardCommand(Output):
    message_type = Float64MultiArray

    def message(self, values, stamp_ns):
        return Float64MultiArray(data=values.tolist())


class _Twist(Output):
    message_type = TwistStamped

    def message(self, values, stamp_ns):
        message = TwistStamped()
        message.header.stamp = to_messages.time(stamp_ns)
        message.header.frame_id = self.config.frame_id
        for axis, value in zip(self.config.axes, values):
            part, direction = axis.split('.')
            setattr(getattr(message.twist, part), direction, float(value))
        return message


class _JointJog(Output):
    def __init__(self, node, config, space):
        try:
            self.message_type = importlib.import_module('control_msgs.msg').JointJog
        except ImportError:
            raise ValueError(f'output {config.topic!r} needs control_msgs, which is not '
                             f'installed: install ros-$ROS_DISTRO-control-msgs') from None
        super().__init__(node, config, space)

    def message(self, values, stamp_ns):
        message = self.message_type(joint_names=list(self.config.joints or self.config.dimensions),
                                    velocities=values.tolist())
        message.header.stamp = to_messages.time(stamp_ns)
        message.header.frame_id = self.config.frame_id
        return message


class _Gripper(Output):
    def __init__(self, node, config, space):
        self.message_type = Bool if config.binary else Float64MultiArray
        self._closed = False
        super().__init__(node, config, space)

    def message(self, values, stamp_ns):
        if not self.config.binary:
            return Float64MultiArray(data=values.tolist())
        if values[0] < self.config.close_below:
            self._closed = True
        elif values[0] > self.config.open_above:
            self._closed = False
        return Bool(data=self._closed)


class _JointTrajectory(Output):
    message_type = JointTrajectory

    def send_chunk(self, safe: SafeChunk, now_ns: int, max_velocity: np.ndarray) -> None:
        """Publish the points that lie far enough ahead, if there are any."""
        message = self.trajectory(safe, now_ns, max_velocity)
        if message is not None:
            self.publisher.publish(message)

    def trajectory(self, safe: SafeChunk, now_ns: int,
                   max_velocity: np.ndarray) -> JointTrajectory | None:
        """Return the chunk as a trajectory that starts after now, None if nothing is left.

        max_velocity: (A,), kept between the points too.
        """
        timed = safe.timed
        ahead = timed.due_ns > now_ns + round(self.config.lead_s * 1e9)
        positions = timed.actions[ahead][:, self._columns]
        if not len(positions):
            return None
        due_ns, velocities = with_velocities(
            timed.due_ns[ahead], positions, max_velocity[self._columns],
            to_rest=ends_at_rest(self.config.end_velocity))
        message = JointTrajectory(joint_names=list(self.config.joints or self.config.dimensions))
        message.header.stamp = to_messages.time(now_ns)
        message.points = [
            JointTrajectoryPoint(positions=position.tolist(), velocities=velocity.tolist(),
                                 time_from_start=to_messages.duration(int(due) - now_ns))
            for due, position, velocity in zip(due_ns, positions, velocities)]
        return message


def ends_at_rest(end_velocity: str) -> bool:
    """Whether trajectories must end with velocity 0: `auto` goes by ROS_DISTRO.

    Only Humble's joint_trajectory_controller accepts others by default
    (allow_nonzero_velocity_at_trajectory_end).
    """
    if end_velocity == AUTO:
        return os.environ.get('ROS_DISTRO') != 'humble'
    return end_velocity == ZERO


def with_velocities(due_ns: np.ndarray, positions: np.ndarray, max_velocity: np.ndarray, *,
                    to_rest: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return due times (N,) and velocities (N, D) for a controller that joins points by cubics.

    The velocities are harmonic means of the neighbouring slopes, 0 where the direction changes
    (Fritsch and Butland 1984): between two points a cubic stays between them, so no position
    limit is left. A cubic is faster than the line between its points: the last segment takes half
    as long again if it comes to rest, and all times stretch where a velocity limit asks for it.
    """
    gaps_s = np.diff(due_ns) / 1e9
    velocities = np.zeros(positions.shape)
    if len(gaps_s):
        if to_rest:
            gaps_s[-1] *= 1.5
        slopes = np.diff(positions, axis=0) / gaps_s[:, None]
        before, after = slopes[:-1], slopes[1:]
        with np.errstate(invalid='ignore', divide='ignore'):
            velocities[1:-1] = np.where(before * after > 0, 2 / (1 / before + 1 / after), 0.0)
        velocities[0], velocities[-1] = slopes[0], 0.0 if to_rest else slopes[-1]
        factor = max(1.0, (_peak(velocities[:-1], velocities[1:], slopes) / max_velocity).max())
        gaps_s, velocities = gaps_s * factor, velocities / factor
    since_s = np.concatenate([[0.0], np.cumsum(gaps_s)])
    return due_ns[0] + np.ceil(since_s * 1e9).astype(np.int64), velocities


def _peak(start: np.ndarray, end: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return the largest speed of cubics with these velocities at their ends, and mean `slope`."""
    linear, square = 6 * slope - 4 * start - 2 * end, 3 * (start + end) - 6 * slope
    with np.errstate(invalid='ignore', divide='ignore'):
        at = -linear / (2 * square)
        turn = np.where((at > 0) & (at < 1), start + linear * at + square * at * at, start)
    return np.maximum(np.abs(turn), np.maximum(np.abs(start), np.abs(end)))


_KINDS = {JointTrajectoryOutput: _JointTrajectory, ForwardCommandOutput: _ForwardCommand,
          TwistOutput: _Twist, JointJogOutput: _JointJog, GripperOutput: _Gripper}


def make_output(node, config, space: ActionSpace) -> Output:
    """Return the output that `config` describes; ValueError if its messages are not installed."""
    return _KINDS[type(config)](node, config, space)
