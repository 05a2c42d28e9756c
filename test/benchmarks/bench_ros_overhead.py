"""What ROS adds to the model's own time, from publication of the pictures to the chunk's arrival.

    python test/benchmarks/bench_ros_overhead.py --runs 300

The policy node is a process of its own; this one publishes 640x480 pictures of every camera and
the joint state, and waits for the chunk that answers them. Clock starts: `first` just before the
first picture's publish(), `last` just before the last one's, when the observation can be complete.
The model's own time is the node's: it is read from /diagnostics after the runs.
"""

from __future__ import annotations

import argparse
import array
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from meanflow_ros.core.policy import read_config
from meanflow_ros.evaluation.system import POLICY, NodeProcess
from meanflow_ros.paths import default_checkpoint
from meanflow_ros.ros import from_messages, to_messages

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory


class Feeder:
    """Publishes one complete set of inputs at a time and waits for its chunk."""

    def __init__(self, node, robot, width: int, height: int):
        self._node, self._robot = node, robot
        self._executor = SingleThreadedExecutor()  # rclpy.spin_once adds the node each time
        self._executor.add_node(node)
        self._arrived: dict[int, float] = {}
        self.statistics: dict[str, str] = {}
        random = np.random.default_rng(0)
        self._pictures = []
        for _ in range(4):
            image = Image(width=width, height=height, encoding='rgb8', step=3 * width)
            image.data = array.array('B', random.integers(
                0, 256, width * height * 3, dtype=np.uint8).tobytes())
            self._pictures.append(image)
        self._cameras = [node.create_publisher(Image, f'camera/{name}/image_raw', 5)
                         for name in robot.camera_names]
        self._joints = node.create_publisher(JointState, 'joint_states', 5)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_publisher(String, 'instruction', latched).publish(
            String(data='open the faucet'))
        node.create_subscription(JointTrajectory, 'action_chunk', self._on_chunk, 10)
        node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, 10)
        self._reset = node.create_client(Trigger, f'{POLICY}/reset')

    def _on_chunk(self, message) -> None:
        self._arrived[from_messages.time_ns(message.header.stamp)] = time.perf_counter()

    def _on_diagnostics(self, message) -> None:
        for status in message.status:
            if POLICY in status.name:
                self.statistics = {pair.key: pair.value for pair in status.values}

    def round_trip(self, number: int) -> tuple[float, float] | None:
        """Return the seconds since the first and the last publish(); None if no chunk came."""
        stamp_ns = self._node.get_clock().now().nanoseconds
        stamp = to_messages.time(stamp_ns)
        joints = JointState(name=list(self._robot.state_names),
                            position=[0.1] * len(self._robot.state_names))
        joints.header.stamp = stamp
        self._joints.publish(joints)
        starts = []
        for index, camera in enumerate(self._cameras):
            picture = self._pictures[(number + index) % len(self._pictures)]
            picture.header.stamp = stamp
            starts.append(time.perf_counter())
            camera.publish(picture)
        self.wait(lambda: stamp_ns in self._arrived, 2.0)
        arrived = self._arrived.pop(stamp_ns, None)
        return None if arrived is None else (arrived - starts[0], arrived - starts[-1])

    def reset(self) -> None:
        """Begin new statistics in the node; it publishes the old ones first."""
        self.statistics = {}
        future = self._reset.call_async(Trigger.Request())
        self.wait(lambda: future.done() and 'chunks' in self.statistics, 10.0)

    def wait(self, condition, timeout_s: float) -> None:
        """Spin until the condition holds or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            self._executor.spin_once(timeout_sec=0.05)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
    return {'p50_ms': round(p50, 3), 'p95_ms': round(p95, 3), 'p99_ms': round(p99, 3)}


def main() -> int:
    """Run the benchmark and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--checkpoint', type=Path, default=default_checkpoint())
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--runs', type=int, default=300)
    parser.add_argument('--width', type=int, default=640)
    parser.add_argument('--height', type=int, default=480)
    parser.add_argument('--threads', type=int, default=0, help='of the network; 0: the default')
    parser.add_argument('--pause', type=float, default=0.03, help='seconds between the runs')
    parser.add_argument('--out', type=Path)
    arguments = parser.parse_args()
    robot = read_config(arguments.checkpoint / 'policy.yaml').robot
    rclpy.init()
    log = Path(tempfile.mkdtemp()) / 'policy.log'
    process = NodeProcess(POLICY, 'meanflow_ros.ros.policy_node', log, {
        'checkpoint': arguments.checkpoint, 'device': arguments.device,
        'threads': arguments.threads,
        'autostart': True})
    try:
        feeder = Feeder(rclpy.create_node('bench'), robot, arguments.width, arguments.height)
        feeder.wait(lambda: process.check() or feeder.statistics.get('state') == 'active', 120)
        for number in range(20):
            feeder.round_trip(number)
        feeder.reset()
        trips = []
        for number in range(arguments.runs):
            trips.append(feeder.round_trip(number))
            time.sleep(arguments.pause)
        feeder.reset()
    finally:
        process.stop()
        rclpy.try_shutdown()
    answered = [trip for trip in trips if trip is not None]
    model_ms = float(feeder.statistics['latency_p50_ms'])
    first, last = (_percentiles([trip[i] for trip in answered]) for i in (0, 1))
    result = {'pictures': f'{len(robot.cameras)} x {arguments.width}x{arguments.height} rgb8',
              'runs': arguments.runs, 'answered': len(answered),
              'from_first_publish': first, 'from_last_publish': last, 'model_p50_ms': model_ms,
              'ros_adds_p50_ms': {'from_first_publish': round(first['p50_ms'] - model_ms, 3),
                                  'from_last_publish': round(last['p50_ms'] - model_ms, 3)}}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
