"""The node's side of `Motion`: control timer, `~/estop`, `~/enable`, heartbeat, robot description.

The emergency stop is latched: it outlives a configuration and needs an explicit release.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import Header, String
from std_srvs.srv import SetBool

from meanflow_ros.core.contract import NANOSECONDS, Observation
from meanflow_ros.core.guard import Guard
from meanflow_ros.core.limits import Limits
from meanflow_ros.core.policy import Policy
from meanflow_ros.core.timeline import Mode, Prefix, RealTime
from meanflow_ros.core.urdf import MAX_BYTES, limits_from_urdf
from meanflow_ros.ros import to_messages
from meanflow_ros.ros.bag import deserialize_text
from meanflow_ros.ros.motion import NO_CHUNK, NO_SUBSCRIBER, Motion
from meanflow_ros.ros.motion_config import MotionConfig, measured_names, read_mode, read_motion
from meanflow_ros.ros.outputs import Output, make_output
from meanflow_ros.ros.parameters import PolicyParameters

HEARTBEAT_S = 0.1
SETTLE_S = 0.5      # that a stream may need beyond `stop_s` to come to rest


class MotionControl:
    """Lives as long as the node; `configure` and `release` make and free a robot's Motion.

    lock: held whenever the motion is touched. now_ns: gives ROS time, called with the lock held,
    as why_no_chunk, which says why none comes, None if nothing is known. motion: None while the
    node is not configured.
    """

    def __init__(self, node, lock: threading.Condition, now_ns: Callable[[], int],
                 why_no_chunk: Callable[[], str | None]):
        self._node, self._lock, self._now_ns = node, lock, now_ns
        self._why_no_chunk = why_no_chunk
        self._moved, self._told = False, ''  # what the log knows
        self.motion: Motion | None = None
        self.estopped, self.enabled = False, True
        self.failure: str | None = None      # of the control loop or the robot description
        self._outputs: list[Output] = []
        self._timer = self._description = None
        self._policy: Policy | None = None
        self._advanced = (0, 0.0)      # ROS time, and when it was first seen, steady seconds
        self._commanded: tuple = ((), None)  # dimensions, and the last command of a stream
        node.add_on_set_parameters_callback(self._check)
        self._wall = rclpy.clock.Clock(clock_type=rclpy.clock.ClockType.STEADY_TIME)
        self._heartbeat = node.create_publisher(Header, '~/heartbeat', 10)
        node.create_timer(HEARTBEAT_S, self._beat, clock=self._wall)
        self._estop = node.create_service(SetBool, '~/estop', self._on_estop)
        node.create_service(SetBool, '~/enable', self._on_enable)

    def configure(self, policy: Policy, settings: PolicyParameters) -> None:
        """Make what turns chunks into the messages of this robot's controllers.

        ValueError names what is wrong in the motion file or in `execution`.
        """
        config = read_motion(settings.motion) if settings.motion else MotionConfig()
        mode = self._mode(settings.execution, policy)
        try:
            config.check(policy.robot)
            guard = self._guard(policy, config)
        except ValueError as error:
            file = f'motion file {settings.motion}: ' if settings.motion else ''
            raise ValueError(f'{file}{error}') from None
        for output in config.outputs:
            self._outputs.append(make_output(self._node, output, policy.robot.action_space))
        self.failure = None
        self._policy = policy
        self.motion = Motion(policy.robot, config, guard, mode, self._outputs)
        space, last = self._commanded
        if space == policy.robot.action_space.dimensions:
            self.motion.last_command = last     # so far as nobody else has moved it since
        self._execution = settings.execution
        self._timer = self._node.create_timer(
            config.tick_s, self._control, clock=self._wall)
        if measured_names(policy.robot):
            self._description = self._node.create_subscription(
                String, 'robot_description', lambda data: self._describe(data, policy),
                QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL), raw=True)

    def release(self) -> None:
        """Stop the robot, as `leave` does, and free what `configure` made."""
        self.leave('released')
        with self._lock:
            if self.motion is not None:
                self._commanded = (self.motion.robot.action_space.dimensions,
                                   self.motion.last_command)
            self.motion = self._policy = None
        for destroy, thing in ((self._node.destroy_timer, self._timer),
                               (self._node.destroy_subscription, self._description)):
            if thing is not None:
                destroy(thing)
        self._timer = self._description = None
        while self._outputs:
            self._node.destroy_publisher(self._outputs.pop().publisher)

    def why_not(self) -> str | None:
        """Return why no chunk may move the robot now, or None."""
        if self.estopped:
            return 'emergency stop: release it with ~/estop data: false'
        if not self.enabled:
            return 'disabled: enable with ~/enable data: true'
        return self.failure

    def wants_chunk(self, now_ns: int, lead_ns: int) -> bool:
        """Whether a chunk for an observation could be of use, see `Motion.wants_chunk`."""
        self._read_execution()
        return self.motion.wants_chunk(now_ns, lead_ns)

    def ask(self, observation: Observation) -> tuple[int, Prefix | None]:
        """Return what a chunk for this observation belongs to, and what it continues."""
        timeline, robot = self.motion.timeline, self.motion.robot
        first_due_ns = observation.stamp_ns + round(
            robot.first_step * robot.period_s * NANOSECONDS)
        prefix = timeline.prefix(first_due_ns) if isinstance(timeline.mode, RealTime) else None
        return timeline.epoch, prefix

    def feel(self, state: np.ndarray | None) -> None:
        """Note the measured state (P,)."""
        if self.motion is not None and state is not None:
            self.motion.feel(state)

    def halt(self, reason: str) -> None:
        """Do the safe action and forget all chunks; call it with the lock held, as all here."""
        self._stop(lambda now_ns: self.motion.halt(reason, now_ns))

    def silence(self, reason: str) -> None:
        """Halt, and send no command any more."""
        self._stop(lambda now_ns: self.motion.silence(reason, now_ns))

    def _stop(self, stop: Callable[[int], None]) -> None:
        """Stop at this ROS time; where even that fails, nothing more is sent, and the node lives.

        It is a message, often, that asks for it.
        """
        if self.motion is None:
            return
        try:
            stop(self._node.get_clock().now().nanoseconds)
        except Exception as error:
            self._give_up(error)

    def leave(self, reason: str) -> None:
        """Do the safe action, return when the streams rest, and send no command any more.

        Call it without the lock, when no chunk is accepted any more, on the executor's thread: it
        listens to `~/estop`. It takes `stop_s` and at most `SETTLE_S` more; twice that where
        `neutral` is too far away, and the robot holds where it has come to.
        """
        with self._lock:
            if self.motion is None:
                return
            stop_s = self.motion.config.stop_s
            self.halt(reason)
        if not self._rests_within(stop_s + SETTLE_S):
            with self._lock:
                self._stop(lambda now_ns: self.motion.hold())
            self._rests_within(SETTLE_S)
        with self._lock:
            self.silence(reason)

    def _rests_within(self, seconds: float) -> bool:
        """Control until the streams rest; False if they do not in this time."""
        next_s = time.monotonic()
        end_s = next_s + seconds
        while self.motion is not None and not self.motion.rests:
            if next_s > end_s:
                return False
            now_s = time.monotonic()
            next_s = max(next_s + self.motion.config.period_s, now_s)
            time.sleep(next_s - now_s)
            self._hear_estop()
            self._control()
        return True

    def _hear_estop(self) -> None:
        """Answer `~/estop` while a transition keeps the executor from it."""
        with self._estop.handle:
            request, header = self._estop.handle.service_take_request(SetBool.Request)
        if header is not None:
            self._estop.send_response(self._on_estop(request, SetBool.Response()), header)

    def clock_jumped(self, now_ns: int) -> None:
        """Rest where the robot is: no time of the old clock means anything now."""
        self._stop(lambda _: self.motion.clock_jumped(now_ns))

    def values(self) -> dict[str, object]:
        """Return what diagnostics show."""
        if self.motion is None:
            return {}
        motion = self.motion
        return {'execution': self._execution, 'consumed_steps': motion.timeline.consumed,
                'estop': self.estopped, 'enabled': self.enabled,
                **{f'guard {kind}': count
                   for kind, count in motion.guard.interventions.items()},
                **{f'stopped, {kind}': count for kind, count in motion.stops.items()},
                **{f'discarded, {kind}': count
                   for kind, count in motion.timeline.discarded.items()}}

    def _read_execution(self) -> None:
        """Follow the parameter, which `_check` has let pass."""
        execution = self._node.get_parameter('execution').value
        if execution != self._execution:
            self._execution, self.motion.timeline.mode = execution, read_mode(execution)
            self._node.get_logger().info(f'execution: {execution}')

    def _mode(self, text: str, policy: Policy) -> Mode:
        mode, longest = read_mode(text), getattr(policy.config, 'max_prefix', 0)
        if isinstance(mode, RealTime) and mode.delay_steps > longest:
            raise ValueError(f'execution {text!r}: the checkpoint was trained for a prefix of at '
                             f'most {longest} steps (max_prefix)')
        return mode

    def _check(self, parameters) -> SetParametersResult:
        """Refuse an execution that the present policy cannot do."""
        for parameter in parameters:
            if parameter.name == 'execution' and self._policy is not None:
                try:
                    self._mode(parameter.value, self._policy)
                except ValueError as error:
                    return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _guard(self, policy: Policy, config: MotionConfig,
               described: Limits | None = None) -> Guard:
        normalizer = policy.config.state_normalizer
        return Guard(policy.robot, config.guard_settings(
            policy.robot, described=described,
            state_range=(normalizer.low, normalizer.high) if normalizer else None))

    def _describe(self, data: bytes, policy: Policy) -> None:
        """Take the limits of a robot description; a bad one stops the robot until a good one."""
        with self._lock:
            if self.motion is None:
                return
            try:
                described = limits_from_urdf(deserialize_text(data, MAX_BYTES),
                                             measured_names(policy.robot))
                guard = self._guard(policy, self.motion.config, described)
            except ValueError as error:
                self.failure = f'robot_description: {error}'
                self.silence('robot_description')
                self._node.get_logger().error(self.failure)
                return
            if self.failure is None and guard.limits.equal(self.motion.guard.limits):
                return
            self.failure = None
            self.silence('robot_description')
            if self.motion is None:
                return
            guard.interventions = self.motion.guard.interventions
            self.motion.guard = guard
        self._node.get_logger().info('limits of the robot description are kept')

    def _control(self) -> None:
        """Run at the control rate; whatever goes wrong here stops the robot."""
        with self._lock:
            if self.motion is None:
                return
            try:
                now_ns = self._now_ns()
                if self.motion is not None:
                    self._watch_clock(now_ns)
                if self.motion is None:
                    return
                self._read_execution()
                self.motion.tick(now_ns)
                self._tell()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Send nothing more until the node is configured again."""
        self.failure = f'control loop: {type(error).__name__}: {error}'
        self.motion = None
        self._node.get_logger().error(self.failure)

    def _tell(self) -> None:
        """Say on the log when the robot stops, and why, and when it moves again."""
        moves, stopped = self.motion.moving, self.motion.stopped
        if self._outputs:
            if moves and not self._moved:
                self._node.get_logger().info('the robot follows chunks')
            elif not moves and self._moved:
                self._node.get_logger().warning(
                    f'the robot stops ({self.motion.config.safe_action}): {self._stopped()}')
            elif stopped == NO_SUBSCRIBER != self._told:
                self._node.get_logger().warning(f'the robot does not move: {self._stopped()}')
        self._moved, self._told = moves, stopped

    def _stopped(self) -> str | None:
        """Return why the robot does not follow chunks."""
        stopped = self.motion.stopped
        why = {NO_CHUNK: self._why_no_chunk,
               NO_SUBSCRIBER: lambda: ', '.join(self.motion.unheard)}.get(stopped)
        details = why and why()
        return f'{stopped}: {details}' if details else stopped

    def _watch_clock(self, now_ns: int) -> None:
        """Stop when ROS time stands (a simulator pauses, a clock dies): no deadline would pass."""
        steady_s = time.monotonic()
        if now_ns != self._advanced[0]:
            self._advanced = now_ns, steady_s
        elif steady_s - self._advanced[1] > self.motion.config.deadline_s \
                and (self.motion.stopped is None or not self.motion.rests):
            self.silence('the clock stands')

    def _on_estop(self, request, response):
        with self._lock:
            changed, self.estopped = self.estopped != request.data, request.data
            if request.data and self.motion is not None:
                self.silence('emergency stop')
        if changed:
            self._node.get_logger().warning(
                'emergency stop' if request.data else 'emergency stop released')
        response.success = True
        response.message = 'stopped, and latched' if request.data else 'released'
        return response

    def _on_enable(self, request, response):
        with self._lock:
            if self.enabled and not request.data:
                self.halt('disabled')
            self.enabled = request.data
        self._node.get_logger().info('enabled' if request.data else 'disabled')
        response.success = True
        response.message = ('enabled' if request.data else 'disabled') + (
            ', but the emergency stop is latched' if self.estopped else '')
        return response

    def _beat(self) -> None:
        """Say that the node lives, and whether it moves the robot."""
        with self._lock:
            motion, state = self.motion, self.why_not()
            state = (state or 'not configured' if motion is None else
                     state or self._stopped() or 'ready')
            beat = Header(frame_id=state)
            beat.stamp = to_messages.time(self._node.get_clock().now().nanoseconds)
        self._heartbeat.publish(beat)
