"""A simulated robot in a process of its own, whose policy answers from the parent process.

Messages -> Ingest -> Observation -> (parent: policy) -> ActionChunk -> Execution -> command, with
the ingest, guard and timeline of the node. Torch is not imported here: a machine
holds more workers than cores.
"""

from __future__ import annotations

import mmap
import sys
import traceback
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from meanflow_ros.core.contract import ActionChunk, Observation, RobotSpec
from meanflow_ros.evaluation.episodes import EpisodeResult
from meanflow_ros.evaluation.execution import Execution
from meanflow_ros.evaluation.smoothness import Recorder
from meanflow_ros.ros.ingest import Ingest
from meanflow_ros.sim import messages
from meanflow_ros.sim.metaworld_robot import ACTION_SPACE, MAX_STEPS, PERIOD_S, MetaWorldRobot
from meanflow_ros.sim.scene import CAMERAS

EXPERT = 'scripted expert'   # the policy of a job that needs none
GREY = 128
_EXPERT_SIZE = (16, 16)   # nobody looks
_STEP_NS = round(PERIOD_S * 1e9)
_START_NS = 10**9


@dataclass(frozen=True, kw_only=True)
class Job:
    """One episode to run.

    policy: key of the policy, or EXPERT. noise_seed: of its sampler. blank_cameras: cameras
    whose pictures are replaced by plain grey, to see whether the policy looks. max_steps: control
    steps after which the episode has failed. execution, delay_steps: how chunks are followed and
    how late they come, see `Execution`. smoothness: whether the result says how smooth it was.
    """

    policy: str
    task: str
    seed: int
    instruction: str
    noise_seed: int = 0
    blank_cameras: tuple[str, ...] = ()
    max_steps: int = MAX_STEPS
    execution: str = 'receding_horizon'
    delay_steps: int = 0
    smoothness: bool = False


@dataclass(frozen=True, kw_only=True)
class Question:
    """An observation, and the first steps (n, A) of its chunk where they are known."""

    observation: Observation
    prefix: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A chunk, and how long the policy took for the batch that it was in."""

    chunk: ActionChunk
    latency_ms: float


def check_robot(spec: RobotSpec) -> None:
    """ValueError unless the spec is of this robot, with all cameras of one size."""
    if spec.action_space.dimensions != ACTION_SPACE.dimensions:
        raise ValueError(f'the policy commands {list(spec.action_space.dimensions)}, the '
                         f'simulated robot takes {list(ACTION_SPACE.dimensions)}')
    unknown = [name for name in spec.camera_names if name not in CAMERAS]
    if unknown:
        raise ValueError(f'the simulated robot has no camera {unknown[0]!r}, only '
                         f'{", ".join(CAMERAS)}')
    if len({(camera.width, camera.height) for camera in spec.cameras}) > 1:
        raise ValueError('the cameras of the simulated robot have one size, the policy asks '
                         'for several')


def robot_for(spec: RobotSpec) -> MetaWorldRobot:
    """Return a robot whose pictures have the size that the policy looks at."""
    camera = spec.cameras[0]
    return MetaWorldRobot(image_width=camera.width, image_height=camera.height)


def policy_episode(robot: MetaWorldRobot, spec: RobotSpec, job: Job,
                   camera_every: int) -> Generator[Question, Answer, EpisodeResult]:
    """Run an episode; yields each question and takes the answer to it.

    The simulated clock stands still meanwhile, and `job.delay_steps` says when the answer counts.
    A picture comes every `camera_every` steps.
    """
    robot.reset(job.task, job.seed)
    ingest, recorder = Ingest(spec), Recorder(ACTION_SPACE, PERIOD_S,
                                                                 spec.horizon)
    execution = Execution(spec, job.execution, delay_steps=job.delay_steps,
                          picture_ns=camera_every * _STEP_NS)
    ingest.set_instruction(job.instruction)
    command, starved, step, latencies_ms = np.zeros(ACTION_SPACE.size), 0, 0, []
    while True:
        now_ns = _START_NS + step * _STEP_NS
        execution.receive(now_ns)
        if step % camera_every == 0 and execution.wants_chunk(now_ns):
            _sense(robot, spec, ingest, now_ns, job.blank_cameras)
            observation = ingest.observe(now_ns=now_ns)
            answer = yield Question(observation=observation, prefix=execution.ask(observation))
            latencies_ms.append(answer.latency_ms)
            execution.answer(answer.chunk, now_ns)
        due = execution.timeline.at(now_ns)
        starved += due is None
        command = ACTION_SPACE.at_rest(command) if due is None else due
        followed = execution.timeline.followed
        recorder.note(command, followed and followed.stamp_ns, now_ns, execution.planned(now_ns))
        result = robot.step(command)
        step += 1
        if result.success or step == job.max_steps:
            break
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return EpisodeResult(
        task=job.task, seed=job.seed, instruction=job.instruction, success=result.success,
        steps=step, starved_steps=starved,
        chunks=len(latencies_ms) - execution.guard.rejections.total(),
        latency_p50_ms=float(p50), latency_p99_ms=float(p99),
        mode=result.mode if result.success else '', execution=job.execution,
        delay_steps=job.delay_steps, smoothness=recorder.result() if job.smoothness else None)


def _sense(robot: MetaWorldRobot, spec: RobotSpec, ingest: Ingest, now_ns: int,
           blank_cameras: tuple[str, ...]) -> None:
    """Give the ingest what the robot would publish now."""
    seen = [name for name in spec.camera_names if name not in blank_cameras]
    observed = robot.observe(seen)
    camera = spec.cameras[0]
    blank = np.full((camera.height, camera.width, 3), GREY, np.uint8)
    ingest.add_joint_state(messages.joint_state(messages.recorded, observed, now_ns),
                           now_ns=now_ns)
    for name in spec.camera_names:
        pixels = observed.images.get(name, blank)
        ingest.add_image(name, messages.image(messages.recorded, name, pixels, now_ns),
                         now_ns=now_ns)


def expert_episode(robot: MetaWorldRobot, job: Job) -> EpisodeResult:
    """Run an episode of the scripted expert: what a policy could reach at best."""
    robot.reset(job.task, job.seed)
    for step in range(1, job.max_steps + 1):
        result = robot.step(robot.expert_action())
        if result.success:
            break
    return EpisodeResult(
        task=job.task, seed=job.seed, instruction=job.instruction, success=result.success,
        steps=step, starved_steps=0, chunks=0, latency_p50_ms=np.nan, latency_p99_ms=np.nan,
        mode=result.mode if result.success else '')


class Worker:
    """Runs the jobs that come over a connection; pictures go through shared memory.

    After the specs and the camera period come jobs. Each is answered with its result, or with
    a text that says what went wrong; in between go observations, and come chunks.
    """

    def __init__(self, parent: Connection, pictures: np.ndarray):
        self._parent = parent
        self._pictures = pictures
        self._robots: dict[tuple[int, int], MetaWorldRobot] = {}

    def run(self) -> None:
        """Serve until an episode fails or the parent closes the connection (EOFError)."""
        specs, camera_every = self._parent.recv()
        while True:
            job = self._parent.recv()
            try:
                result = self._run(job, specs, camera_every)
            except (EOFError, ConnectionError):
                raise
            except Exception as error:   # whatever it is, the parent says in which episode
                traceback.print_exc()
                self._parent.send(f'{type(error).__name__}: {error}')
                return
            self._parent.send(result)

    def _run(self, job: Job, specs: Mapping[str, RobotSpec], camera_every: int) -> EpisodeResult:
        if job.policy == EXPERT:
            return expert_episode(self._robot(*_EXPERT_SIZE), job)
        spec = specs[job.policy]
        robot = self._robot(spec.cameras[0].width, spec.cameras[0].height)
        episode = policy_episode(robot, spec, job, camera_every)
        try:
            question = next(episode)
            while True:
                question = episode.send(self._ask(spec, question))
        except StopIteration as stop:
            return stop.value

    def _robot(self, width: int, height: int) -> MetaWorldRobot:
        if (width, height) not in self._robots:
            self._robots[width, height] = MetaWorldRobot(image_width=width, image_height=height)
        return self._robots[width, height]

    def _ask(self, spec: RobotSpec, question: Question) -> Answer:
        observation = question.observation
        for slot, name in zip(slots(self._pictures, spec), spec.camera_names):
            slot[:] = observation.images[name]
        self._parent.send((observation.stamp_ns, observation.state, question.prefix))
        actions, stamp_ns, period_s, first_step, latency_ms = self._parent.recv()
        return Answer(latency_ms=latency_ms, chunk=ActionChunk(
            actions=actions, stamp_ns=stamp_ns, period_s=period_s, first_step=first_step))


def slots(pictures: np.ndarray, spec: RobotSpec) -> np.ndarray:
    """Return where the pictures lie in shared memory (N,) uint8: a view (C, H, W, 3)."""
    camera = spec.cameras[0]
    shape = (len(spec.cameras), camera.height, camera.width, 3)
    return pictures[:np.prod(shape)].reshape(shape)


def main(connection: int, memory: int, size: int) -> None:
    """Be a worker; the file descriptors are those of the connection and the shared memory."""
    parent = Connection(connection)
    try:
        Worker(parent, np.frombuffer(mmap.mmap(memory, size), np.uint8)).run()
    except (EOFError, ConnectionError):
        pass   # the parent has ended, or has no more use for this worker


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
