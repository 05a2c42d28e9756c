"""SafeChunks and SafeCommands -> the messages of the controllers that people run.

An output is a publisher with what it must know of its controller:
joint_trajectory_controller takes a whole trajectory, replaces the old one by time, and rejects one
that ends in the past or, by default, in motion. forward_command_controller holds the last value.
MoveIt Servo drops a command whose stamp is older than its time-out, 0.1 s, so commands are stamped
when they are sent.
"""

from __future__ import annotations

import importlib

import numpy as np
from geometry_msgs.msg import TwistStamped
from std_msgs.msg import Bool, Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from meanflow_ros.core.contract import ActionSpace, SafeChunk, SafeCommand
from meanflow_ros.ros import to_messages
from meanflow_ros.ros.motion_config import (
    ForwardCommandOutput, GripperOutput, JointJogOutput, JointTrajectoryOutput, TwistOutput)


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

    def send_chunk(self, safe: SafeChunk, now_ns: int) -> None:
        """Publish the points that lie far enough ahead, if there are any."""
        message = self.trajectory(safe, now_ns)
        if message is not None:
            self.publisher.publish(message)

    def trajectory(self, safe: SafeChunk, now_ns: int) -> JointTrajectory | None:
        """Return the chunk as a trajectory that starts after now, None if nothing is left.

        Velocities are differences of the neighbouring points, so the controller's spline passes
        through the steps without stopping at them; at the end they are 0 where it asks for that.
        """
        timed = safe.timed
        ahead = timed.due_ns > now_ns + round(self.config.lead_s * 1e9)
        due_ns, positions = timed.due_ns[ahead], timed.actions[ahead][:, self._columns]
        if not len(due_ns):
            return None
        if len(due_ns) > 1:
            velocities = np.gradient(positions, (due_ns - due_ns[0]) / 1e9, axis=0)
        else:
            velocities = np.zeros_like(positions)
        if self.config.end_velocity == 'zero':
            velocities[-1] = 0.0
        message = JointTrajectory(joint_names=list(self.config.joints or self.config.dimensions))
        message.header.stamp = to_messages.time(now_ns)
        message.points = [
            JointTrajectoryPoint(positions=position.tolist(), velocities=velocity.tolist(),
                                 time_from_start=to_messages.duration(int(due) - now_ns))
            for due, position, velocity in zip(due_ns, positions, velocities)]
        return message


_KINDS = {JointTrajectoryOutput: _JointTrajectory, ForwardCommandOutput: _ForwardCommand,
          TwistOutput: _Twist, JointJogOutput: _JointJog, GripperOutput: _Gripper}


def make_output(node, config, space: ActionSpace) -> Output:
    """Return the output that `config` describes; ValueError if its messages are not installed."""
    return _KINDS[type(config)](node, config, space)
