"""Process: two cameras, joint states and an instruction at 30 Hz, and the faults of each.

Lines on stdin: `STREAM FAULT` (streams.py), `STREAM ok`, `time SECONDS` (a jump), `time stop`,
`time go`, `say STREAM JSON` (a text), `bytes STREAM HEX`, `burst STREAM HZ JSON` (texts in turn;
0 ends it), `second STREAM` (another publisher), `gone STREAM` (no publisher), `back STREAM`.
Pictures are compressed only while somebody subscribes to that.
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
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from meanflow_ros.ros import to_messages
from reliability.robot import CAMERAS, HEIGHT, INSTRUCTION, LOAD, STATES, WIDTH
from reliability.streams import FAULTS, compressed

CLOCK_PERIOD_S = 0.01


def _latched(depth: int) -> QoSProfile:
    return QoSProfile(depth=depth, durability=DurabilityPolicy.TRANSIENT_LOCAL)


TOPICS = {
    'joints': (JointState, 'joint_states', qos_profile_sensor_data),
    'clock': (Clock, '/clock', 10),
    'instruction': (String, 'instruction', _latched(10)),
    'description': (String, 'robot_description', _latched(1)),
    **{name: (Image, f'camera/{name}/image_raw', qos_profile_sensor_data) for name in CAMERAS},
    **{f'{name}/compressed': (CompressedImage, f'camera/{name}/image_raw/compressed',
                              qos_profile_sensor_data) for name in CAMERAS}}


class Feeder:
    """The robot's side; `run` publishes what is due."""

    def __init__(self, node: Node, period_s: float):
        self._node, self._period_s = node, period_s
        self._publishers = {name: node.create_publisher(*topic)
                            for name, topic in TOPICS.items()}
        node.create_subscription(JointState, 'robot/state', self._on_state,
                                 qos_profile_sensor_data)
        self._random = np.random.default_rng(17)
        self._state: dict | None = None      # of the controllers, once they tell it
        self._faults: dict = {}       # stream -> (fault, its memory)
        self._seconds: dict = {}      # stream -> another publisher of its topic
        self._later: list = []        # (when, order, publisher, message)
        self._order = itertools.count()
        self._offset_ns, self._stopped_ns = 0, None
        self._burst_hz, self._burst = 0.0, ('', [])     # stream and texts
        self._lines: deque[str] = deque()
        threading.Thread(target=self._listen, daemon=True).start()
        self._say('instruction', INSTRUCTION)

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
                    self._catch_up()
                    act()
                    due[act] = max(at + periods[act](), now - 0.1)
            self._catch_up()
            wake = min([*due.values(), *(entry[0] for entry in self._later[:1])])
            executor.spin_once(timeout_sec=max(0.0, wake - time.monotonic()))

    def _catch_up(self) -> None:
        """Publish what comes late and is due by now."""
        while self._later and self._later[0][0] <= time.monotonic():
            _, _, publisher, message = heapq.heappop(self._later)
            publisher.publish(message)

    def _listen(self) -> None:
        for line in sys.stdin:
            self._lines.append(line.strip())
        self._lines.append('')

    def _do(self, word: str, rest: str = '') -> None:
        stream, _, more = rest.partition(' ')
        if word == 'time':
            self._change_time(rest)
        elif word == 'say':
            self._say(stream, json.loads(more))
        elif word == 'bytes':
            self._publishers[stream].publish(bytes.fromhex(more))
        elif word == 'burst':
            hz, _, texts = more.partition(' ')
            self._burst_hz, self._burst = float(hz), (stream, json.loads(texts))
        elif word == 'second':
            self._seconds[stream] = self._node.create_publisher(*TOPICS[stream])
        elif word == 'gone':
            self._end(self._publishers.pop(stream))
        elif word == 'back':
            self._publishers[stream] = self._node.create_publisher(*TOPICS[stream])
        elif rest == 'ok':
            self._faults.pop(word, None)
            if word in self._seconds:
                self._end(self._seconds.pop(word))
        else:
            self._faults[word] = FAULTS[word][rest], {
                'period_s': CLOCK_PERIOD_S if word == 'clock' else self._period_s}

    def _end(self, publisher) -> None:
        self._later = [entry for entry in self._later if entry[2] is not publisher]
        heapq.heapify(self._later)
        self._node.destroy_publisher(publisher)

    def _say(self, stream: str, text: str) -> None:
        self._send(stream, String(data=text))

    def _change_time(self, rest: str) -> None:
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
            picture = self._picture(stamp_ns)
            self._send(name, picture)
            if self._publishers[f'{name}/compressed'].get_subscription_count():
                self._send(f'{name}/compressed', compressed(picture))
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
        self._send('clock', Clock(clock=to_messages.time(self._now_ns())))

    def _speak(self) -> None:
        stream, texts = self._burst
        if self._burst_hz:
            self._say(stream, texts[next(self._order) % len(texts)])

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
