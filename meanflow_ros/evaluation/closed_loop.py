"""Closed-loop episodes in one process: the node's policy, guard and timeline, without DDS.

Fast, for sweeps while training; `evaluate` runs the same episodes through the node itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import Observation
from meanflow_ros.core.guard import Guard, Rejected
from meanflow_ros.core.policy import Policy
from meanflow_ros.core.timeline import Timeline
from meanflow_ros.sim.metaworld_robot import MAX_STEPS, PERIOD_S, TASKS, MetaWorldRobot

STEP_NS = round(PERIOD_S * 1e9)


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """How one episode went; latencies are those of the network, seconds."""

    task: str
    seed: int
    instruction: str
    success: bool
    steps: int
    rejected: int
    latencies_s: tuple[float, ...]


def run_episode(policy: Policy, robot: MetaWorldRobot, task: str, seed: int, *,
                instruction: str | None = None, camera_every: int = 4,
                sampler_steps: int | None = None, max_steps: int = MAX_STEPS) -> EpisodeResult:
    """Run one episode; a picture is taken every `camera_every` control steps."""
    instruction = instruction or TASKS[task][1]
    robot.reset(task, seed)
    guard, timeline = Guard(policy.robot), Timeline(period_ns=STEP_NS)
    still, success, rejected, latencies = np.zeros(4), False, 0, []
    step = 0
    while step < max_steps and not success:
        now_ns = 10**9 + step * STEP_NS
        if step % camera_every == 0:
            seen = robot.observe()
            start = time.perf_counter()
            chunk = policy.act(Observation(
                stamp_ns=now_ns, images=seen.images, state=seen.joint_positions,
                instruction=instruction), steps=sampler_steps)
            latencies.append(time.perf_counter() - start)
            try:
                timeline.add(guard.check(chunk, now_ns=now_ns).timed)
            except Rejected:
                rejected += 1
        command = timeline.at(now_ns)
        if command is None:
            command = still
        still = np.append(np.zeros(3), command[3])
        success = robot.step(command).success
        step += 1
    return EpisodeResult(task=task, seed=seed, instruction=instruction, success=success,
                         steps=step, rejected=rejected, latencies_s=tuple(latencies))
