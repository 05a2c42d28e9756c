"""The node's `Motion` on the time of a recording: guard, timeline, controllers that send nothing.

Everything that the node does between a chunk and its controllers happens here too, with the same
code, so that what the guard finds is counted alike. The recorded robot does not follow what is
sent to it here, unless this policy drove it when it was recorded (`as_driven`): whether a joint
is where it was sent (`astray`) cannot be known otherwise, and it is taken to be there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, ActionChunk, RobotSpec, SafeChunk
from meanflow_ros.core.guard import Guard, GuardSettings
from meanflow_ros.core.limits import Limits
from meanflow_ros.core.timeline import Mode, Prefix, RecedingHorizon
from meanflow_ros.core.urdf import MAX_BYTES, limits_from_urdf
from meanflow_ros.ros.bag import deserialize_text
from meanflow_ros.ros.bag_files import Bag
from meanflow_ros.ros.motion import Motion
from meanflow_ros.ros.motion_config import (
    JointTrajectoryOutput, MotionConfig, measured_names, read_motion)
from meanflow_ros.ros.outputs import make_output

NO_URDF = 'none'
UNKNOWN = {'astray': 'the recorded robot did not follow these commands (--as-driven if it did)'}


@dataclass(frozen=True, kw_only=True)
class Driving:
    """What drives a robot, as for the node: motion file, limits, mode of execution.

    as_driven: the recorded robot followed the commands of this policy and this motion file.
    """

    robot: RobotSpec
    config: MotionConfig = MotionConfig()
    guard: GuardSettings = GuardSettings()
    mode: Mode = RecedingHorizon()
    as_driven: bool = False

    def motion(self) -> Motion:
        """Return a Motion that has not been told anything; every controller is there."""
        config = dataclasses.replace(self.config, require_subscribers=False)
        outputs = [make_output(None, each, self.robot.action_space) for each in config.outputs]
        return Motion(self.robot, config, Guard(self.robot, self.guard), self.mode, outputs,
                      compares=self.as_driven)


class Drive:
    """A Motion from event to event; the control loop runs between them. Times (ns) ascend.

    stopped: called when the robot stops for want of a chunk.
    """

    def __init__(self, driving: Driving, stopped: Callable[[], None] = lambda: None):
        self._stopped = stopped
        self.motion = driving.motion()
        self._period_ns = round(driving.config.tick_s * NANOSECONDS)
        self._tick_ns: int | None = None     # of the next tick; before the first chunk none

    def pass_to(self, now_ns: int) -> None:
        """Run the control loop until now."""
        while self._tick_ns is not None and self._tick_ns <= now_ns:
            moved = self.motion.moving
            self.motion.tick(self._tick_ns)
            self._tick_ns += self._period_ns
            if moved and not self.motion.moving:
                self._stopped()

    def feel(self, now_ns: int, state: np.ndarray) -> None:
        """Note the measured state (P,)."""
        self.pass_to(now_ns)
        self.motion.feel(state)

    def halt(self, now_ns: int, why: str) -> None:
        """Do the safe action and forget every chunk."""
        self.pass_to(now_ns)
        self.motion.halt(why, now_ns)

    def wants(self, now_ns: int, lead_ns: int = 0) -> bool:
        """Whether a chunk for an observation that is there now could be of use."""
        self.pass_to(now_ns)
        return self.motion.wants_chunk(now_ns, lead_ns)

    def accept(self, chunk: ActionChunk, now_ns: int, *, epoch: int | None, state: np.ndarray,
               prefix: Prefix | None) -> SafeChunk | None:
        """Take a chunk as the node does; see `Motion.accept`. state: (P,), (0,) for none."""
        self.pass_to(now_ns)
        if self._tick_ns is None:
            self._tick_ns = now_ns + self._period_ns
        return self.motion.accept(chunk, now_ns=now_ns, epoch=epoch, prefix=prefix,
                                  state=state if state.size else None)


def motion_config(path: str, robot: RobotSpec) -> MotionConfig:
    """Read a motion file for this robot, '' for none; ValueError names what to mend."""
    if not path:
        return MotionConfig()
    if not Path(path).is_file():
        raise ValueError(f'--motion {path}: there is no such file; give the motion file that the '
                         f'node is started with')
    config = read_motion(path)
    try:
        config.check(robot)
        Guard(robot, config.guard_settings(robot))
    except ValueError as error:
        raise ValueError(f'--motion {path}: {error}; give the motion file of the robot '
                         f'{robot.robot!r}') from None
    return config


def limits_of_file(path: str, robot: RobotSpec) -> Limits | None:
    """Return the limits of a URDF file, None for '' and 'none'; ValueError names what to mend."""
    if path in ('', NO_URDF):
        return None
    if not measured_names(robot):
        raise ValueError(f'--urdf {path}: the robot {robot.robot!r} commands no position of a '
                         f'measured joint, so that it limits nothing: leave it out')
    try:
        text = Path(path).read_text(encoding='utf-8')
    except OSError as error:
        raise ValueError(f'--urdf {path}: {error.strerror}: give the file of the robot '
                         f'description') from None
    except UnicodeDecodeError:
        raise ValueError(f'--urdf {path}: it is no text: give the file of the robot '
                         f'description') from None
    try:
        return limits_from_urdf(text, measured_names(robot))
    except ValueError as error:
        raise ValueError(f'--urdf {path}: {error}; give the robot description of '
                         f'{robot.robot!r}') from None


def limits_of_bag(bag: Bag, topic: str, robot: RobotSpec) -> Limits | None:
    """Return the limits of the last robot description in a bag, None if it has none.

    It holds from the beginning: the topic is latched. ValueError names what to mend.
    """
    last = None
    for last in bag.messages({topic}) if topic else ():
        pass
    if last is None:
        return None
    try:
        return limits_from_urdf(deserialize_text(last.data, MAX_BYTES), measured_names(robot))
    except ValueError as error:
        raise ValueError(f'{topic} of the recording: {error}; give the robot description with '
                         f'--urdf FILE, or --urdf {NO_URDF} to do without') from None


def not_checked(driving: Driving) -> dict[str, str]:
    """Return kind -> why of what the node would look at and a replay cannot know."""
    trajectories = [output for output in driving.config.outputs
                    if isinstance(output, JointTrajectoryOutput)]
    compared = set(measured_names(driving.robot)).intersection(
        name for output in trajectories for name in output.dimensions)
    return {} if driving.as_driven or not compared else dict(UNKNOWN)
