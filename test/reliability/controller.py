"""Process: the robot's controllers. Every command goes to stdout as one JSON line, as it comes.

Lines: ["c", arrival_s, stamp_ns, elbow, grip, turn], the commands of one control period (the
twist's stamp is when it was sent); ["j", arrival_s, stamp_ns, times_s, positions, velocities];
["s", time_s, position, velocity], the trajectory controller's set-point while it moves;
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


class Controllers:
    """Follows what comes and tells of it; `step` is called at 100 Hz."""

    def __init__(self, node: Node, shoulder: float, elbow: float):
        self._arm = JointTrajectoryController(['shoulder'], [shoulder])
        self._forward = ForwardCommandController(2)
        self._elbow, self._moving = elbow, False
        self._unpaired: dict[str, list] = {'forward': [], 'twist': []}
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
        # The clock may be a simulated one: the trajectory begins when it is sent.
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
        self._unpaired['forward'].append((info['source_timestamp'], list(message.data)))
        self._pair()

    def _on_twist(self, message, info) -> None:
        self._unpaired['twist'].append((info['source_timestamp'],
                                        [nanoseconds(message.header.stamp),
                                         message.twist.angular.z]))
        self._pair()

    def _pair(self) -> None:
        """Tell of what was sent in one control period: a forward command, and then a twist."""
        forwards, twists = self._unpaired['forward'], self._unpaired['twist']
        while forwards and twists:
            if twists[0][0] < forwards[0][0]:
                twists.pop(0)
            elif len(forwards) > 1 and forwards[1][0] < twists[0][0]:
                forwards.pop(0)
            else:
                (_, values), (_, (stamp_ns, turn)) = forwards.pop(0), twists.pop(0)
                tell('c', time.monotonic(), stamp_ns, *values, turn)
                continue
            tell('x', time.monotonic(), 'half of a control period')


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
