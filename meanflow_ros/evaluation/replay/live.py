"""--live: a bag is played over DDS, with /clock, to the policy node that runs; chunks come back.

The node must be active and use simulated time. The bag's topics go out under the node's own names,
at the pace at which they were recorded. A chunk counts as ready at the time of the bag at which it
arrives here. The rest of the replay is the one that needs no ROS.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

try:
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rcl_interfaces.srv import GetParameters
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from rosgraph_msgs.msg import Clock
    from sensor_msgs.msg import CompressedImage, Image, JointState
    from std_msgs.msg import String
    from std_srvs.srv import Trigger
    from trajectory_msgs.msg import JointTrajectory
except ImportError as missing:
    raise ValueError(f'--live needs ROS 2: source one, or install its wheels ({missing})'
                     ) from None

from meanflow_ros.core.contract import NANOSECONDS, ActionChunk, RobotSpec, TimedActions
from meanflow_ros.core.timeline import value_at
from meanflow_ros.evaluation.replay.gathered import Taken
from meanflow_ros.evaluation.replay.settings import ReplaySettings
from meanflow_ros.evaluation.replay.topics import Topics
from meanflow_ros.ros import to_messages
from meanflow_ros.ros.bag import deserialize
from meanflow_ros.ros.bag_files import Bag, RawMessage
from meanflow_ros.ros.from_messages import time_ns, timed_actions
from meanflow_ros.ros.ingest import COMPRESSED_IMAGE

NODE = 'meanflow_policy'
WAIT_S = 15.0          # for the node and its subscriptions
SETTLE_S = 2.5         # in which the node's subscriptions follow what is offered here
TICK_S = 0.005         # from clock to clock
AFTER_S = 1.0          # of the bag's time in which late chunks may come
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class LiveNode:
    """The running node in the place of a checkpoint; see Acting."""

    flow, seconds, chunks = False, 0.0, 0

    def __init__(self, settings: ReplaySettings):
        self._robot, self._namespace = settings.robot, '/' + settings.namespace.strip('/')
        self._answers: dict[int, tuple[TimedActions, int]] = {}

    def infer(self, queue: Sequence[Taken]) -> None:
        """Set the chunk of every Taken to what the node has answered."""
        for taken in queue:
            timed, _ = self._answers[taken.stamp_ns]
            taken.chunk, taken.known = whole_chunk(timed, self._robot)
            self.chunks += 1

    def settle(self) -> None:
        """Do nothing: every chunk is there."""

    def play(self, bag: Bag, topics: Topics, start_ns: int, stop_ns: int | None, told,
             ) -> tuple[dict[int, int], dict[str, str]]:
        """Play a bag; return stamp -> when the chunk came, and what the node says of itself.

        told: instructions that no topic has. ValueError if no node is there that can be played to.
        """
        if told is not None and not isinstance(told, str):
            raise ValueError('--live plays instructions from a topic, or one of --instruction; '
                             'not from a file')
        context = rclpy.Context()
        context.init()
        try:
            player = _Player(context, self._namespace, self._robot, topics)
            try:
                player.require_node()
                player.play(bag, start_ns, stop_ns, told)
            finally:
                player.close()
        finally:
            context.try_shutdown()
        self._answers = player.answers
        return {stamp: done_ns for stamp, (_, done_ns) in player.answers.items()}, player.status


def whole_chunk(timed: TimedActions, robot: RobotSpec) -> tuple[ActionChunk, np.ndarray]:
    """Return a chunk (T, A) from the steps that a node has published, and which were (T,).

    Steps that were over when the chunk was ready are not published: they repeat the first.
    """
    period_ns = round(robot.period_s * NANOSECONDS)
    values = [value_at(timed, int(due), period_ns) for due in robot.due_ns(timed.stamp_ns)]
    known = np.array([value is not None for value in values])
    first = int(known.argmax())
    actions = [timed.actions[0 if step < first else -1] if value is None else value
               for step, value in enumerate(values)]
    return ActionChunk(actions=np.array(actions), stamp_ns=timed.stamp_ns,
                       period_s=robot.period_s, first_step=robot.first_step), known


class _Player:
    """Publishers for what the node takes, and a thread that hears what comes back."""

    def __init__(self, context, namespace: str, robot: RobotSpec, topics: Topics):
        self._robot, self._topics = robot, topics
        self.answers: dict[int, tuple[TimedActions, int]] = {}
        self.status: dict[str, str] = {}
        self._clock_ns = 0
        self._node = rclpy.create_node('meanflow_replay', namespace=namespace, context=context)
        self._name = f'{namespace.rstrip("/")}/{NODE}'
        self._clock = self._node.create_publisher(Clock, '/clock', 10)
        self._publishers = {}
        for camera, topic in topics.cameras.items():
            packed = topics.types[topic] == COMPRESSED_IMAGE
            self._add(topic, CompressedImage if packed else Image,
                      f'camera/{camera}/image_raw' + ('/compressed' if packed else ''))
        self._add(topics.state, JointState, 'joint_states')
        self._instruction = self._node.create_publisher(String, 'instruction', LATCHED)
        self._node.create_subscription(JointTrajectory, 'action_chunk', self._on_chunk, 100)
        self._node.create_subscription(DiagnosticArray, '/diagnostics', self._on_status, 100)
        self._executor = SingleThreadedExecutor(context=context)
        self._executor.add_node(self._node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _add(self, topic: str, kind, name: str) -> None:
        if topic:
            self._publishers[topic] = self._node.create_publisher(kind, name, QoSProfile(depth=50))

    def _spin(self) -> None:
        while not self._stop.is_set():
            self._executor.spin_once(timeout_sec=0.1)

    def close(self) -> None:
        """End the thread and the node."""
        self._stop.set()
        self._thread.join()
        self._executor.shutdown()
        self._node.destroy_node()

    def _on_chunk(self, message) -> None:
        timed = timed_actions(message, self._robot.action_space.dimensions)
        self.answers.setdefault(timed.stamp_ns, (timed, self._clock_ns))

    def _on_status(self, message) -> None:
        for status in message.status:
            if status.name == f'{self._name}: policy':
                self.status = {'message': status.message, **{
                    pair.key: pair.value for pair in status.values}}

    # Before

    def require_node(self) -> None:
        """ValueError unless an active node with simulated time hears every topic."""
        self._wait(lambda: self.status, lambda: (
            f'there is no {self._name}: start it, use_sim_time:=true, or give its --namespace'))
        state = self.status.get('state')
        if state != 'active':
            raise ValueError(f'{self._name} is {state}: activate it first')
        if not self._ask(GetParameters, 'get_parameters',
                         GetParameters.Request(names=['use_sim_time'])).values[0].bool_value:
            raise ValueError(f'{self._name} does not use simulated time: start it with '
                             f'use_sim_time:=true')
        self._wait(lambda: not self._unheard(), lambda: (
            f'{self._name} does not listen to {", ".join(self._unheard())}: does its '
            f'image_transport fit the recording, and its checkpoint --checkpoint?'))
        time.sleep(SETTLE_S)

    def _unheard(self) -> list[str]:
        return [publisher.topic_name for publisher in self._publishers.values()
                if not publisher.get_subscription_count()]

    def _wait(self, condition, problem) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > end:
                raise ValueError(problem())
            time.sleep(0.02)

    def _ask(self, kind, service: str, request):
        client = self._node.create_client(kind, f'{self._name}/{service}')
        self._wait(client.service_is_ready, lambda: f'{self._name} has no service {service}')
        future = client.call_async(request)
        self._wait(future.done, lambda: f'{self._name}/{service} does not answer')
        return future.result()

    # Playing

    def play(self, bag: Bag, start_ns: int, stop_ns: int | None, told: str | None) -> None:
        """Publish the bag's messages at the times at which they were recorded."""
        self._tick(start_ns)
        self._ask(Trigger, 'reset', Trigger.Request())     # of what an earlier bag has left
        if told is not None:
            self._instruction.publish(String(data=told))
        if start_ns > bag.start_ns and self._topics.instruction:
            for raw in bag.messages({self._topics.instruction}, None, start_ns):
                self._publish(raw)
        began, end_ns = time.monotonic(), start_ns
        for raw in bag.messages(self._topics.all(), start_ns, stop_ns):
            self._pass(start_ns, began, raw.stamp_ns)
            self._publish(raw)
            end_ns = raw.stamp_ns
        self._pass(start_ns, began, end_ns + round(AFTER_S * NANOSECONDS))

    def _pass(self, start_ns: int, began: float, until_ns: int) -> None:
        """Let time pass until it is `until_ns` in the bag, and say so on /clock."""
        while (left_s := (until_ns - start_ns) / NANOSECONDS - (time.monotonic() - began)) > 0:
            time.sleep(min(left_s, TICK_S))
            self._tick(min(until_ns, start_ns + round((time.monotonic() - began) * NANOSECONDS)))
        self._tick(until_ns)

    def _tick(self, now_ns: int) -> None:
        if self._topics.clock and self._clock_ns:
            return                                         # the recording has a clock of its own
        self._clock_ns = max(now_ns, 1)
        self._clock.publish(Clock(clock=to_messages.time(self._clock_ns)))

    def _publish(self, raw: RawMessage) -> None:
        if raw.topic in self._publishers:
            self._publishers[raw.topic].publish(bytes(raw.data))
        elif raw.topic == self._topics.instruction:
            self._instruction.publish(String(data=deserialize(raw.data, raw.type).data))
        elif raw.topic == self._topics.clock:
            self._clock_ns = time_ns(deserialize(raw.data, raw.type).clock)
            self._clock.publish(bytes(raw.data))
