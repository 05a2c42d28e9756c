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

from meanflow_ros.core.contract import ActionSpace, SafeChunk, SafeCommand
from meanflow_ros.ros.followed import Start
from meanflow_ros.ros.motion_config import (
    AUTO, ZERO, ForwardCommandOutput, GripperOutput, JointJogOutput, JointTrajectoryOutput,
    TwistOutput)

try:
    from geometry_msgs.msg import TwistStamped
    from std_msgs.msg import Bool, Float64MultiArray
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    from meanflow_ros.ros import to_messages
except ImportError:     # a replay, which sends nothing, needs no ROS
    TwistStamped = Bool = Float64MultiArray = JointTrajectory = JointTrajectoryPoint = None

_UNKNOWN = '_NODE_NAME_UNKNOWN_'
_ROUNDING = 1e-9           # share of a velocity limit
_LEAST_STRETCH = 1.001     # of a trajectory's times, again and again until it keeps its limits


class Output:
    """A publisher of one controller. streams: it takes commands, otherwise whole chunks.

    node: None in a replay; then the publisher is None too, and nothing is sent.
    """

    message_type: type

    def __init__(self, node, config, space: ActionSpace):
        self.config = config
        self.streams = config.streams
        self.columns = [space.dimensions.index(name) for name in config.dimensions]
        self.publisher = node and node.create_publisher(self.message_type, config.topic, 10)

    def send_command(self, command: SafeCommand) -> None:
        """Publish one command of a stream."""
        if self.publisher is None:
            return
        message = self.message(command.values[self.columns], command.stamp_ns)
        if message is not None:
            self.publisher.publish(message)

    def message(self, values: np.ndarray, stamp_ns: int):
        """Return the message for these values of its dimensions, None if there is none to send."""
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
            self.message_type = node and importlib.import_module('control_msgs.msg').JointJog
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
        self._closed: bool | None = None     # until a threshold has been crossed
        super().__init__(node, config, space)

    def message(self, values, stamp_ns):
        if not self.config.binary:
            return Float64MultiArray(data=values.tolist())
        if values[0] < self.config.close_below:
            self._closed = True
        elif values[0] > self.config.open_above:
            self._closed = False
        return None if self._closed is None else Bool(data=self._closed)


class _JointTrajectory(Output):
    message_type = JointTrajectory

    def __init__(self, node, config, space):
        super().__init__(node, config, space)
        self._node = node
        self.lead_ns = round(config.lead_s * 1e9)
        self._told = None      # times (ns), positions and velocities that the controller follows

    @property
    def end_ns(self) -> int | None:
        """Return when the last trajectory ends, None before the first one."""
        return None if self._told is None else int(self._told[0][-1])

    def set_point(self, now_ns: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return where the controller is that follows the last trajectory, and how fast, (D,).

        None before the first trajectory, and before its first time: the clock has jumped back.
        """
        if self._told is None or now_ns < self._told[0][0]:
            return None
        times_ns, positions, velocities = self._told
        after = int(np.searchsorted(times_ns, now_ns, side='right'))
        if after == len(times_ns):
            return positions[-1], np.zeros(positions.shape[1])
        gap_s = (times_ns[after] - times_ns[after - 1]) / 1e9
        share = (now_ns - times_ns[after - 1]) / 1e9 / gap_s
        (p0, p1), (v0, v1) = positions[after - 1:after + 1], velocities[after - 1:after + 1]
        square = 3 * (p1 - p0) - gap_s * (2 * v0 + v1)
        cube = -2 * (p1 - p0) + gap_s * (v0 + v1)
        return (p0 + gap_s * v0 * share + square * share**2 + cube * share**3,
                v0 + (2 * square * share + 3 * cube * share**2) / gap_s)

    def subscribers(self) -> dict[bytes, tuple[str, str]]:
        """Return namespace and name of the nodes that subscribe, by their subscriptions' GIDs.

        Those are left out whose names are not known yet.
        """
        if self.publisher is None:
            return {}
        return {bytes(each.endpoint_gid): (each.node_namespace, each.node_name) for each in
                self._node.get_subscriptions_info_by_topic(self.publisher.topic_name)
                if each.node_name != _UNKNOWN}

    def forget(self) -> None:
        """Know no trajectory: nobody has received the last one."""
        self._told = None

    def send_chunk(self, safe: SafeChunk, now_ns: int, max_velocity: np.ndarray,
                   start: Start | None = None) -> None:
        """Publish the points, after the one that they begin from if that lies ahead.

        max_velocity: (A,), kept between the points too. start: None if it is unknown.
        """
        due_ns, positions = safe.timed.due_ns, safe.timed.actions[:, self.columns]
        if start is not None:
            due_ns = np.append(start.begin_ns, due_ns)
            positions = np.vstack([start.begin[0], positions])
        due_ns, velocities = with_velocities(
            due_ns, positions, max_velocity[self.columns],
            to_rest=ends_at_rest(self.config.end_velocity),
            begin=None if start is None else start.begin[1])
        if start is not None and start.begin_ns > now_ns:
            before_ns, before, speeds = zip(*self._until_begin(start, now_ns, max_velocity))
            due_ns = np.append(before_ns, due_ns)
            positions = np.vstack([*before, positions])
            velocities = np.vstack([*speeds, velocities])
        self._told = due_ns, positions, velocities
        if self.publisher is None:
            return
        message = JointTrajectory(joint_names=list(self.config.joints or self.config.dimensions))
        message.header.stamp = to_messages.time(now_ns)
        message.points = [
            JointTrajectoryPoint(positions=position.tolist(), velocities=velocity.tolist(),
                                 time_from_start=to_messages.duration(int(due) - now_ns))
            for due, position, velocity in zip(due_ns, positions, velocities) if due > now_ns]
        self.publisher.publish(message)

    def _until_begin(self, start: Start, now_ns: int, max_velocity: np.ndarray) -> list[tuple]:
        """Return times, positions and velocities from now on until a new trajectory begins.

        Where one cubic would be too fast, the points of the last trajectory are among them. Those
        in the first half of the lead are not: a controller that is elsewhere would jump to them.
        """
        now, (here, speed), (there, next_speed) = (now_ns, *start.now), start.now, start.begin
        slope = (there - here) / ((start.begin_ns - now_ns) / 1e9)
        if not start.goes_on or (_peak(speed, next_speed, slope)
                                 <= max_velocity[self.columns]).all():
            return [now]
        return [now, *(point for point in zip(*self._told)
                       if now_ns + self.lead_ns // 2 < point[0] < start.begin_ns)]


def ends_at_rest(end_velocity: str) -> bool:
    """Whether trajectories must end with velocity 0: `auto` goes by ROS_DISTRO.

    Only Humble's joint_trajectory_controller accepts others by default
    (allow_nonzero_velocity_at_trajectory_end).
    """
    if end_velocity == AUTO:
        return os.environ.get('ROS_DISTRO') != 'humble'
    return end_velocity == ZERO


def with_velocities(due_ns: np.ndarray, positions: np.ndarray, max_velocity: np.ndarray, *,
                    to_rest: bool, begin: np.ndarray | None = None,
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Return due times (N,) and velocities (N, D) for a controller that joins points by cubics.

    The velocities are harmonic means of the neighbouring slopes, 0 where the direction changes
    (Fritsch and Butland 1984): between two points a cubic stays between them, so no position
    limit is left. A cubic is faster than the line between its points: the last segment takes half
    as long again if it comes to rest, and all times stretch where a velocity limit asks for it.
    begin: the velocity (D,) at the first point, where it is known: that does not stretch.
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
        velocities[0] = slopes[0] if begin is None else np.clip(begin, -max_velocity, max_velocity)
        velocities[-1] = 0.0 if to_rest else slopes[-1]
        stretched = velocities[0 if begin is None else 1:]
        while (factor := (_peak(velocities[:-1], velocities[1:], slopes)
                          / max_velocity).max()) > 1 + _ROUNDING:
            factor = max(factor, _LEAST_STRETCH)
            gaps_s, slopes = gaps_s * factor, slopes / factor
            stretched /= factor
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
