"""The simulated robot and the policy node as two processes, driven over ROS from a third.

Used by `demo` and by `evaluate sim`: what they measure went through the node, over DDS.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from meanflow_ros.paths import share_directory

os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
os.environ.setdefault('FASTRTPS_DEFAULT_PROFILES_FILE',
                      str(share_directory() / 'config' / 'fastdds.xml'))

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rclpy.signals import SignalHandlerOptions
from std_srvs.srv import Trigger

from meanflow_ros.evaluation.episodes import EpisodeResult

POLICY, SIM = 'meanflow_policy', 'sim_robot'
START_TIMEOUT_S = 120.0
EPISODE_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 8.0
_PR_SET_PDEATHSIG = 1


class SystemFault(RuntimeError):
    """A process of the system died, did not start, or did not answer; the message says which."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class NodeProcess:
    """A node as a child process that ends when this process does; its output goes to a file."""

    def __init__(self, name: str, module: str, log: Path, parameters: dict[str, object]):
        self.name, self.log = name, log
        arguments = [sys.executable, '-m', module, '--ros-args']
        for key, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            arguments += ['-p', f'{key}:={text}']
        with open(log, 'w') as output:
            self._child = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT,
                                           stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent,
                                           start_new_session=True)

    def check(self) -> None:
        code = self._child.poll()
        if code is not None:
            tail = '\n  '.join(self.log.read_text(errors='replace').splitlines()[-15:])
            raise SystemFault(f'{self.name} ended with code {code}; the end of {self.log}:\n'
                               f'  {tail}')

    def stop(self) -> None:
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGINT)
            try:
                self._child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()


class System:
    """Starts both nodes, waits until the policy is active, runs episodes, ends both.

    node: the rclpy node of this process, for further subscriptions before the first episode.
    SystemFault carries what the failing node said.
    """

    def __init__(self, logs: Path, *, policy: dict[str, object], sim: dict[str, object]):
        self._logs, self._policy, self._sim = logs, policy, sim
        self._processes: list[NodeProcess] = []
        self._episode: DiagnosticStatus | None = None
        self._heard: list[dict[str, str]] = []          # diagnostics of the policy

    def __enter__(self) -> 'System':
        self._logs.mkdir(parents=True, exist_ok=True)
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        self.node = rclpy.create_node('evaluation', parameter_overrides=[
            Parameter('use_sim_time', value=True)])
        self.node.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, 10)
        self.node.create_subscription(DiagnosticStatus, 'episode', self._on_episode, 10)
        self._parameters = AsyncParameterClient(self.node, SIM)
        self._reset_sim = self.node.create_client(Trigger, f'{SIM}/reset')
        self._reset_policy = self.node.create_client(Trigger, f'{POLICY}/reset')
        self._processes = [
            NodeProcess(SIM, 'meanflow_ros.sim.sim_node', self._logs / 'sim.log', self._sim),
            NodeProcess(POLICY, 'meanflow_ros.ros.policy_node', self._logs / 'policy.log', {
                'frozen_pictures': 0, **self._policy, 'autostart': True, 'use_sim_time': True})]
        self._wait(lambda: any(values.get('state') == 'active' for values in self._heard),
                   START_TIMEOUT_S, 'the policy to become active')
        self._wait(lambda: self._parameters.services_are_ready()
                   and self._reset_sim.service_is_ready(), START_TIMEOUT_S,
                   'the simulated robot to offer its services')

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.stop()
        if hasattr(self, 'node'):
            self.node.destroy_node()
        rclpy.try_shutdown()

    def run_episode(self, task: str, seed: int, instruction: str) -> EpisodeResult:
        """Tell the robot its task, reset it, and wait until the episode has ended."""
        self._set_sim({'task': task, 'seed': seed, 'instruction': instruction})
        self._episode = None
        self._call(self._reset_sim)
        self._wait(lambda: self._episode is not None, EPISODE_TIMEOUT_S,
                   f'the episode {task} with seed {seed} to end')
        statistics = self._policy_statistics()
        told = {pair.key: pair.value for pair in self._episode.values}
        return EpisodeResult(
            task=task, seed=seed, instruction=instruction,
            success=self._episode.message == 'success', steps=int(told['steps']),
            starved_steps=int(told['starved_steps']), chunks=int(statistics['chunks']),
            mode=told.get('mode', ''),
            latency_p50_ms=float(statistics.get('latency_p50_ms', 'nan')),
            latency_p99_ms=float(statistics.get('latency_p99_ms', 'nan')))

    def _policy_statistics(self) -> dict[str, str]:
        """Reset the policy, which publishes its statistics, and return these.

        The diagnostics of just after the reset may come too: those count no chunk.
        """
        self._heard.clear()
        self._call(self._reset_policy)
        self._wait(lambda: any('chunks' in values for values in self._heard), 10.0,
                   'diagnostics of the policy')
        return max(self._heard, key=lambda values: int(values.get('chunks', 0)))

    def _set_sim(self, values: dict[str, object]) -> None:
        results = self._result(self._parameters.set_parameters(
            [Parameter(name, value=value) for name, value in values.items()])).results
        for result in results:
            if not result.successful:
                raise SystemFault(f'{SIM} refused a parameter: {result.reason}')

    def _call(self, client) -> None:
        response = self._result(client.call_async(Trigger.Request()))
        if not response.success:
            raise SystemFault(f'{client.srv_name}: {response.message}')

    def _result(self, future):
        self._wait(future.done, 30.0, 'a service to answer')
        return future.result()

    def _wait(self, condition, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            for process in self._processes:
                process.check()
            if time.monotonic() > deadline:
                raise SystemFault(f'waited {timeout_s:g} s for {what}; see {self._logs}/*.log')
            rclpy.spin_once(self.node, timeout_sec=0.1)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if POLICY in status.name:
                self._heard.append({pair.key: pair.value for pair in status.values})
                if status.level == DiagnosticStatus.ERROR:
                    raise SystemFault(f'{POLICY}: {status.message}')

    def _on_episode(self, message: DiagnosticStatus) -> None:
        if message.message in ('success', 'failure'):
            self._episode = message
