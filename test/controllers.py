"""Controllers that follow the rules which the real ones document, and refuse what those refuse.

joint_trajectory_controller: trajectory.rst ("Trajectory Replacement") and the checks on incoming
messages; forward_command_controller: the last message holds, non-finite or misshapen ones are
dropped; MoveIt Servo: a command whose stamp is `incoming_command_timeout` old is stale, and a
stale or missing command halts.
"""

from __future__ import annotations

import numpy as np

TIMEOUT_NS = 100_000_000
FLOAT_EPSILON = 1.1920929e-07


def nanoseconds(stamp) -> int:
    return stamp.sec * 10**9 + stamp.nanosec


class JointTrajectoryController:
    """Follows trajectories by cubic splines. rejected: why messages were refused."""

    def __init__(self, joints, start, *, nonzero_end_velocity=False):
        self.joints, self._nonzero_end = list(joints), nonzero_end_velocity
        self.rejected: list[str] = []
        self._times, self._points = np.array([0.0]), [(np.array(start, float), None)]
        self._before = (0.0, np.array(start, float), np.zeros(len(start)))

    def receive(self, message, now_ns: int) -> None:
        reason = self._problem(message, now_ns)
        if reason:
            self.rejected.append(reason)
            return
        start = nanoseconds(message.header.stamp) or now_ns
        order = [list(message.joint_names).index(name) for name in self.joints]
        times, points = [], []
        for point in message.points:
            at = start + nanoseconds(point.time_from_start)
            if at > now_ns:
                times.append(at / 1e9)
                velocities = np.array(point.velocities)[order] if len(point.velocities) else None
                points.append((np.array(point.positions)[order], velocities))
        position, velocity = self.state(now_ns)
        self._before = now_ns / 1e9, position, velocity
        self._times, self._points = np.array(times), points

    def _problem(self, message, now_ns: int) -> str:
        if sorted(message.joint_names) != sorted(self.joints):
            return 'joint names'
        if not message.points:
            return 'empty'
        last = message.points[-1]
        if not self._nonzero_end and any(abs(v) > FLOAT_EPSILON for v in last.velocities):
            return 'ends in motion'
        start = nanoseconds(message.header.stamp)
        if start and start + nanoseconds(last.time_from_start) < now_ns:
            return 'ends in the past'
        times = [nanoseconds(point.time_from_start) for point in message.points]
        if any(b <= a for a, b in zip(times, times[1:])):
            return 'time does not increase'
        size = len(self.joints)
        if any(len(point.positions) != size or len(point.velocities) not in (0, size)
               for point in message.points):
            return 'sizes'
        return ''

    def state(self, now_ns: int):
        """Return the set-point and its velocity at a time."""
        now = now_ns / 1e9
        after = int(np.searchsorted(self._times, now, side='right'))
        if after == len(self._times):
            return self._points[-1][0], np.zeros(len(self.joints))
        t1, (p1, v1) = self._times[after], self._points[after]
        t0, p0, v0 = (self._before if after == 0 else
                      (self._times[after - 1], *self._points[after - 1]))
        duration = t1 - t0
        if v0 is None or v1 is None:
            return p0 + (p1 - p0) * (now - t0) / duration, (p1 - p0) / duration
        s = (now - t0) / duration
        a, b = 3 * (p1 - p0) - duration * (2 * v0 + v1), -2 * (p1 - p0) + duration * (v0 + v1)
        return (p0 + duration * v0 * s + a * s**2 + b * s**3,
                (duration * v0 + 2 * a * s + 3 * b * s**2) / duration)


class ForwardCommandController:
    """Holds the last message. rejected: how many were refused."""

    def __init__(self, size: int):
        self._size, self.values, self.rejected = size, None, 0

    def receive(self, message, now_ns: int) -> None:
        values = np.array(message.data)
        if len(values) != self._size or not np.isfinite(values).all():
            self.rejected += 1
        else:
            self.values = values


class Servo:
    """Follows the newest twist while it is fresh, and otherwise halts. stale: dropped commands."""

    def __init__(self):
        self._last, self.stale = None, 0

    def receive(self, message, now_ns: int) -> None:
        if now_ns - nanoseconds(message.header.stamp) >= TIMEOUT_NS:
            self.stale += 1
        else:
            self._last = message

    def velocity(self, now_ns: int) -> np.ndarray:
        if self._last is None or now_ns - nanoseconds(self._last.header.stamp) >= TIMEOUT_NS:
            return np.zeros(6)
        linear, angular = self._last.twist.linear, self._last.twist.angular
        return np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z])
