"""A policy node and a robot that feeds it, as two DDS participants in this process.

The node spins in a thread of its own, the feeder in another. Every rig has its own namespace,
so that nothing of an earlier one can be heard.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque

import numpy as np
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Log
from rcl_interfaces.srv import DescribeParameters, SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from meanflow_ros.core.contract import NANOSECONDS, Observation
from meanflow_ros.ros import to_messages
from meanflow_ros.ros.from_messages import time_ns
from meanflow_ros.ros.policy_node import PolicyNode
from meanflow_ros.ros.streams import NoObservation
from micro_policy import CAMERAS, HEIGHT, JOINTS, WIDTH

PERIOD_S = 0.033
TIMEOUT_S = 15.0
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
TRANSITIONS = {'configure': 1, 'cleanup': 2, 'activate': 3, 'deactivate': 4}
_numbers = itertools.count()


def until(condition, what: str, *, timeout_s: float = TIMEOUT_S, each=lambda: None):
    """Call `each` and wait until `condition()` is true; return its value."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f'{what() if callable(what) else what} '
                                 f'did not happen within {timeout_s} s')
        each()
        time.sleep(0.008)


class _Spinner:
    """A context of its own, and a thread that spins one node in it."""

    def __init__(self):
        self.context = rclpy.Context()
        self.context.init()
        self.executor = SingleThreadedExecutor(context=self.context)
        self.error: BaseException | None = None

    def start(self, node) -> None:
        self.executor.add_node(node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        try:
            while not self._stop.is_set():
                self.executor.spin_once(timeout_sec=0.2)
        except BaseException as error:  # whatever ends the node must fail the test
            self.error = error

    def close(self, node) -> None:
        self._stop.set()
        self.executor.wake()
        self._thread.join()
        if hasattr(node, '_release'):
            node._release()
        self.executor.shutdown()
        node.destroy_node()
        self.context.try_shutdown()


class Feeder:
    """The robot's side: publishes inputs, collects what the node says."""

    def __init__(self, node: Node, target: str, inputs: dict[str, str], *, compressed: bool,
                 reliable: bool):
        self.node = node
        self.chunks: deque[JointTrajectory] = deque()
        self.diagnostics: deque = deque()           # (monotonic seconds, DiagnosticStatus)
        self.logs: deque[str] = deque()
        self.sent: dict[int, Observation] = {}      # by stamp
        self.random = np.random.default_rng(3)
        self.joint_order = list(JOINTS)
        self._next_s = 0.0
        self._target = target
        self._clock = node.create_publisher(Clock, '/clock', 10)
        kind = CompressedImage if compressed else Image
        quality = QoSProfile(depth=5) if reliable else qos_profile_sensor_data
        self.pictures = {name: node.create_publisher(kind, topic, quality)
                         for name, topic in inputs.items() if name in CAMERAS}
        self.joints = node.create_publisher(JointState, inputs.get('joints', 'joint_states'),
                                            qos_profile_sensor_data)
        self.instruction = node.create_publisher(String, 'instruction', LATCHED)
        node.create_subscription(JointTrajectory, inputs.get('chunks', 'action_chunk'),
                                 lambda message: self.chunks.append(message), 100)
        node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, 100)
        node.create_subscription(Log, '/rosout', self._on_log, QoSProfile(
            depth=1000, durability=DurabilityPolicy.TRANSIENT_LOCAL))

    def _on_diagnostics(self, message) -> None:
        self.diagnostics.extend((time.monotonic(), status) for status in message.status
                                if status.name == f'{self._target}: policy')

    def _on_log(self, message) -> None:
        if message.name == self._target.strip('/').replace('/', '.'):
            self.logs.append(message.msg)

    def now_ns(self) -> int:
        return self.node.get_clock().now().nanoseconds

    def tick(self, stamp_ns: int) -> None:
        self._clock.publish(Clock(clock=to_messages.time(stamp_ns)))

    def image(self, pixels: np.ndarray, stamp_ns: int, encoding: str = 'rgb8') -> Image:
        message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding,
                        step=pixels[0].nbytes, data=pixels.tobytes())
        message.header.stamp = to_messages.time(stamp_ns)
        return message

    def joint_state(self, values: dict[str, float], stamp_ns: int) -> JointState:
        message = JointState(name=list(values), position=[float(v) for v in values.values()])
        message.header.stamp = to_messages.time(stamp_ns)
        return message

    def feed(self, *, stamp_ns: int | None = None, wrist_ns: int = 0, picture=None,
             without: tuple = ()) -> int:
        """Publish joints and both pictures, one random set; return the static camera's stamp.

        wrist_ns: how much later the wrist's stamp is. picture(name, pixels, stamp_ns) makes the
        picture messages in place of plain rgb8.
        """
        stamp_ns = self.now_ns() if stamp_ns is None else stamp_ns
        images = {name: self.random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
                  for name in CAMERAS}
        state = dict(zip(JOINTS, self.random.uniform([-1, 0.3, -6], [2, 0.8, 30])))
        oldest_ns = min(stamp_ns, stamp_ns + wrist_ns)
        self.sent[oldest_ns] = Observation(stamp_ns=oldest_ns, images=images, instruction='-',
                                           state=np.array([*state.values()]))
        if 'joints' not in without:
            self.joints.publish(self.joint_state(
                {name: state[name] for name in self.joint_order if name in state}, oldest_ns))
        for name in CAMERAS:
            if name not in without:
                stamp = stamp_ns + (wrist_ns if name == 'wrist' else 0)
                self.pictures[name].publish((picture or self._plain)(name, images[name], stamp))
        return stamp_ns

    def _plain(self, name, pixels, stamp_ns):
        return self.image(pixels, stamp_ns)

    def steadily(self, **arguments):
        """Return a function for `until(each=...)` that feeds at 30 Hz."""
        def each():
            if time.monotonic() >= self._next_s:
                self._next_s = time.monotonic() + PERIOD_S
                self.feed(**arguments)
        return each


class Rig:
    """PolicyNode and Feeder; use it in a `with` statement.

    parameters: of the node; NAMESPACE in a name stands for its namespace. arguments: its command
    line. inputs: topics that the feeder uses in place of the node's own names. reliable: how the
    cameras offer their pictures.
    """

    def __init__(self, checkpoint, *, parameters=None, arguments=(), inputs=None,
                 instruction: str | None = 'push the lever', fast_diagnostics: bool = True,
                 reliable: bool = False,
                 before_node=lambda feeder: None):
        self.namespace = f'/rig{next(_numbers)}'
        self._threads = torch.get_num_threads()
        self.name = f'{self.namespace}/meanflow_policy'
        values = {'threads': 1, **(parameters or {})}
        if '--params-file' not in arguments:   # a file would be overridden
            values.setdefault('dtype', 'float32')
        if checkpoint is not None:
            values = {'checkpoint': str(checkpoint), **values}
        self._node_side, self._feeder_side, self._clients = _Spinner(), _Spinner(), {}
        compressed = values.get('image_transport') == 'compressed'
        end = 'image_raw/compressed' if compressed else 'image_raw'
        self.feeder = Feeder(
            Node('feeder', namespace=self.namespace, context=self._feeder_side.context),
            self.name, {**{name: f'camera/{name}/{end}' for name in CAMERAS}, **(inputs or {})},
            compressed=compressed, reliable=reliable)
        self._feeder_side.start(self.feeder.node)
        if instruction is not None:
            self.feeder.instruction.publish(String(data=instruction))
        before_node(self.feeder)
        self.node = PolicyNode(
            context=self._node_side.context, namespace=self.namespace,
            cli_args=['--ros-args', *arguments] if arguments else None,
            parameter_overrides=[Parameter(name.replace('NAMESPACE', self.namespace), value=value)
                                 for name, value in values.items()])
        self._watch_inference()
        if fast_diagnostics:
            self.node._timer.timer_period_ns = 20_000_000
            self.node._timer.reset()
        self._node_side.start(self.node)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, kind, *_) -> None:
        self._node_side.close(self.node)
        self._feeder_side.close(self.feeder.node)
        torch.set_num_threads(self._threads)
        if self._node_side.error is not None and kind is None:
            raise self._node_side.error

    def say(self, text: str) -> None:
        """Publish an instruction and wait until the node has it."""
        before = self.log().count('instruction')
        self.feeder.instruction.publish(String(data=text))
        until(lambda: self.log().count('instruction') > before, 'instruction taken')

    def act(self, function=None):
        """Replace the policy's `act` (the real one is the first argument); None restores it."""
        policy = self.node._policy
        if function is None:
            policy.__dict__.pop('act', None)
        else:
            real = type(policy).act.__get__(policy)
            policy.act = lambda observation, **options: function(real, observation, **options)

    # Lifecycle and services, as from another process

    def call(self, kind, service: str, request):
        """Call a service of the node and return the response."""
        client = self._clients.get(service)
        if client is None:
            client = self._clients[service] = self.feeder.node.create_client(
                kind, f'{self.name}/{service}')
        assert client.wait_for_service(TIMEOUT_S), f'{service} is not there'
        done = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: done.set())
        until(done.is_set, lambda: f'an answer of {service} (node error: '
                                   f'{self._node_side.error!r})')
        return future.result()

    def transition(self, name: str) -> bool:
        """Ask for a lifecycle transition; return whether it succeeded."""
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[name]
        return self.call(ChangeState, 'change_state', request).success

    def reset(self) -> Trigger.Response:
        return self.call(Trigger, 'reset', Trigger.Request())

    def set_parameter(self, name: str, value):
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg()])
        return self.call(SetParameters, 'set_parameters', request).results[0]

    def describe(self, name: str):
        return self.call(DescribeParameters, 'describe_parameters',
                         DescribeParameters.Request(names=[name])).descriptors[0]

    @property
    def state(self) -> str:
        return self.node._state_machine.current_state[1]

    def activate(self) -> Rig:
        """Configure and activate, and wait until the feeder is heard and hears."""
        assert self.transition('configure'), self.log()
        assert self.transition('activate')
        self.connected()
        return self

    def connected(self) -> None:
        """Wait until every stream of the feeder has found the node, and the node the feeder."""
        feeder = self.feeder
        until(lambda: all(publisher.get_subscription_count()
                          for publisher in [*feeder.pictures.values(), feeder.joints,
                                            feeder.instruction])
              and self.node._chunks.get_subscription_count(), 'discovery')

    # What the node says

    def log(self) -> str:
        return '\n'.join(self.feeder.logs)

    def logged(self, words: str, **arguments) -> None:
        until(lambda: words in self.log(), lambda: f'{words!r} in the log: {self.log()}',
              **arguments)

    def diagnosed(self, *words: str, each=lambda: None, level: bytes | None = None):
        """Wait for a new diagnostic status with these words in its message; return it."""
        since = time.monotonic()

        def found():
            return next((status for at, status in list(self.feeder.diagnostics)
                         if at > since and all(word in status.message for word in words)
                         and level in (None, status.level)), None)
        return until(found, lambda: f'{words} in /diagnostics: '
                                    f'{[s.message for _, s in list(self.feeder.diagnostics)[-3:]]}'
                                    f', log: {self.log()}', each=each)

    def values(self) -> dict[str, str]:
        """Return the values of the next diagnostic status."""
        return {value.key: value.value for value in self.diagnosed('').values}

    # Chunks

    def chunk(self, *, since_ns: int = 0, each=None, **feed) -> JointTrajectory:
        """Feed until a chunk arrives that answers an observation after `since_ns`."""
        return until(lambda: next((chunk for chunk in list(self.feeder.chunks)
                                   if stamp_of(chunk) > since_ns), None),
                     lambda: f'a chunk (node: {self.node._status.reason}, '
                             f'error: {self._node_side.error!r})',
                     each=each or self.feeder.steadily(**feed))

    def recovers(self, **feed) -> JointTrajectory:
        """Feed until a chunk arrives that answers what is fed from now on."""
        return self.chunk(since_ns=self.feeder.now_ns(), **feed)

    def no_chunk(self, *words: str, each=lambda: None):
        """Wait for this reason in /diagnostics; from then on no chunk may come. Return it."""
        self.diagnosed('no chunk', *words, each=each)
        self.settle()
        before = len(self.feeder.chunks)
        status = self.diagnosed('no chunk', *words, each=each)
        self.diagnosed('', each=each)
        assert len(self.feeder.chunks) == before
        assert self._node_side.error is None
        return status

    def settle(self) -> None:
        """Wait until nothing is being inferred and every chunk has arrived; feed nothing."""
        def still():
            before = self.node._status.chunks, len(self.feeder.chunks)
            self.diagnosed('')
            self.diagnosed('')
            return not self._busy() and before == (
                self.node._status.chunks, len(self.feeder.chunks))
        until(still, 'silence')

    def _watch_inference(self) -> None:
        """Note, under the node's lock, from when to when an observation is worked on."""
        self._inferring = False
        choose, infer = self.node._next_observation, self.node._infer

        def watched_choose():
            observation = choose()
            self._inferring = observation is not None
            return observation

        def watched_infer(*arguments):
            try:
                infer(*arguments)
            finally:
                self._inferring = False
        self.node._next_observation, self.node._infer = watched_choose, watched_infer

    def _busy(self) -> bool:
        """Whether an observation is being worked on or waits for that."""
        node = self.node
        with node._inputs:
            if self._inferring or not node._active:
                return self._inferring
            try:
                stamp_ns = node._ingest.observe(now_ns=node._now_ns()).stamp_ns
            except NoObservation:
                return False
            return node._status.last_stamp_ns is None or stamp_ns > node._status.last_stamp_ns


def stamp_of(chunk: JointTrajectory) -> int:
    return time_ns(chunk.header.stamp)


def positions(chunk: JointTrajectory) -> np.ndarray:
    """Return the values of a chunk, (T, A)."""
    return np.array([point.positions for point in chunk.points])


def times_ns(chunk: JointTrajectory) -> list[int]:
    return [time_ns(point.time_from_start) for point in chunk.points]


def seconds(length_s: float) -> int:
    return round(length_s * NANOSECONDS)
