"""`bench --node`: what ROS adds to the model's own time, and whether it stays so.

The policy node is a process of its own; this one publishes 640x480 pictures of every camera and
the joint state, and notes when the chunk that answers them arrives: either when the chunk before
has come, or at a rate for as long as asked. Clocks start: `first` just before the first picture's
publish(), `last` just before the last one's, when the observation can be complete. Pictures are
serialised before that, since a camera's driver is no Python. The model's own time is the node's,
from /diagnostics.
"""

from __future__ import annotations

import array
import contextlib
import functools
import struct
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.serialization import deserialize_message, serialize_message
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.core.policy import read_config
from meanflow_ros.evaluation.bench.device import summary
from meanflow_ros.evaluation.system import POLICY, NodeProcess
from meanflow_ros.ros import from_messages, to_messages
from meanflow_ros.ros.receiving import Receiver

START_S, ANSWER_S, RESET_S = 300.0, 2.0, 10.0
WARM_UP_TRIPS = 20
PICTURES = 4          # published in turn
SLICES = 5            # of a long run, compared with each other


class Feeder:
    """Publishes complete sets of inputs, and notes when their chunks arrive."""

    def __init__(self, node, robot: RobotSpec, width: int, height: int, *, compressed: bool):
        self._node, self._robot = node, robot
        self._news, self._faults = threading.Condition(), []
        self._receiver = Receiver(node, self._faults.append)
        self.arrived: dict[int, float] = {}
        self.statistics: dict[str, str] = {}
        random = np.random.default_rng(0)
        small = random.integers(0, 256, (PICTURES, height // 8, width // 8, 3), dtype=np.uint8)
        make = _compressed if compressed else _raw
        self._pictures = [serialize_message(make(cv2.resize(picture, (width, height))))
                          for picture in small]
        kind, suffix = (CompressedImage, '/compressed') if compressed else (Image, '')
        self._cameras = [node.create_publisher(kind, f'camera/{name}/image_raw{suffix}', 5)
                         for name in robot.camera_names]
        self._joints = node.create_publisher(JointState, 'joint_states', 5)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_publisher(String, 'instruction', latched).publish(
            String(data='open the faucet'))
        for kind, topic, callback in ((JointTrajectory, 'action_chunk', self._on_chunk),
                                      (DiagnosticArray, '/diagnostics', self._on_diagnostics)):
            self._receiver.subscribed(functools.partial(
                node.create_subscription, kind, topic, callback, 10, raw=True))
        self._reset = node.create_client(Trigger, f'{POLICY}/reset')

    def _on_chunk(self, data: bytes) -> None:
        now = time.perf_counter()
        stamp = deserialize_message(data, JointTrajectory).header.stamp
        with self._news:
            self.arrived[from_messages.time_ns(stamp)] = now
            self._news.notify_all()

    def _on_diagnostics(self, data: bytes) -> None:
        for status in deserialize_message(data, DiagnosticArray).status:
            if POLICY in status.name:
                with self._news:
                    self.statistics = {pair.key: pair.value for pair in status.values}
                    self._news.notify_all()

    def publish(self, number: int) -> tuple[int, float, float]:
        """Publish one set; return its stamp, and when its first and its last picture went out."""
        stamp_ns = self._node.get_clock().now().nanoseconds
        stamp = to_messages.time(stamp_ns)
        joints = JointState(name=list(self._robot.state_names),
                            position=[0.1] * len(self._robot.state_names))
        joints.header.stamp = stamp
        self._joints.publish(joints)
        starts = []
        for index, camera in enumerate(self._cameras):
            picture = _stamped(self._pictures[(number + index) % PICTURES], stamp)
            starts.append(time.perf_counter())
            camera.publish(picture)
        return stamp_ns, starts[0], starts[-1]

    def reset(self) -> None:
        """Begin new statistics in the node; it publishes the old ones first."""
        self.statistics = {}
        future = self._reset.call_async(Trigger.Request())
        rclpy.spin_until_future_complete(self._node, future, timeout_sec=RESET_S)
        self.wait(lambda: 'chunks' in self.statistics, RESET_S)

    def end(self) -> None:
        """Receive nothing more."""
        self._receiver.end()

    def wait(self, condition, timeout_s: float) -> None:
        """Return once the condition holds or time is over; RuntimeError if receiving failed."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while not condition() and (left_s := deadline - time.monotonic()) > 0:
                self._news.wait(min(0.5, left_s))
        if self._faults:
            raise RuntimeError(f'receiving failed: {self._faults[0]}')


def _stamped(picture: bytes, stamp) -> bytes:
    """Return a serialised message with another stamp, which is the first of its numbers."""
    return picture[:4] + struct.pack('=iI', stamp.sec, stamp.nanosec) + picture[12:]


def _raw(picture: np.ndarray) -> Image:
    height, width = picture.shape[:2]
    message = Image(width=width, height=height, encoding='rgb8', step=3 * width)
    message.data = array.array('B', picture.tobytes())
    return message


def _compressed(picture: np.ndarray) -> CompressedImage:
    _, data = cv2.imencode('.jpg', picture)
    return CompressedImage(format='jpeg', data=array.array('B', data.tobytes()))


def measure_node(checkpoint: Path, *, device: str, width: int, height: int, threads: int,
                 runs: int, compressed: bool, rate_hz: float, minutes: float) -> dict[str, object]:
    """Return what the node adds to the model's time, and what a run at `rate_hz` is like.

    runs: sets that are published one after the other, each when the one before was answered.
    minutes: of the run at `rate_hz` after that; 0 for none. RuntimeError if the node fails.
    """
    robot = read_config(checkpoint / 'policy.yaml').robot
    with contextlib.ExitStack() as afterwards:
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        afterwards.callback(rclpy.try_shutdown)
        process = NodeProcess(POLICY, 'meanflow_ros.ros.policy_node',
                              Path(tempfile.mkdtemp()) / 'policy.log', {
                                  'checkpoint': checkpoint, 'device': device, 'threads': threads,
                                  'image_transport': 'compressed' if compressed else 'raw',
                                  'picture_size': 'any', 'autostart': True})
        afterwards.callback(process.stop)
        feeder = Feeder(rclpy.create_node('bench'), robot, width, height, compressed=compressed)
        afterwards.callback(feeder.end)
        feeder.wait(lambda: process.check() or feeder.statistics.get('state') == 'active', START_S)
        found: dict[str, object] = {
            'pictures': f'{len(robot.cameras)} x {width}x{height} '
                        f'{"jpeg" if compressed else "rgb8"}'}
        found |= _one_by_one(feeder, runs)
        if minutes:
            found['at_rate'] = _at_rate(feeder, process, rate_hz, minutes)
    return found


def _one_by_one(feeder: Feeder, runs: int) -> dict[str, object]:
    trips = []
    for number in range(WARM_UP_TRIPS + runs):
        if number == WARM_UP_TRIPS:
            feeder.reset()
        stamp_ns, first, last = feeder.publish(number)
        feeder.wait(lambda stamp=stamp_ns: stamp in feeder.arrived, ANSWER_S)
        if number >= WARM_UP_TRIPS and stamp_ns in feeder.arrived:
            end = feeder.arrived[stamp_ns]
            trips.append(((end - first) * 1e3, (end - last) * 1e3))
        feeder.wait(lambda: False, 0.03)
    feeder.reset()
    if not trips:
        raise RuntimeError('the node answered nothing')
    first, last = (summary([trip[i] for trip in trips]) for i in (0, 1))
    model = float(feeder.statistics['latency_p50_ms'])
    return {'asked': runs, 'answered': len(trips), 'from_first_publish_ms': first,
            'from_last_publish_ms': last, 'model_p50_ms': model,
            'ros_adds_p50_ms': {'from_first_publish': round(first['p50'] - model, 3),
                                'from_last_publish': round(last['p50'] - model, 3)}}


def _at_rate(feeder: Feeder, process: NodeProcess, rate_hz: float,
             minutes: float) -> dict[str, object]:
    """Publish at a rate; return latency and memory of each part of the time, CPU and drops."""
    slices = []
    for _ in range(SLICES):
        feeder.arrived.clear()
        sent, begin = {}, time.monotonic()
        cpu_s, published = process.cpu_s(), 0
        while time.monotonic() - begin < minutes * 60 / SLICES:
            stamp_ns, _, last = feeder.publish(published)
            sent[stamp_ns] = last
            published += 1
            feeder.wait(lambda: False, begin + published / rate_hz - time.monotonic())
        seconds, used_s = time.monotonic() - begin, process.cpu_s() - cpu_s
        feeder.wait(lambda: False, 0.5)
        process.check()
        answered = [(feeder.arrived[stamp] - start) * 1e3 for stamp, start in sent.items()
                    if stamp in feeder.arrived]
        slices.append({
            'sets': published, 'rate_hz': round(published / seconds, 2),
            'dropped': published - len(answered),
            'latency_ms': summary(answered) if answered else None,
            'cpu_cores': round(used_s / seconds, 3),
            'memory_mib': round(process.memory_mib(), 1)})
    return {'minutes': minutes, 'asked_rate_hz': rate_hz, 'slices': slices}
