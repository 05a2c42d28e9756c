"""Process: the robot's controllers. Every command goes to stdout as one JSON line, as it comes.

Lines: ["c", arrival_s, number, stamp_ns, elbow, grip, turn], the commands of one control period
(the twist's stamp is when it was sent); ["j", arrival_s, stamp_ns, times_s, positions,
velocities]; ["s", time_s, position, velocity], the trajectory controller's set-point;
["x", time_s, reason], a message that a controller refuses. Seconds are of the monotonic clock.
"""

from __future__ import annotations

import json
import sys
import time

import rclpy
from geometry_msgs.msg import TwistStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from controllers import ForwardCommandController, JointTrajectoryController, nanoseconds
from reliability.robot import TOPICS

PERIOD_S = 0.01
WAITING = 20        # halves of control periods that wait for the other one
OWN_CLOCK_NS = 2 * 10**9


class Controllers:
    """Follows what comes and tells of it; `step` is called at 100 Hz."""

    def __init__(self, node: Node, shoulder: float, elbow: float):
        self._arm = JointTrajectoryController(['shoulder'], [shoulder])
        self._forward = ForwardCommandController(2)
        self._elbow, self._moving = elbow, False
        self._halves: dict[str, dict[int, list]] = {'forward': {}, 'twist': {}}
        queue = QoSProfile(depth=200)
        node.create_subscription(JointTrajectory, TOPICS['trajectory'], self._on_trajectory, queue)
        node.create_subscription(Float64MultiArray, TOPICS['forward'], self._on_forward, queue)
        node.create_subscription(TwistStamped, TOPICS['twist'], self._on_twist, queue)
        self._state = node.create_publisher(JointState, 'robot/state', qos_profile_sensor_data)

    def step(self) -> None:
        """Note the set-point and publish the state."""
        position, velocity = self._arm.state(time.time_ns())
        moving = bool(abs(velocity[0]) > 1e-9)
        if moving or self._moving:
            tell('s', time.monotonic(), float(position[0]), float(velocity[0]))
        self._moving = moving
        self._state.publish(JointState(name=['shoulder', 'elbow'],
                                       position=[float(position[0]), self._elbow]))

    def _on_trajectory(self, message) -> None:
        before, now_ns = len(self._arm.rejected), time.time_ns()
        stamp_ns = nanoseconds(message.header.stamp)
        tell('j', time.monotonic(), stamp_ns,
             [nanoseconds(point.time_from_start) / 1e9 for point in message.points],
             [list(point.positions) for point in message.points],
             [list(point.velocities) for point in message.points])
        if abs(now_ns - stamp_ns) > OWN_CLOCK_NS:     # a simulated one: it begins when it comes
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(now_ns, 10**9)
        self._arm.receive(message, now_ns)
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
        self._half('twist', info, [nanoseconds(message.header.stamp), message.twist.angular.z])

    def _half(self, name: str, info: dict, values: list) -> None:
        """Tell of the commands of a control period once both are there: their numbers are equal.

        A number that is left out is a lost message.
        """
        number, halves = info['publication_sequence_number'], self._halves
        halves[name][number] = values
        if all(number in each for each in halves.values()):
            (stamp_ns, turn), forward = (halves[name].pop(number) for name in ('twist', 'forward'))
            tell('c', time.monotonic(), number, stamp_ns, *forward, turn)
        for each in halves.values():
            while len(each) > WAITING:
                each.pop(next(iter(each)))


def tell(*record) -> None:
    """Write one record."""
    print(json.dumps(record), flush=True)


def main() -> None:
    """Run until stdin ends."""
    rclpy.init()
    node = Node('controllers')
    controllers = Controllers(node, *map(float, sys.argv[1:3]))
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    node.create_timer(PERIOD_S, controllers.step)
    executor.spin()


if __name__ == '__main__':
    main()
