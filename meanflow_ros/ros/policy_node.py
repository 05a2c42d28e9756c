"""The lifecycle node `meanflow_policy`: pictures and an instruction in, action chunks out.

Callbacks only store messages, those of sensors on a thread of their own; one inference thread
works on the newest complete observation, so no queue grows and a slow model drops pictures.
Nothing is published unless the observation is complete, the guard has let the chunk pass, and
nothing was reset while the network was running.
`Motion` turns chunks into what the robot's controllers take, and stops them.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from meanflow_ros.core.contract import NANOSECONDS, Observation
from meanflow_ros.core.guard import Rejected
from meanflow_ros.core.loading import how_it_runs, load, memory_mib, warm_up
from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions
from meanflow_ros.core.timeline import Prefix
from meanflow_ros.paths import default_checkpoint
from meanflow_ros.ros import parameters, to_messages
from meanflow_ros.ros.adaptive_subscription import AdaptiveSubscription
from meanflow_ros.ros.ingest import COMPRESSED_IMAGE, IMAGE, Ingest, ahead_or_back
from meanflow_ros.ros.motion_control import MotionControl
from meanflow_ros.ros.receiving import Receiver
from meanflow_ros.ros.starting import initialize
from meanflow_ros.ros.status import Status
from meanflow_ros.ros.streams import CLOCK, IngestLimits, NoObservation, read_ages

DECODING_THREADS = 2
POLL_S = 0.1
THREAD_SWITCH_S = 0.0005  # Python's 5 ms would hold back the inference thread
END_S = 2.0         # that the network has to answer before it is left behind
CLOCK_SETTLES_S = 0.5   # without another jump: late messages of /clock come between others
FIRST_INPUT_S = 2.0  # silence about inputs that have not come yet
LEFT = 'the network of the last configuration has not answered yet; if it never does, start the ' \
       'node again'
SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class PolicyNode(LifecycleNode):
    """See the module's first lines; topics and parameters are listed in the README."""

    def __init__(self, **kwargs):
        super().__init__('meanflow_policy', **kwargs)
        self._inputs = threading.Condition()      # an RLock: guards what callbacks share
        self._active = False
        self._policy: FastPolicy | None = None
        self._thread: threading.Thread | None = None
        self._left: tuple[threading.Thread, FastPolicy] | None = None  # still in the network
        self._sensors: list[AdaptiveSubscription] = []
        self._receiver: Receiver | None = None
        self._decoder = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix='decode')
        self._status = Status()
        self._inferring_since_s: float | None = None
        self._clock_jumped_s = -np.inf            # by the steady clock
        self._control = MotionControl(self, self._inputs, self._now_ns, self._why_no_chunk)
        self._problems = parameters.declare(
            self, can_configure=lambda: self._policy is None)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        wall = rclpy.clock.Clock(clock_type=rclpy.clock.ClockType.STEADY_TIME)
        self._timer = self.create_timer(1.0, self._every_second, clock=wall)
        self._autostart = None
        if parameters.read(self).autostart:
            self._autostart = self.create_timer(0.0, self._start, clock=wall)
            return     # configuring names the problems
        for problem in self._problems:
            self.get_logger().error(f'parameter problem: {problem}')

    def _start(self) -> None:
        self._autostart.cancel()
        if self.trigger_configure() == SUCCESS:
            self.trigger_activate()

    # Lifecycle

    def on_configure(self, state):
        """Load the checkpoint, warm it up and subscribe; any problem leaves it unconfigured."""
        try:
            if self._problems:
                raise ValueError('; '.join(self._problems)
                                 + '; correct the parameters and start the node again')
            self._configure(parameters.read(self))
        except (ValueError, OSError, RuntimeError, ParameterException) as error:
            self._release()
            self._status.reason = f'configure failed: {error}'
            self.get_logger().error(self._status.reason)
            return FAILURE
        return super().on_configure(state)

    def _configure(self, settings: parameters.PolicyParameters) -> None:
        self._free_left()
        if self._left is not None:
            raise RuntimeError(LEFT)
        path = settings.checkpoint or default_checkpoint()
        policy = load(path, device=settings.device, dtype=settings.dtype, robot=settings.robot,
                      options=RuntimeOptions(compile=settings.compile, fp8=settings.fp8,
                                             threads=settings.threads))
        latencies, robot = warm_up(policy, settings.sampler_steps), policy.robot
        self._ingest = Ingest(robot, default_instruction=settings.instruction, limits=IngestLimits(
            max_age_s=settings.max_age_s, max_ages_s=read_ages(settings.max_ages_s),
            max_skew_s=settings.max_skew_s,
            min_rate_hz=settings.min_rate_hz, frozen_pictures=settings.frozen_pictures,
            picture_size=settings.picture_size), decoder=self._decoder)
        self._control.configure(policy, settings)
        self._status = Status()
        self._policy = policy
        self._connect(settings)
        self._thread = threading.Thread(target=self._infer_forever, args=(policy,), daemon=True,
                                        name='inference')
        self._thread.start()
        self.get_logger().info(
            f'configured: {path} for {robot.robot}, {len(robot.cameras)} cameras, chunks of '
            f'{robot.horizon} steps of {robot.period_s * 1e3:g} ms; {policy.device} '
            f'{policy.dtype}, NFE {settings.sampler_steps or policy.config.sampler_steps}, warm '
            f'latency {np.median(latencies) * 1e3:.1f} ms, memory '
            f'{memory_mib(policy.device):.0f} MiB')
        for what, why in how_it_runs(policy).items():
            self.get_logger().info(f'{what}: {why}')

    def _connect(self, settings: parameters.PolicyParameters) -> None:
        if not self.get_clock().ros_time_is_active:   # else in the order of /clock's messages
            self._receiver = Receiver(self, self._on_receiving_failed)
        subscribe = functools.partial(AdaptiveSubscription, self, serialized=True,
                                      receiver=self._receiver)
        if self._policy.robot.state_names:
            self._sensors.append(subscribe(JointState, 'joint_states', self._on_joint_state))
        kind, type_name, suffix = {
            'raw': (Image, IMAGE, ''),
            'compressed': (CompressedImage, COMPRESSED_IMAGE, '/compressed'),
        }[settings.image_transport]
        for name in self._policy.robot.camera_names:
            self._sensors.append(subscribe(
                kind, f'camera/{name}/image_raw{suffix}',
                functools.partial(self._on_picture, name, type_name)))
        # The first hears what was published before the node started, the second also publishers
        # that keep nothing (`ros2 topic pub`, most tools), which the first may not be matched to.
        self._heard: bytes | None = None
        self._instructions = [self.create_subscription(
            String, 'instruction', self._on_instruction, QoSProfile(
                depth=1, durability=durability), raw=True, event_callbacks=quiet)
            for durability, quiet in (
                (DurabilityPolicy.TRANSIENT_LOCAL,
                 SubscriptionEventCallbacks(use_default_callbacks=False)),
                (DurabilityPolicy.VOLATILE, None))]
        self._chunks = self.create_lifecycle_publisher(JointTrajectory, 'action_chunk', 10)
        self._reset_service = self.create_service(Trigger, '~/reset', self._on_reset)

    def on_activate(self, state):
        """Start publishing, from inputs that arrive from now on."""
        with self._inputs:
            self._ingest.reset()
            self._status.begin()
            self._active = True
            self._control.halt('activated')
        self.get_logger().info('active: publishing action chunks')
        return super().on_activate(state)

    def on_deactivate(self, state):
        """Bring the robot to rest; a chunk that is being inferred is thrown away."""
        with self._inputs:
            self._active = False
        self._control.leave('deactivated')
        self.get_logger().info('inactive: no chunk is published from now on')
        return super().on_deactivate(state)

    def on_cleanup(self, state):
        """Free the network, its memory and every subscription."""
        self._release()
        self.get_logger().info('cleaned up')
        return super().on_cleanup(state)

    def on_shutdown(self, state):
        """Stop and free everything, from any state."""
        self._release()
        return super().on_shutdown(state)

    def on_error(self, state):
        """Free everything; the node can be configured again."""
        self._release()
        self.get_logger().error('an error has stopped the node; it can be configured again')
        return SUCCESS

    def _release(self) -> None:
        with self._inputs:
            self._active = False
        self._control.release()
        with self._inputs:
            policy, self._policy = self._policy, None
            self._inputs.notify_all()
        if self._thread is not None:
            self._end_inference(policy)
            self.destroy_lifecycle_publisher(self._chunks)
            self.destroy_service(self._reset_service)
            for subscription in self._instructions:
                self.destroy_subscription(subscription)
        while self._sensors:
            self._sensors.pop().destroy()
        if self._receiver is not None:
            self._receiver.end()
            self._receiver = None
        self._status = Status()
        if self._left is not None:
            self._status.reason = LEFT
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()      # it would wait for the network too

    @property
    def hangs(self) -> bool:
        """Whether a network that was left behind still runs."""
        return self._left is not None and self._left[0].is_alive()

    def _end_inference(self, policy: FastPolicy) -> None:
        """Free the network; one that hangs is left as it is, for as long as it does."""
        thread, self._thread = self._thread, None
        thread.join(END_S)
        if thread.is_alive():
            self._left = thread, policy
            self.get_logger().error(f'the network has not answered for {END_S:g} s: it is left '
                                    f'behind, and nothing can be configured before it answers')
        else:
            policy.close()

    def _free_left(self) -> None:
        """Free a network that was left behind, if it has answered meanwhile."""
        if self._left is None or self.hangs:
            return
        self._left[1].close()
        self._left = None
        if self._status.reason == LEFT:
            self._status.reason = None
        self.get_logger().info('the network that was left behind has answered and is freed')

    # Inputs: callbacks store, and wake the inference thread

    def _on_picture(self, name: str, type_name: str, data: bytes) -> None:
        self._store(self._ingest.add_serialized, name, data, type_name)

    def _on_joint_state(self, data: bytes) -> None:
        if self._store(self._ingest.add_serialized_joint_state, data):
            with self._inputs:
                self._control.feel(self._ingest.newest_state())

    def _store(self, add, *arguments) -> bool:
        with self._inputs:
            try:
                add(*arguments, now_ns=self._now_ns())
            except ValueError:
                return False  # the ingest keeps the reason, the inference thread reports it
            except Exception as error:  # whatever is raised must not end the node
                self._fail('input failed', error)
                return False
            if self._ingest.newest_common_ns() not in (None, self._status.last_stamp_ns):
                self._inputs.notify()
            return True

    def _on_receiving_failed(self, error: Exception) -> None:
        with self._inputs:
            self._fail('input failed', error)

    def _on_instruction(self, data: bytes) -> None:
        with self._inputs:
            if data == self._heard:
                return
            self._heard = data
            before = self._ingest.instruction
            try:
                text = self._ingest.set_serialized_instruction(data)
                if text == before:
                    return
                self.get_logger().info(f'instruction: {text!r}')
            except ValueError as error:
                self.get_logger().error(f'{error}; no chunk until a good instruction arrives')
            self._control.halt('instruction')

    def _on_reset(self, request, response):
        with self._inputs:
            self._ingest.reset()
            self._control.halt('reset')
            self._publish_diagnostics()
            self._status.begin()
        response.success = True
        response.message = 'inputs, the chunk in flight and the statistics are forgotten'
        return response

    def _now_ns(self) -> int:
        """Return ROS time; a jump of it forgets all inputs and says so. Call it locked."""
        clock = self.get_clock()
        simulated = clock.ros_time_is_active
        now_ns = clock.now().nanoseconds if simulated else time.time_ns()   # the same, sooner
        jump_s = self._ingest.clock(now_ns, None if simulated else time.monotonic_ns())
        if jump_s is not None:
            self._clock_jumped_s = time.monotonic()
            self._control.clock_jumped(now_ns)
            self._status.last_stamp_ns = None
            self.get_logger().warning(f'the clock jumped {ahead_or_back(jump_s)}: inputs '
                                      f'forgotten')
        return now_ns

    # Inference thread

    def _infer_forever(self, policy: FastPolicy) -> None:
        while True:
            with self._inputs:
                self._inputs.wait(POLL_S)
                if self._policy is not policy:
                    return
                question = self._question() if self._active else None
            if question is not None:
                self._infer(policy, *question)
                self._inferring_since_s = None

    def _question(self) -> tuple[Observation, int, Prefix | None] | None:
        """Return a new observation and what its chunk belongs to, see `MotionControl.ask`."""
        try:
            observation = self._next_observation()
            if observation is None:
                return None
            asked = self._control.ask(observation)
        except (Exception, SystemExit) as error:  # whatever is raised must not end the thread
            self._fail('observation failed', error)
            return None
        self._inferring_since_s = time.monotonic()
        return observation, *asked

    def _fail(self, what: str, error: BaseException) -> None:
        """Stop the robot after an error that nobody foresaw, and say so. Call it locked."""
        self._control.halt(what)
        self._report(f'{what}: {type(error).__name__}: {error}')

    def _next_observation(self) -> Observation | None:
        """Return an observation that has not been used yet, or report why there is none."""
        now_ns = self._now_ns()
        why_not = self._control.why_not()
        if why_not is not None:
            self._report(why_not)
            return None
        try:
            if now_ns == 0:
                raise NoObservation('clock', CLOCK, 'use_sim_time is set and nothing has been '
                                                    'received on /clock', waiting=True)
            observation = self._ingest.observe(now_ns=now_ns)
            if time.monotonic() - self._clock_jumped_s < CLOCK_SETTLES_S:
                raise NoObservation('clock', CLOCK, 'it has just jumped', waiting=True)
        except NoObservation as reason:
            self._report(str(reason), patience_s=FIRST_INPUT_S if reason.waiting else 0.0)
            return None
        last_ns = self._status.last_stamp_ns
        if last_ns is not None and observation.stamp_ns <= last_ns:
            return None
        if not self._control.wants_chunk(now_ns, self._status.latency_ns):
            return None
        self._status.last_stamp_ns = observation.stamp_ns
        return observation

    def _infer(self, policy: FastPolicy, observation: Observation, epoch: int,
               prefix: Prefix | None) -> None:
        start = time.perf_counter()
        try:
            steps = self.get_parameter('sampler_steps').value or None
            given = {} if prefix is None else {'prefix': prefix.actions}
            chunk = policy.act(observation, steps=steps, seed=self.get_parameter('seed').value,
                               **given)
        except (Exception, SystemExit) as error:  # whatever is raised must not end the thread
            if self._policy is policy:
                self._report(f'inference failed: {type(error).__name__}: {error}')
            return
        latency_s = time.perf_counter() - start
        with self._inputs:
            if self._policy is not policy:
                return
            now_ns = self._now_ns()
            if not self._active or self._control.why_not():
                self._status.discarded += 1
                return
            try:
                safe = self._control.motion.accept(
                    chunk, now_ns=now_ns, epoch=epoch, state=observation.state,
                    prefix=prefix)
                if safe is None:
                    self._status.discarded += 1
                    return
                self._chunks.publish(to_messages.serialized_joint_trajectory(safe))
            except Rejected as error:
                self._report(f'guard: {error}')
                return
            except Exception as error:  # nor what comes of an answer that is no chunk
                self._fail('inference failed', error)
                return
            recovered = self._status.published(latency_s)
        if recovered:
            self.get_logger().info(f'producing chunks again (was: {recovered})')

    def _why_no_chunk(self) -> str | None:
        """Return why no chunk comes, as far as it is known. Call it locked."""
        since_s = self._inferring_since_s
        if since_s is not None:
            return f'inference has been running for {time.monotonic() - since_s:.3f} s'
        stamps = self._ingest.newest_stamps_ns()
        if self._status.reason or None in stamps.values():
            return self._status.reason
        behind = min(stamps, key=stamps.get)
        age_s = (self.get_clock().now().nanoseconds - stamps[behind]) / NANOSECONDS
        return f'{behind}: nothing new for {age_s:.3f} s'

    def _report(self, reason: str, *, patience_s: float = 0.0) -> None:
        """Say why no chunk is produced: on the log once per kind, in /diagnostics all the time.

        patience_s: how long the reason must last before it is logged.
        """
        if self._status.withheld(reason, patience_s):
            self.get_logger().warning(f'no chunk: {reason}')

    # Diagnostics

    def _every_second(self) -> None:
        self._free_left()
        for sensor in self._sensors:
            sensor.adapt()
        self._publish_diagnostics()

    def _publish_diagnostics(self) -> None:
        with self._inputs:
            self._diagnostics.publish(to_messages.diagnostic_array(
                self.get_clock().now().nanoseconds, self._diagnostic_status()))

    def _diagnostic_status(self) -> DiagnosticStatus:
        state = self._state_machine.current_state[1]
        status, policy = self._status, self._policy
        values = {'state': state}
        level, message = DiagnosticStatus.OK, state
        if policy is None:
            if status.reason or self._problems:
                level = DiagnosticStatus.ERROR
                message = status.reason or '; '.join(self._problems)
        else:
            now_ns = self.get_clock().now().nanoseconds
            values |= {'robot': policy.robot.robot, 'dtype': str(policy.dtype),
                       'sampler_steps': self.get_parameter('sampler_steps').value
                       or policy.config.sampler_steps, **how_it_runs(policy)}
            for name, stamp in self._ingest.newest_stamps_ns().items():
                values[f'age {name}'] = ('never received' if stamp is None
                                         else f'{(now_ns - stamp) / NANOSECONDS:.3f} s')
            values |= status.values()
            values |= self._control.values()
            if self._inferring_since_s is not None:
                values['inferring_for_s'] = f'{time.monotonic() - self._inferring_since_s:.3f}'
            if self._control.failure:
                level, message = DiagnosticStatus.ERROR, self._control.failure
            elif self._active and status.reason:
                level, message = DiagnosticStatus.WARN, f'no chunk: {status.reason}'
            elif self._active:
                message = f'publishing chunks at {status.rate_hz():.1f} Hz'
        return to_messages.diagnostic_status(
            f'{self.get_fully_qualified_name()}: policy', level, message,
            str(policy.device) if policy else '', values)


def _spin(node: PolicyNode, executor: SingleThreadedExecutor) -> None:
    """Spin until the executor ends, through what rclpy itself raises for a negative /clock."""
    while True:
        try:
            return executor.spin()
        except ValueError as error:
            if not node.get_parameter('use_sim_time').value:
                raise
            node.get_logger().error(f'/clock: {error}', throttle_duration_sec=1.0)


def main(argv=None) -> int:
    """Run the node until Ctrl-C or SIGTERM."""
    sys.setswitchinterval(THREAD_SWITCH_S)
    node = executor = None
    try:
        node = initialize('meanflow_policy', argv, PolicyNode)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        _spin(node, executor)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        _end(node, executor)
        gc.freeze()  # or Python looks for garbage at its end, for seconds; launch kills after 5
    return 0


def _end(node: PolicyNode | None, executor: SingleThreadedExecutor | None) -> None:
    """Free what an interrupt has left."""
    if node is None:
        return
    node._release()
    if executor is not None:
        executor.shutdown()
    node.destroy_node()
    rclpy.try_shutdown()
    if node.hangs:
        sys.stderr.flush()
        os._exit(1)  # Python's end would wait for the network, or take it apart as it runs


if __name__ == '__main__':
    sys.exit(main())
