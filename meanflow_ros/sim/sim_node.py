"""Meta-World as a ROS robot: pictures, state and instruction out; action chunks in.

Callbacks only store what arrives (background thread); the simulation runs in the main thread.
Simulated time starts at 1 s and never goes back, also over episodes. In lockstep it waits at each
picture for the chunk that answers it.
"""

from __future__ import annotations

import array
import dataclasses
import importlib
import signal
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from meanflow_ros.core.contract import NANOSECONDS, TimedActions
from meanflow_ros.core.timeline import Timeline
from meanflow_ros.ros import from_messages, to_messages
from meanflow_ros.ros.starting import INTERRUPTS, initialize
from meanflow_ros.sim import messages
from meanflow_ros.sim.metaworld_robot import (
    ACTION_SPACE, MAX_STEPS, PERIOD_S, MetaWorldRobot, RobotObservation)
from meanflow_ros.sim.scene import CAMERAS
from meanflow_ros.sim.tasks import TASKS, check_task

PERIOD_NS = round(PERIOD_S * NANOSECONDS)
STEPS_AFTER_SUCCESS = 4
_START_NS = NANOSECONDS
_SETTLE_S = 0.1   # between the start of an episode and its first pictures, wall time
_WAKE_S = 0.05

# name, default, description, lowest and highest value or None
_PARAMETERS = (
    ('task', 'faucet-open', f'What an episode is: {", ".join(TASKS)}.', None),
    ('seed', 100_000, 'Seed of the next episode; evaluation seeds start at 100000.',
     (0, 2**31 - 1)),
    ('instruction', '', "What the robot is told; empty for the task's own.", None),
    ('publish_instruction', True, 'Publish the instruction at the start of an episode.', None),
    ('camera_period_s', 0.1, 'Simulated time from picture to picture, a multiple of 0.025.',
     (0.025, 10.0)),
    ('image_width', 224, 'Pixels; read at the start.', (16, 1920)),
    ('image_height', 224, 'Pixels; read at the start.', (16, 1920)),
    ('lockstep', True, 'Wait at each picture for the chunk that answers it.', None),
    ('chunk_timeout_s', 10.0, 'Longest wait for a chunk in lockstep, wall time.',
     (0.01, 3600.0)),
    ('real_time_factor', 1.0, 'Simulated seconds in one second; not used in lockstep.',
     (0.01, 100.0)),
    ('auto_reset', False, 'Run episode after episode, each with the next seed, once somebody '
     'watches the cameras.', None),
    ('max_steps', MAX_STEPS, 'Control steps (1/40 s) after which an episode has failed.',
     (1, 100_000)),
)
_AT_START = ('image_width', 'image_height')


@dataclass(frozen=True, kw_only=True)
class SimParameters:
    """The values of the parameters at one time."""

    task: str
    seed: int
    instruction: str
    publish_instruction: bool
    camera_period_s: float
    image_width: int
    image_height: int
    lockstep: bool
    chunk_timeout_s: float
    real_time_factor: float
    auto_reset: bool
    max_steps: int

    def __post_init__(self):
        check_task(self.task)
        if abs(self.camera_period_s - self.camera_every * PERIOD_S) > 1e-6:
            raise ValueError(f'camera_period_s must be a multiple of {PERIOD_S}, '
                             f'got {self.camera_period_s}')

    @property
    def camera_every(self) -> int:
        """Return the control steps from picture to picture."""
        return max(1, round(self.camera_period_s / PERIOD_S))

    @property
    def spoken(self) -> str:
        """Return what the robot is told."""
        return self.instruction or TASKS[self.task].instruction


def _describe(name: str, default, description: str, limits) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(description=description, read_only=name in _AT_START)
    if limits is not None and isinstance(default, float):
        descriptor.floating_point_range = [
            FloatingPointRange(from_value=limits[0], to_value=limits[1])]
    elif limits is not None:
        descriptor.integer_range = [
            IntegerRange(from_value=limits[0], to_value=limits[1], step=1)]
    return descriptor


def _live(kind: str, **fields):
    """Return a message of rclpy; see `messages`."""
    package, name = kind.split('/')
    if name == 'Image':   # a list of numbers would be checked one by one
        fields['data'] = array.array('B', fields['data'].tobytes())
    return getattr(importlib.import_module(f'{package}.msg'), name)(**fields)


class SimNode(Node):
    """The robot's topics, parameters and reset service; `run` is its life."""

    def __init__(self):
        super().__init__('sim_robot')
        for name, default, description, limits in _PARAMETERS:
            self.declare_parameter(name, default, _describe(name, default, description, limits))
        settings = self.settings()
        self.add_on_set_parameters_callback(self._check_parameters)
        self._robot = MetaWorldRobot(image_width=settings.image_width,
                                     image_height=settings.image_height)
        self._now_ns = _START_NS
        self._wall_s = time.monotonic()
        self._episode = 0
        self._timeline = Timeline(period_ns=PERIOD_NS)
        self._inbox = threading.Condition()          # guards the four below
        self._chunks: list[TimedActions] = []
        self._reset: SimParameters | None = None
        self._stopped = False
        self._warned: set[str] = set()

        reliable = QoSProfile(depth=10)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._clock_publisher = self.create_publisher(Clock, '/clock', reliable)
        self._sensors = {topic: self.create_publisher(kind, topic, reliable) for topic, kind in (
            ('joint_states', JointState), ('tool_pose', PoseStamped),
            *((f'camera/{camera}/image_raw', Image) for camera in CAMERAS))}
        self._instruction = self.create_publisher(String, 'instruction', latched)
        self._episodes = self.create_publisher(DiagnosticStatus, 'episode', reliable)
        self.create_subscription(JointTrajectory, 'action_chunk', self._on_chunk, reliable)
        self.create_service(Trigger, '~/reset', self._on_reset)

    def settings(self) -> SimParameters:
        """Return the present parameters; ValueError if they do not fit together."""
        return SimParameters(**{name: self.get_parameter(name).value
                                for name, *_ in _PARAMETERS})

    def stop(self) -> None:
        """End `run` soon; may be called from a signal handler."""
        self._stopped = True

    def run(self) -> None:
        """Simulate until `stop`: idle with the clock running, or an episode after each reset."""
        while not self._stopped:
            with self._inbox:
                settings, self._reset = self._reset, None
            settings = settings or self._next_by_itself()
            if settings is not None:
                self._run_episode(settings)
            else:
                self._publish_clock()
                self._advance(self.get_parameter('real_time_factor').value)

    def _next_by_itself(self) -> SimParameters | None:
        """Return the next episode if `auto_reset` is on and a camera has a subscriber."""
        if not self.get_parameter('auto_reset').value:
            return None
        if not any(publisher.get_subscription_count() for topic, publisher
                   in self._sensors.items() if topic.startswith('camera/')):
            return None
        settings = self.settings()
        return dataclasses.replace(settings, seed=settings.seed + self._episode)

    def _on_chunk(self, message: JointTrajectory) -> None:
        try:
            chunk = from_messages.timed_actions(message, ACTION_SPACE.dimensions)
        except ValueError as error:
            self._warn_once(f'action chunk ignored: {error}')
            return
        with self._inbox:
            self._chunks.append(chunk)
            self._inbox.notify()

    def _on_reset(self, _, response: Trigger.Response) -> Trigger.Response:
        try:
            settings = self.settings()
        except ValueError as error:
            response.success, response.message = False, str(error)
            return response
        with self._inbox:
            self._reset = settings
            self._inbox.notify()
        response.success, response.message = True, f'{settings.task} with seed {settings.seed}'
        return response

    def _check_parameters(self, changes) -> SetParametersResult:
        values = {name: self.get_parameter(name).value for name, *_ in _PARAMETERS}
        values.update({change.name: change.value for change in changes if change.name in values})
        try:
            SimParameters(**values)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _warn_once(self, text: str) -> None:
        """Warn if this was not said before in this episode."""
        with self._inbox:
            new = text not in self._warned
            self._warned.add(text)
        if new:
            self.get_logger().warning(text)

    def _run_episode(self, settings: SimParameters) -> None:
        robot, number = self._robot, self._episode
        self._episode += 1
        robot.reset(settings.task, settings.seed)
        self._timeline.clear()
        with self._inbox:
            self._chunks.clear()
            self._warned.clear()
        start_ns = self._now_ns
        self._publish_clock()
        told = {'episode': number, 'seed': settings.seed}
        self.get_logger().info(f'episode {number}: {settings.task}, seed {settings.seed}, '
                               f'told {settings.spoken!r}')
        self._publish_episode(settings.task, 'start', told)
        if settings.publish_instruction:
            self._instruction.publish(String(data=settings.spoken))
        time.sleep(_SETTLE_S)
        self._wall_s = time.monotonic()

        steps, starved, reward, success, end = 0, 0, 0.0, False, settings.max_steps
        command = np.zeros(ACTION_SPACE.size)
        answered = True
        while steps < end and not self._interrupted():
            pictures = steps % settings.camera_every == 0
            self._publish_clock()
            self._publish_state(robot.observe(CAMERAS if pictures else ()))
            if pictures and settings.lockstep:
                answered = self._await_chunk(settings.chunk_timeout_s if answered else 0.0)
                if not answered and not self._interrupted():
                    self._warn_once('no action chunk answered a picture in '
                                    f'{settings.chunk_timeout_s:g} s: going on in real time, '
                                    'without motion, until one arrives')
            answered = self._take_chunks(start_ns) or answered
            due = self._timeline.at(self._now_ns)
            starved += due is None
            command = ACTION_SPACE.at_rest(command) if due is None else due
            result = robot.step(command)
            steps += 1
            reward += result.reward
            if result.success and not success:
                success, end = True, min(end, steps + STEPS_AFTER_SUCCESS)
            factor = settings.real_time_factor if not settings.lockstep else 1.0
            self._advance(None if settings.lockstep and answered else factor)

        told |= {'steps': steps, 'reward': f'{reward:.3f}', 'starved_steps': starved}
        if TASKS[settings.task].modes:
            told['mode'] = result.mode if success else ''
        if steps < end:
            told['stopped'] = 'before its end'
        outcome = 'success' if success else 'failure'
        ended = outcome if steps == end else f'{outcome}, stopped before its end,'
        self._publish_clock()
        self._publish_episode(settings.task, outcome, told)
        self.get_logger().info(f'episode {number}: {ended} after {steps} steps, '
                               f'{starved} without a due action')

    def _interrupted(self) -> bool:
        return self._stopped or self._reset is not None

    def _await_chunk(self, timeout_s: float) -> bool:
        """Wait for the chunk that answers the picture of now; repeat the clock for late nodes."""
        deadline_s = time.monotonic() + timeout_s
        while not self._interrupted():
            with self._inbox:
                left_s = deadline_s - time.monotonic()
                if any(chunk.stamp_ns == self._now_ns for chunk in self._chunks):
                    return True
                if left_s <= 0:
                    return False
                self._inbox.wait(min(left_s, _WAKE_S))
            self._publish_clock()
        return False

    def _take_chunks(self, start_ns: int) -> bool:
        """Put what arrived on the timeline; return whether any of it is of this episode."""
        with self._inbox:
            chunks, self._chunks = self._chunks, []
        chunks = [chunk for chunk in chunks if chunk.stamp_ns >= start_ns]
        for chunk in chunks:
            self._timeline.add(chunk)
        return bool(chunks)

    def _advance(self, real_time_factor: float | None) -> None:
        """Move simulated time on by a step, no faster than the factor; None is unthrottled."""
        self._now_ns += PERIOD_NS
        now_s = time.monotonic()
        if real_time_factor is not None:
            self._wall_s += PERIOD_S / real_time_factor
            if self._wall_s > now_s:
                time.sleep(self._wall_s - now_s)
                return
        self._wall_s = now_s

    def _publish_clock(self) -> None:
        self._clock_publisher.publish(Clock(clock=to_messages.time(self._now_ns)))

    def _publish_episode(self, task: str, message: str, values: dict) -> None:
        self._episodes.publish(to_messages.diagnostic_status(
            task, DiagnosticStatus.OK, message, 'sim_robot', values))

    def _publish_state(self, observed: RobotObservation) -> None:
        for topic, message in messages.sensed(_live, observed, self._now_ns):
            self._sensors[topic].publish(message)

    def close(self) -> None:
        """Free the renderers and the node."""
        self._robot.close()
        self.destroy_node()


def main(arguments: list[str] | None = None) -> None:
    """Run the simulated robot until Ctrl-C or SIGTERM."""
    try:
        node = initialize('sim_robot', arguments, SimNode)
    except KeyboardInterrupt:
        return
    for number in INTERRUPTS:
        signal.signal(number, lambda *_: node.stop())
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, daemon=True)
    thread.start()
    try:
        node.run()
    except RuntimeError as error:
        sys.exit(f'sim_robot: {error}')
    finally:
        executor.shutdown()
        thread.join(timeout=5)
        node.close()
        rclpy.shutdown()


if __name__ == '__main__':
    main()
