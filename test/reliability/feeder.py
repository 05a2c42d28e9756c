"""Process: two cameras, joint states and an instruction at 30 Hz, and the faults of each.

Lines on stdin: `STREAM FAULT` (streams.py), `STREAM ok`, `clock SECONDS` (a jump), `clock stop`,
`clock go`, `say JSON`, `burst HZ`, `second STREAM` (another publisher), `describe JSON`.
"""

from __future__ import annotations

import heapq
import itertools
import json
import sys
import threading
import time
from collections import deque

import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from meanflow_ros.ros import to_messages
from reliability.robot import CAMERAS, HEIGHT, LOAD, STATES, WIDTH
from reliability.streams import JOINTS, PICTURES

CLOCK_PERIOD_S = 0.01
LATCHED = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
INSTRUCTIONS = ('push the lever', 'pull the lever')


class Feeder:
    """The robot's side; `run` publishes what is due."""

    def __init__(self, node: Node, period_s: float):
        self._node, self._period_s = node, period_s
        self._publishers = {name: node.create_publisher(
            Image, f'camera/{name}/image_raw', qos_profile_sensor_data) for name in CAMERAS}
        self._publishers['joints'] = node.create_publisher(
            JointState, 'joint_states', qos_profile_sensor_data)
        self._clock = node.create_publisher(Clock, '/clock', 10)
        self._instruction = node.create_publisher(String, 'instruction', LATCHED)
        self._description = node.create_publisher(String, 'robot_description', QoSProfile(
            depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL))
        node.create_subscription(JointState, 'robot/state', self._on_state,
                                 qos_profile_sensor_data)
        self._random = np.random.default_rng(17)
        self._state: dict | None = None      # of the controllers, once they tell it
        self._faults: dict = {}       # stream -> (fault, its memory)
        self._seconds: dict = {}      # stream -> another publisher of its topic
        self._later: list = []        # (when, order, publisher, message)
        self._order = itertools.count()
        self._offset_ns, self._stopped_ns, self._burst_hz = 0, None, 0.0
        self._lines: deque[str] = deque()
        threading.Thread(target=self._listen, daemon=True).start()
        self._instruction.publish(String(data=INSTRUCTIONS[0]))

    def run(self, executor) -> None:
        """Publish until stdin ends."""
        due = {self._feed: time.monotonic(), self._tick: 0.0, self._speak: 0.0}
        periods = {self._feed: lambda: self._period_s, self._tick: lambda: CLOCK_PERIOD_S,
                   self._speak: lambda: 1 / self._burst_hz if self._burst_hz else 0.05}
        while True:
            while self._lines:
                line = self._lines.popleft()
                if not line:
                    return
                self._do(*line.split(maxsplit=1))
            now = time.monotonic()
            for act, at in due.items():
                if now >= at:
                    act()
                    due[act] = max(at + periods[act](), now - 0.1)
            while self._later and self._later[0][0] <= now:
                _, _, publisher, message = heapq.heappop(self._later)
                publisher.publish(message)
            wake = min([*due.values(), *(entry[0] for entry in self._later[:1])])
            executor.spin_once(timeout_sec=max(0.0, wake - time.monotonic()))

    def _listen(self) -> None:
        for line in sys.stdin:
            self._lines.append(line.strip())
        self._lines.append('')

    def _do(self, word: str, rest: str = '') -> None:
        if word == 'clock':
            self._change_clock(rest)
        elif word == 'say':
            self._instruction.publish(String(data=json.loads(rest)))
        elif word == 'say_bytes':
            self._instruction.publish(bytes.fromhex(rest))
        elif word == 'burst':
            self._burst_hz = float(rest)
        elif word == 'describe':
            self._description.publish(String(data=json.loads(rest)))
        elif word == 'second':
            first = self._publishers[rest]
            self._seconds[rest] = self._node.create_publisher(
                first.msg_type, first.topic_name, qos_profile_sensor_data)
        elif rest == 'ok':
            self._faults.pop(word, None)
            if word in self._seconds:
                ended = self._seconds.pop(word)
                self._later = [entry for entry in self._later if entry[2] is not ended]
                heapq.heapify(self._later)
                self._node.destroy_publisher(ended)
        else:
            self._faults[word] = (JOINTS if word == 'joints' else PICTURES)[rest], {}

    def _change_clock(self, rest: str) -> None:
        if rest == 'stop':
            self._stopped_ns = self._now_ns()
        elif rest == 'go':
            self._stopped_ns = None
        else:
            self._offset_ns += round(float(rest) * 1e9)

    def _now_ns(self) -> int:
        return self._stopped_ns or time.time_ns() + self._offset_ns

    def _on_state(self, message) -> None:
        self._state = dict(zip(message.name, message.position))

    def _feed(self) -> None:
        stamp_ns = self._now_ns()
        if self._state is not None:
            self._send('joints', self._joint_state(stamp_ns))
        for name in CAMERAS:
            self._send(name, self._picture(stamp_ns))
        for name in self._seconds:
            later = stamp_ns + 7_000_000     # a publisher of its own rhythm, a robot near
            message = (self._picture(later) if name in CAMERAS else
                       self._joint_state(later, shift=0.1))
            self._later_on(0.007, self._seconds[name], message)

    def _send(self, name: str, message) -> None:
        fault, memory = self._faults.get(name, (None, None))
        for delay_s, each in [(0.0, message)] if fault is None else fault(message, memory):
            if delay_s:
                self._later_on(delay_s, self._publishers[name], each)
            else:
                self._publishers[name].publish(each)

    def _later_on(self, delay_s: float, publisher, message) -> None:
        heapq.heappush(self._later, (time.monotonic() + delay_s, next(self._order), publisher,
                                     message))

    def _tick(self) -> None:
        self._clock.publish(Clock(clock=to_messages.time(self._now_ns())))

    def _speak(self) -> None:
        if self._burst_hz:
            self._instruction.publish(String(data=INSTRUCTIONS[next(self._order) % 2]))

    def _picture(self, stamp_ns: int) -> Image:
        pixels = self._random.integers(0, 256, HEIGHT * WIDTH * 3, dtype=np.uint8)
        message = Image(height=HEIGHT, width=WIDTH, encoding='rgb8', step=3 * WIDTH,
                        data=pixels.tobytes())
        message.header.stamp = to_messages.time(stamp_ns)
        return message

    def _joint_state(self, stamp_ns: int, shift: float = 0.0) -> JointState:
        values = {**self._state, 'load': LOAD}
        message = JointState(name=list(STATES), position=[values[name] + shift for name in STATES])
        message.header.stamp = to_messages.time(stamp_ns)
        return message


def main() -> None:
    """Run until stdin ends."""
    rclpy.init()
    node = Node('feeder')
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    Feeder(node, 1 / float(sys.argv[1])).run(executor)


if __name__ == '__main__':
    main()
