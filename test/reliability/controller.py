"""Process: the robot's controllers. Every command goes to stdout as one JSON line, as it comes.

Lines: ["c", arrival_s, number, stamp_ns, elbow, grip, turn], the commands of one control period
(the twist's stamp is when it was sent; turn is the rate that Servo follows); ["h", time_s], Servo
has halted for want of commands; ["j", arrival_s, stamp_ns, times_s, positions,
velocities]; ["s", time_s, position, velocity], the trajectory controller's set-point;
["x", time_s, reason], a message that a controller refuses. Seconds are of the monotonic clock.
Arguments: where shoulder and elbow stand; and `simulated`, if the controllers live by /clock.
"""

from __future__ import annotations

import json
import struct
import sys
import time

import rclpy
from geometry_msgs.msg import TwistStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from controllers import (
    ForwardCommandController, JointTrajectoryController, Servo, nanoseconds)
from reliability.robot import TOPICS

PERIOD_S = 0.01
WAITING_S = 1.0      # a half of a control period waits for the other one
RESET_NS = 10**9     # a clock that goes back further begins anew
PAUSE_S = 0.05       # a clock that stands as long has stopped


class RealTime:
    """The computer's."""

    def now_ns(self) -> int:
        """Return the time now."""
        return time.time_ns()

    def stands(self) -> bool:
        """Whether it does not go on."""
        return False

    def own(self, message):
        """Return the message, with the stamp that it has by this time."""
        return message


class SimulatedTime:
    """What controllers of a simulator live by: it stops with /clock, and never goes back."""

    def __init__(self, node: Node):
        self._ns, self._clock_ns, self._advanced_s = time.time_ns(), None, 0.0
        node.create_subscription(Clock, '/clock', self._on_clock, 10, raw=True)

    def now_ns(self) -> int:
        """Return the time now."""
        return self._ns

    def stands(self) -> bool:
        """Whether it does not go on."""
        return time.monotonic() - self._advanced_s > PAUSE_S

    def own(self, message):
        """Return the message, with the stamp that it has by this time."""
        if self._clock_ns is not None:
            stamp = message.header.stamp
            stamp.sec, stamp.nanosec = divmod(
                max(0, nanoseconds(stamp) - self._clock_ns + self._ns), 10**9)
        return message

    def _on_clock(self, data: bytes) -> None:
        if len(data) < 12:
            return
        seconds, rest_ns = struct.unpack('<iI', data[4:12])
        clock_ns, before_ns = seconds * 10**9 + rest_ns, self._clock_ns
        if seconds < 0 or before_ns is not None and 0 <= before_ns - clock_ns < RESET_NS:
            return                     # no time; or it waits until it is as late again
        if before_ns is not None:
            self._ns += max(0, clock_ns - before_ns)
        self._clock_ns, self._advanced_s = clock_ns, time.monotonic()


class Controllers:
    """Follows what comes and tells of it; `step` is called at 100 Hz."""

    def __init__(self, node: Node, shoulder: float, elbow: float, of: RealTime | SimulatedTime):
        self.time = of
        self._arm = JointTrajectoryController(['shoulder'], [shoulder])
        self._forward, self._servo = ForwardCommandController(2), Servo()
        self._elbow, self._moving, self._turns = elbow, False, False
        self._halves: dict[str, dict[int, tuple[float, list]]] = {'forward': {}, 'twist': {}}
        queue = QoSProfile(depth=200)
        node.create_subscription(JointTrajectory, TOPICS['trajectory'], self._on_trajectory, queue)
        node.create_subscription(Float64MultiArray, TOPICS['forward'], self._on_forward, queue)
        node.create_subscription(TwistStamped, TOPICS['twist'], self._on_twist, queue)
        self._state = node.create_publisher(JointState, 'robot/state', qos_profile_sensor_data)

    def step(self) -> None:
        """Note the set-point, whether Servo turns, and publish the state."""
        turns = self._turn() != 0
        if self._turns and not turns:
            tell('h', time.monotonic())
        self._turns = turns
        position, velocity = self._arm.state(self.time.now_ns())
        moving = bool(abs(velocity[0]) > 1e-9) and not self.time.stands()
        if moving or self._moving:
            tell('s', time.monotonic(), float(position[0]), float(velocity[0]) * moving)
        self._moving = moving
        self._state.publish(JointState(name=['shoulder', 'elbow'],
                                       position=[float(position[0]), self._elbow]))

    def _on_trajectory(self, message) -> None:
        before = len(self._arm.rejected)
        stamp_ns = nanoseconds(message.header.stamp)
        tell('j', time.monotonic(), stamp_ns,
             [nanoseconds(point.time_from_start) / 1e9 for point in message.points],
             [list(point.positions) for point in message.points],
             [list(point.velocities) for point in message.points])
        self._arm.receive(self.time.own(message), self.time.now_ns())
        if len(self._arm.rejected) > before:
            tell('x', time.monotonic(), f'trajectory: {self._arm.rejected[-1]}')

    def _on_forward(self, message, info) -> None:
        before = self._forward.rejected
        self._forward.receive(message, 0)
        if self._forward.rejected > before:
            tell('x', time.monotonic(), f'forward command: {list(message.data)[:4]}')
        else:
            self._elbow = float(message.data[0])
        self._half('forward', info, list(message.data))

    def _on_twist(self, message, info) -> None:
        before, stamp_ns = self._servo.stale, nanoseconds(message.header.stamp)
        self._servo.receive(self.time.own(message), self.time.now_ns())
        if self._servo.stale > before:
            tell('x', time.monotonic(), 'twist: stale')
        turn = self._turn()
        self._turns = turn != 0
        self._half('twist', info, [stamp_ns, turn])

    def _turn(self) -> float:
        return float(self._servo.velocity(self.time.now_ns())[5])

    def _half(self, name: str, info: dict, values: list) -> None:
        """Tell of the commands of a control period once both are there: their numbers are equal.

        A number that is left out is a lost message.
        """
        number, halves, now_s = info['publication_sequence_number'], self._halves, time.monotonic()
        for each in halves.values():     # of a node that is gone, too, whose numbers come again
            while each and now_s - next(iter(each.values()))[0] > WAITING_S:
                each.pop(next(iter(each)))
        halves[name][number] = now_s, values
        if all(number in each for each in halves.values()):
            (stamp_ns, turn), forward = (halves[name].pop(number)[1]
                                         for name in ('twist', 'forward'))
            tell('c', now_s, number, stamp_ns, *forward, turn)


def tell(*record) -> None:
    """Write one record."""
    print(json.dumps(record), flush=True)


def main() -> None:
    """Run until stdin ends."""
    rclpy.init()
    node = Node('controllers')
    of = SimulatedTime if 'simulated' in sys.argv else lambda node: RealTime()
    controllers = Controllers(node, *map(float, sys.argv[1:3]), of(node))
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    node.create_timer(PERIOD_S, controllers.step)
    executor.spin()


if __name__ == '__main__':
    main()
