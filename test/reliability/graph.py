"""A graph of processes over DDS: feeder, policy node, controllers; and what is seen of it.

Every process dies with this one (PR_SET_PDEATHSIG), however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from std_msgs.msg import Header
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from meanflow_ros.ros.from_messages import time_ns
from reliability.checkpoint import write_checkpoint
from reliability.checks import Checker
from reliability.robot import HOME, PARAMETERS, write_motion

TEST = Path(__file__).resolve().parent.parent
NODE = 'meanflow_policy'
TRANSITIONS = {'configure': 1, 'cleanup': 2, 'activate': 3, 'deactivate': 4}
PLAIN, MODEL, CLOCK = 'plain', 'model', 'clock'   # variants of the node
COMPRESSED, HOLD, NEUTRAL = 'compressed', 'hold', 'neutral'
START_S = 120.0
CALL_S = 10.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Failed(AssertionError):
    """Something of the graph did not happen in time."""


def until(condition, what, timeout_s: float, poll_s: float = 0.01):
    """Wait until `condition()` is true and return its value; Failed after the timeout."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise Failed(f'{what() if callable(what) else what} did not happen within '
                         f'{timeout_s:g} s')
        time.sleep(poll_s)
    return value


class Graph:
    """Use it in a `with` statement.

    out: where checkpoint, motion file and logs go. rate_hz: of the inputs.
    """

    def __init__(self, out: Path, *, domain: int | None = None, rate_hz: float = 30.0):
        self.out, self._rate_hz = out, rate_hz
        self.checker = Checker(offset_s=time.time() - time.monotonic())
        self.domain = 40 + os.getpid() % 60 if domain is None else domain
        self.chunks: deque = deque(maxlen=10_000)    # (monotonic seconds, stamp_ns)
        self.beats: deque = deque(maxlen=2000)       # (monotonic seconds, words)
        self.reasons: deque = deque(maxlen=2000)     # (monotonic seconds, words)
        self.values: dict[str, str] = {}             # of the newest diagnostics
        self.variant: str | None = None
        self.shoulder, self.elbow = HOME['shoulder'], HOME['elbow']
        self._processes: dict[str, subprocess.Popen] = {}
        self._clients: dict = {}
        out.mkdir(parents=True, exist_ok=True)
        self._checkpoint = write_checkpoint(out / 'checkpoint')
        self._motions = {action: write_motion(out / f'{action}.yaml', action)
                         for action in ('decelerate', HOLD, NEUTRAL)}

    def __enter__(self) -> Graph:
        self._context = rclpy.Context()
        self._context.init(domain_id=self.domain)
        self._node = Node('monitor', context=self._context)
        queue = QoSProfile(depth=100)
        self._node.create_subscription(JointTrajectory, 'action_chunk', self._on_chunk, queue)
        self._node.create_subscription(Header, f'{NODE}/heartbeat', self._on_beat, queue)
        self._node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics,
                                       queue)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._open = True
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        self.start_feeder()
        self.start_controller()
        return self

    def __exit__(self, *_) -> None:
        for name in [name for name in self._processes if self.alive(name)]:
            self.kill(name, signal.SIGKILL)
        self._open = False
        self._executor.wake()
        self._thread.join()
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()

    # Processes

    def start_node(self, variant: str) -> None:
        """Run the policy node, with this variant in place of another."""
        if self.variant == variant and self.alive('node'):
            return
        if self.alive('node'):
            self.kill('node', signal.SIGTERM)
        if (variant == CLOCK) != (self.variant == CLOCK):
            self.kill('controller', signal.SIGKILL)
        self.variant = variant
        if not self.alive('controller'):
            self.start_controller()
        motion = self._motions.get(variant, self._motions['decelerate'])
        parameters = {**PARAMETERS, 'checkpoint': str(self._checkpoint), 'motion': str(motion),
                      'use_sim_time': variant == CLOCK,
                      'image_transport': 'compressed' if variant == COMPRESSED else 'raw'}
        arguments = [word for name, value in parameters.items()
                     for word in ('-p', f'{name}:={json.dumps(value)}')]
        module = 'reliability.faulty_node' if variant == MODEL else 'meanflow_ros.ros.policy_node'
        self.checker.forget()
        self.checker.simulated_time = variant == CLOCK
        self._start('node', '-m', module, '--ros-args', *arguments)

    def start_feeder(self) -> None:
        """Run the inputs."""
        self._start('feeder', '-m', 'reliability.feeder', str(self._rate_hz))

    def start_controller(self) -> None:
        """Run the controllers, from where the robot stands."""
        self.checker.forget()
        process = self._start('controller', '-m', 'reliability.controller', str(self.shoulder),
                              str(self.elbow), *['simulated'] * (self.variant == CLOCK))
        threading.Thread(target=self._record, args=(process,), daemon=True).start()

    def revive(self) -> None:
        """Start anew what should not have ended."""
        for name, start in (('feeder', self.start_feeder), ('controller', self.start_controller)):
            if not self.alive(name):
                start()
        if self.alive('node'):
            self.kill('node', signal.SIGKILL)

    def tell(self, process: str, line: str) -> None:
        """Write a line to the stdin of a process."""
        self._processes[process].stdin.write(line + '\n')
        self._processes[process].stdin.flush()

    def kill(self, name: str, number: int) -> float:
        """Send a signal and wait for the end; return how long it took, seconds."""
        process, begin = self._processes.pop(name), time.monotonic()
        memory = _shared_memory(process.pid)
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f'{name} did not end within 20 s of signal {number}') from None
        finally:
            process.stdin.close()
            process.wait()
            for path in memory:
                path.unlink(missing_ok=True)
        return time.monotonic() - begin

    def alive(self, name: str) -> bool:
        """Whether a process runs."""
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def memory_mib(self) -> float:
        """Return the anonymous resident memory (RssAnon) of the node."""
        status = Path('/proc', str(self._processes['node'].pid), 'status').read_text()
        return int(status.split('RssAnon:')[1].split()[0]) / 1024

    def log(self, name: str) -> str:
        """Return the end of what a process wrote to stderr."""
        return (self.out / f'{name}.log').read_text(errors='replace')[-2000:]

    def _start(self, name: str, *arguments: str) -> subprocess.Popen:
        path = os.pathsep.join([str(TEST.parent), str(TEST), os.environ.get('PYTHONPATH', '')])
        environment = {**os.environ, 'PYTHONPATH': path, 'ROS_DOMAIN_ID': str(self.domain),
                       'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST', 'OMP_NUM_THREADS': '1',
                       'PYTHONUNBUFFERED': '1'}
        with open(self.out / f'{name}.log', 'a') as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *arguments], cwd=self.out, env=environment, text=True,
                stdin=subprocess.PIPE, stderr=log, start_new_session=True, preexec_fn=_die_with_us,
                stdout=subprocess.PIPE if name == 'controller' else log)
        return self._processes[name]

    # What is seen

    def _spin(self) -> None:
        while self._open:
            with contextlib.suppress(rclpy.executors.ExternalShutdownException):
                self._executor.spin_once(timeout_sec=0.2)

    def _record(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):    # killed within a line
                record = json.loads(line)
                if record[0] == 'c':
                    self.elbow = record[4]
                elif record[0] == 's':
                    self.shoulder = record[2]
                self.checker.take(record)

    def _on_chunk(self, message) -> None:
        self.chunks.append((time.monotonic(), time_ns(message.header.stamp)))

    def _on_beat(self, message) -> None:
        self.beats.append((time.monotonic(), message.frame_id))

    def _on_diagnostics(self, message) -> None:
        for status in message.status:
            self.reasons.append((time.monotonic(), status.message))
            self.values = {value.key: value.value for value in status.values}

    def said(self, since_s: float) -> list[str]:
        """Return what heartbeat and diagnostics have said since then, each once."""
        return list(dict.fromkeys(words for source in (self.beats, self.reasons)
                                  for at, words in list(source) if at >= since_s))

    def chunks_since(self, since_s: float) -> int:
        """Return how many chunks have arrived since then."""
        return sum(at >= since_s for at, _ in list(self.chunks))

    def moving(self, since_s: float) -> bool:
        """Whether chunks have come and every output has moved since then."""
        return (self.chunks_since(since_s) > 0 and bool(self.beats)
                and self.beats[-1][0] >= since_s and self.beats[-1][1] == 'ready'
                and all(at >= since_s for at in self.checker.moved.values()))

    def resting_since(self) -> float:
        """Return when an output last moved, monotonic seconds."""
        return max(self.checker.moved.values())

    # Services, as from another process

    def call(self, kind, service: str, request):
        """Call a service of the node and return the response."""
        client = self._clients.get(service)
        if client is None:
            client = self._clients[service] = self._node.create_client(kind, f'{NODE}/{service}')
        until(client.service_is_ready, f'the service {service}', CALL_S)
        future = client.call_async(request)
        until(future.done, f'an answer of {service}', CALL_S)
        return future.result()

    def transition(self, name: str) -> None:
        """Ask for a lifecycle transition; Failed if it is refused."""
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[name]
        if not self.call(ChangeState, 'change_state', request).success:
            raise Failed(f'{name} was refused')

    def switch(self, service: str, value: bool) -> None:
        """Call `estop` or `enable`."""
        self.call(SetBool, service, SetBool.Request(data=value))

    def reset(self) -> None:
        """Call `reset`."""
        self.call(Trigger, 'reset', Trigger.Request())

    def set_parameter(self, name: str, value) -> bool:
        """Set a parameter; return whether it was accepted."""
        return self.call(SetParameters, 'set_parameters', SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg()])).results[0].successful


def _shared_memory(pid: int) -> list[Path]:
    """Return what Fast DDS leaves behind of a process that is killed: its shared memory."""
    held = []
    for descriptor in Path('/proc', str(pid), 'fd').iterdir():
        with contextlib.suppress(OSError):
            path = descriptor.readlink()
            if path.parent == Path('/dev/shm') and path.name.endswith('_el'):
                held += [path, path.with_name(path.name.removesuffix('_el'))]
    return held


def _die_with_us() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
