"""Closed-loop episodes in one process: the node's policy, guard and timeline, without DDS.

Fast, for sweeps while training; `evaluate` runs the same episodes through the node itself.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np

from meanflow_ros.core.contract import Observation
from meanflow_ros.core.guard import Guard, Rejected
from meanflow_ros.core.policy import Policy
from meanflow_ros.core.timeline import Timeline
from meanflow_ros.evaluation.episodes import EpisodeResult
from meanflow_ros.sim.metaworld_robot import ACTION_SPACE, MAX_STEPS, PERIOD_S, MetaWorldRobot

STEP_NS = round(PERIOD_S * 1e9)
START_NS = 10**9


def run_episode(policy: Policy, robot: MetaWorldRobot, task: str, seed: int, instruction: str, *,
                camera_every: int = 4, sampler_steps: int | None = None,
                noise_seed: int = 0) -> EpisodeResult:
    """Run one episode; a picture is taken every `camera_every` control steps."""
    robot.reset(task, seed)
    guard, timeline = Guard(policy.robot), Timeline(period_ns=STEP_NS)
    command, success, starved, latencies_ms = np.zeros(ACTION_SPACE.size), False, 0, []
    step = 0
    while step < MAX_STEPS and not success:
        now_ns = START_NS + step * STEP_NS
        if step % camera_every == 0:
            seen = robot.observe()
            start = time.perf_counter()
            chunk = policy.act(Observation(
                stamp_ns=now_ns, images=seen.images, state=seen.joint_positions,
                instruction=instruction), steps=sampler_steps, seed=noise_seed)
            latencies_ms.append((time.perf_counter() - start) * 1e3)
            with contextlib.suppress(Rejected):
                timeline.add(guard.check(chunk, now_ns=now_ns).timed)
        due = timeline.at(now_ns)
        starved += due is None
        command = np.array([0.0, 0.0, 0.0, command[-1]]) if due is None else due
        success = robot.step(command).success
        step += 1
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return EpisodeResult(
        task=task, seed=seed, instruction=instruction, success=success, steps=step,
        starved_steps=starved, chunks=len(latencies_ms) - guard.rejections.total(),
        latency_p50_ms=float(p50), latency_p99_ms=float(p99))
