"""How a robot is driven: execution, limits, safe action and outputs, from a YAML file.

It describes the robot's side and its controllers, where the checkpoint describes the policy's;
`config/motion_*.yaml` are complete examples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.core.guard import GuardSettings
from meanflow_ros.core.limits import RATES, Limits
from meanflow_ros.core.schema import check_keys, known_or_hint, read_dataclass, read_yaml
from meanflow_ros.core.timeline import Mode, OpenLoop, RealTime, RecedingHorizon, TemporalEnsemble

HOLD, DECELERATE, NEUTRAL = 'hold', 'decelerate', 'neutral'
SAFE_ACTIONS = (HOLD, DECELERATE, NEUTRAL)
AUTO, ZERO, ANY = 'auto', 'zero', 'any'
EXECUTION = ('open_loop | receding_horizon[:STEPS] | ensemble[:DECAY[:newest_first]] | '
             'real_time:STEPS')
TWIST_AXES = ('linear.x', 'linear.y', 'linear.z', 'angular.x', 'angular.y', 'angular.z')
MAX_BYTES = 2**20
IDLE_PERIOD_S = 0.1


def read_mode(text: str) -> Mode:
    """Return the execution mode that `text` names, as in EXECUTION; ValueError otherwise."""
    kind, *rest = text.split(':')
    try:
        if kind == 'open_loop' and not rest:
            return OpenLoop()
        if kind == 'receding_horizon' and len(rest) <= 1:
            return RecedingHorizon(steps=int(rest[0]) if rest else 0)
        if kind == 'ensemble' and rest[1:] in ([], ['newest_first']):
            return TemporalEnsemble(decay=float(rest[0]) if rest else 0.01,
                                    newest_first=len(rest) == 2)
        if kind == 'real_time' and len(rest) == 1:
            return RealTime(delay_steps=int(rest[0]))
    except ValueError as error:
        raise ValueError(f'execution {text!r}: {error}') from None
    raise ValueError(f'execution must be {EXECUTION}, got {text!r}')


@dataclass(frozen=True, kw_only=True)
class JointTrajectoryOutput:
    """Whole chunks for a joint_trajectory_controller.

    joints: the controller's names of the dimensions, the same by default. end_velocity: `zero`
    for controllers that reject a trajectory which ends in motion, as they do by default from Iron
    on; `any` where that is allowed; `auto` goes by ROS_DISTRO. lead_s: a trajectory goes
    on from where the one before leads by then, so this is how late it may arrive.
    """

    topic: str
    dimensions: tuple[str, ...]
    joints: tuple[str, ...] = ()
    end_velocity: str = AUTO
    lead_s: float = 0.05
    streams = False


@dataclass(frozen=True, kw_only=True)
class ForwardCommandOutput:
    """Values for a forward_command_controller, at the control rate, in its joints' order."""

    topic: str
    dimensions: tuple[str, ...]
    streams = True


@dataclass(frozen=True, kw_only=True)
class TwistOutput:
    """A TwistStamped for MoveIt Servo, at the control rate; axes: `linear.x` ... -> dimension."""

    topic: str
    axes: Mapping[str, str]
    frame_id: str
    streams = True

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Return the dimensions that it carries."""
        return tuple(self.axes.values())


@dataclass(frozen=True, kw_only=True)
class JointJogOutput:
    """A JointJog for MoveIt Servo, at the control rate: joint velocities."""

    topic: str
    dimensions: tuple[str, ...]
    joints: tuple[str, ...] = ()
    frame_id: str = ''
    streams = True


@dataclass(frozen=True, kw_only=True)
class GripperOutput:
    """A gripper by itself: its position, or open and closed with hysteresis.

    binary: std_msgs/Bool, true is closed, else Float64MultiArray. close_below, open_above: the
    command's values at which a binary gripper changes; close_below < open_above.
    """

    topic: str
    dimension: str
    binary: bool = False
    close_below: float = 0.0
    open_above: float = 0.0
    streams = True

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Return the one dimension that it carries."""
        return (self.dimension,)


OUTPUTS = {'joint_trajectory': JointTrajectoryOutput, 'forward_command': ForwardCommandOutput,
           'twist': TwistOutput, 'joint_jog': JointJogOutput, 'gripper': GripperOutput}


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """See the module's first lines.

    control_rate_hz: of outputs that stream. safe_action: what happens when no chunk comes any
    more: `hold`, `decelerate` (along the last path, over stop_s), or `neutral` (the command
    `neutral`, name -> value). deadline_s: how long after the last chunk that happens.
    limits: `lower`, `upper`, `velocity`, `acceleration`, `jerk` -> name -> value; they can only
    tighten. workspace: name -> [lowest, highest]. first_step: name -> largest distance of a
    chunk's first step from the measured state. state_margin, remedies, max_slowdown: see
    `GuardSettings`. require_subscribers: stop while an output has no subscriber.
    """

    outputs: tuple = ()
    control_rate_hz: float = 100.0
    safe_action: str = DECELERATE
    stop_s: float = 0.5
    neutral: Mapping[str, float] = field(default_factory=dict)
    deadline_s: float = 0.5
    limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    workspace: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    first_step: Mapping[str, float] = field(default_factory=dict)
    state_margin: float = math.inf
    remedies: Mapping[str, str] = field(default_factory=dict)
    max_slowdown: float = 4.0
    require_subscribers: bool = True

    def __post_init__(self):
        for name, low, high in (('control_rate_hz', 1, 1000), ('stop_s', 0.001, 60),
                                ('deadline_s', 0.001, 60)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f'{name} must be {low:g} to {high:g}, got {getattr(self, name)}')
        if self.safe_action not in SAFE_ACTIONS:
            raise ValueError(f'safe_action must be one of {SAFE_ACTIONS}, '
                             f'got {self.safe_action!r}')
        topics = [output.topic for output in self.outputs]
        for topic in topics:
            if not re.fullmatch(r'[~/]?[A-Za-z_][\w/]*', topic):
                raise ValueError(f'{topic!r} is no name for a topic')
        if len(set(topics)) != len(topics):
            raise ValueError(f'two outputs have one topic: {topics}')

    @property
    def period_s(self) -> float:
        """Return the time between two commands of a stream."""
        return 1 / self.control_rate_hz

    @property
    def tick_s(self) -> float:
        """Return the time between two calls of `Motion.tick`; without outputs nothing is due."""
        return self.period_s if self.outputs else IDLE_PERIOD_S

    def check(self, robot: RobotSpec) -> None:
        """ValueError unless every name in it is one of the robot's."""
        space = robot.action_space
        for output in self.outputs:
            for name in output.dimensions:
                _require(name, space.dimensions, f'output {output.topic!r}')
            joints = getattr(output, 'joints', ())
            if joints and len(joints) != len(output.dimensions):
                raise ValueError(f'output {output.topic!r} has {len(output.dimensions)} '
                                 f'dimensions but {len(joints)} joints')
            if isinstance(output, GripperOutput) and output.dimension not in space.gripper:
                raise ValueError(f'output {output.topic!r}: the checkpoint does not say that '
                                 f'{output.dimension!r} is a gripper, only '
                                 f'{list(space.gripper) or "nothing"}')
            rates = [name for name in output.dimensions if name in space.rates]
            if isinstance(output, JointTrajectoryOutput) and rates:
                raise ValueError(f'output {output.topic!r}: {rates[0]!r} is a rate, a trajectory '
                                 f'controller wants positions')
            if isinstance(output, (TwistOutput, JointJogOutput)) and \
                    len(rates) != len(output.dimensions):
                still = next(name for name in output.dimensions if name not in rates)
                raise ValueError(f'output {output.topic!r}: {still!r} is not among the rates of '
                                 f'the action space, MoveIt Servo wants velocities')
        for name in self.neutral:
            _require(name, space.dimensions, 'neutral')
        if self.safe_action == NEUTRAL:
            missing = [name for name in space.dimensions if name not in self.neutral]
            if missing:
                raise ValueError(f'neutral gives no value for {missing[0]!r}')
            value = self.neutral_command(robot)
            if not ((value >= space.lower) & (value <= space.upper)).all():
                raise ValueError('neutral lies outside the limits of the action space')
        for name in self.first_step:
            _require(name, measured_names(robot), 'first_step, which needs a measured state')

    def neutral_command(self, robot: RobotSpec) -> np.ndarray:
        """Return the neutral command (A,)."""
        return np.array([self.neutral[name] for name in robot.action_space.dimensions], float)

    def guard_settings(self, robot: RobotSpec, *, described: Limits | None = None,
                       state_range=None) -> GuardSettings:
        """Return what the guard checks. described: limits of the robot description, if known.

        ValueError names a limit that would loosen the checkpoint's.
        """
        limits = Limits.of(robot.action_space)
        for what, values in self.limits.items():
            limits = limits.tightened(what, values)
        if described is not None:
            limits = limits.within(described)
        tolerance = [self.first_step.get(name, math.inf)
                     for name in robot.action_space.dimensions]
        return GuardSettings(
            limits=limits, workspace=self.workspace, state_range=state_range,
            state_margin=self.state_margin, remedies=self.remedies,
            max_slowdown=self.max_slowdown,
            first_step=np.array(tolerance) if self.first_step else None)


def measured_names(robot: RobotSpec) -> tuple[str, ...]:
    """Return the dimensions that are measured: positions that are states of the same name."""
    return tuple(name for name in robot.action_space.dimensions
                 if name in robot.state_names and name not in robot.action_space.rates)


def read_motion(path: Path | str) -> MotionConfig:
    """Read a motion file strictly; ValueError names the file and the field that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'motion file {path} ' + ('is no file' if path.exists() else
                                                   'does not exist'))
    try:
        document = read_yaml(path, MAX_BYTES) or {}
        check_keys(document, [], list(MotionConfig.__dataclass_fields__), 'motion')
        outputs = document.get('outputs', [])
        if not isinstance(outputs, list):
            raise ValueError(f'outputs must be a list, got {outputs!r}')
        limits = document.get('limits') or {}
        check_keys(limits, [], ['lower', 'upper', *RATES], 'limits')
        _require_numbers(document)
        fields = {**document, 'outputs': tuple(
            _read_output(output, f'outputs[{index}]') for index, output in enumerate(outputs))}
        return read_dataclass(MotionConfig, fields, 'motion')
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def _read_output(mapping, path: str):
    if not isinstance(mapping, Mapping) or 'type' not in mapping:
        raise ValueError(f'{path} must be a mapping with a type, one of {list(OUTPUTS)}')
    kind = mapping['type']
    if kind not in OUTPUTS:
        raise ValueError(f'{path}.type is {kind!r} ({known_or_hint(kind, OUTPUTS)})')
    output = read_dataclass(OUTPUTS[kind], {key: value for key, value in mapping.items()
                                            if key != 'type'}, path)
    if not output.dimensions:
        raise ValueError(f'{path} carries no dimension')
    if isinstance(output, JointTrajectoryOutput) and output.end_velocity not in (AUTO, ZERO, ANY):
        raise ValueError(f'{path}.end_velocity must be {AUTO}, {ZERO} or {ANY}, '
                         f'got {output.end_velocity!r}')
    if isinstance(output, JointTrajectoryOutput) and not 0 <= output.lead_s <= 10:
        raise ValueError(f'{path}.lead_s must be 0 to 10, got {output.lead_s}')
    if isinstance(output, TwistOutput):
        for axis in output.axes:
            _require(axis, TWIST_AXES, path)
    if isinstance(output, GripperOutput) and output.binary and not (
            output.close_below < output.open_above):
        raise ValueError(f'{path}: close_below must be less than open_above')
    return output


def _require(name: str, known, where: str) -> None:
    if name not in known:
        raise ValueError(f'{where}: unknown name {name!r} ({known_or_hint(name, known)})')


def _require_numbers(document: Mapping) -> None:
    """ValueError unless the leaves of the tables of numbers are numbers."""
    def leaves(value, path):
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from leaves(item, f'{path}.{key}')
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from leaves(item, f'{path}[{index}]')
        else:
            yield path, value

    for table in ('limits', 'workspace', 'first_step', 'neutral'):
        for path, value in leaves(document.get(table) or {}, table):
            if not isinstance(value, (int, float)) or isinstance(value, bool) \
                    or math.isnan(value):
                raise ValueError(f'{path} must be a number, got {value!r}')
    for name, box in (document.get('workspace') or {}).items():
        if not isinstance(box, list) or len(box) != 2:
            raise ValueError(f'workspace.{name} must be [lowest, highest], got {box!r}')
