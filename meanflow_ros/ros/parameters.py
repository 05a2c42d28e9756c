"""The node's parameters: declared once, typed, ranged, described; read into PolicyParameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rcl_interfaces.msg import (
    FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult)
from rclpy.exceptions import (
    InvalidParameterTypeException, InvalidParameterValueException, ParameterException)

from meanflow_ros.core.policy import MAX_STEPS
from meanflow_ros.core.schema import known_or_hint
from meanflow_ros.ros.streams import read_ages

LIVE, AT_CONFIGURE, AT_START = 'live', 'configure', 'start'
DEVICE_PATTERN = r'auto|cpu|cuda(:\d+)?'
_OWNED_BY_RCLPY = ('use_sim_time', 'qos_overrides.', 'start_type_description_service')


@dataclass(frozen=True)
class Declaration:
    """One parameter. `takes_effect`: live, at the next configure, or at the node's start only."""

    name: str
    default: object
    description: str
    takes_effect: str = AT_CONFIGURE
    minimum: float | None = None
    maximum: float | None = None
    pattern: str | None = None
    check: Callable[[str], object] | None = None    # raises ValueError

    def problem(self, value) -> str | None:
        """Return what is wrong with a value of the right type, or None."""
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            return f'{self.name} must match {self.pattern!r}, got {value!r}'
        if self.minimum is not None and not self.minimum <= value <= self.maximum:
            return f'{self.name} must be {self.minimum:g} to {self.maximum:g}, got {value!r}'
        try:
            if self.check is not None:
                self.check(value)
        except ValueError as error:
            return str(error)
        return None

    def descriptor(self) -> ParameterDescriptor:
        """Return what `ros2 param describe` shows."""
        descriptor = ParameterDescriptor(description=self.description,
                                         read_only=self.takes_effect == AT_START)
        if self.minimum is not None and isinstance(self.default, float):
            descriptor.floating_point_range = [
                FloatingPointRange(from_value=self.minimum, to_value=self.maximum)]
        elif self.minimum is not None:
            descriptor.integer_range = [
                IntegerRange(from_value=int(self.minimum), to_value=int(self.maximum), step=1)]
        if self.pattern is not None:
            descriptor.additional_constraints = f'must match the pattern {self.pattern}'
        return descriptor


DECLARATIONS = (
    Declaration('checkpoint', '', 'Checkpoint directory; empty for the one that ships.'),
    Declaration('robot', '', 'Refuse a checkpoint of any other robot; empty accepts all.'),
    Declaration('device', 'auto', 'Where the network runs: auto, cpu, cuda or cuda:N.',
                pattern=DEVICE_PATTERN),
    Declaration('dtype', 'auto', 'Arithmetic of the network: auto, float32 or bfloat16.',
                pattern='auto|float32|bfloat16'),
    Declaration('threads', 0, 'CPU threads of the network; 0 leaves the choice to PyTorch.',
                minimum=0, maximum=256),
    Declaration('compile', False, "Compile the network's blocks, which can take minutes the first "
                'time; the result is kept for the user.'),
    Declaration('fp8', False, "Keep the encoder's weights in fp8 where the GPU multiplies that: "
                'half their memory, chunks a little off; in bfloat16 only.'),
    Declaration('instruction', '', 'Instruction until one arrives on the topic; empty for none.'),
    Declaration('image_transport', 'raw', 'Subscribe to image_raw, or to image_raw/compressed.',
                pattern='raw|compressed'),
    Declaration('max_age_s', 0.5, 'Oldest picture or joint state that is used, seconds.',
                minimum=0.001, maximum=60.0),
    Declaration('max_ages_s', '', 'Streams with a max_age_s of their own: '
                'camera/wrist:=0.2 joint_states:=0.05 for example.', check=read_ages),
    Declaration('max_skew_s', 0.06, 'Largest difference of the stamps in one observation, '
                'seconds.', minimum=0.0001, maximum=60.0),
    Declaration('min_rate_hz', 0.0, 'Fewest pictures per second of each camera; 0 for none.',
                minimum=0.0, maximum=1000.0),
    Declaration('frozen_pictures', 10, 'So many identical pictures one after the other are a '
                'camera that hangs; 0 for never, as a simulated camera needs.',
                minimum=0, maximum=10000),
    Declaration('picture_size', 'aspect', "What of the checkpoint's picture size must fit: exact, "
                'aspect (width to height), or any for nothing.', pattern='exact|aspect|any'),
    Declaration('motion', '', 'File that says how the robot is driven: outputs, limits, safe '
                'action; empty for chunks alone.'),
    Declaration('execution', 'receding_horizon', 'How chunks follow each other: open_loop, '
                'receding_horizon[:STEPS], ensemble[:DECAY[:newest_first]] or real_time:STEPS.',
                LIVE, pattern=r'open_loop|receding_horizon(:\d{1,4})?|real_time:\d{1,4}|'
                r'ensemble(:\d{1,4}(\.\d{1,9})?(:newest_first)?)?'),
    Declaration('sampler_steps', 0, 'Network evaluations per chunk (NFE); 0 takes the '
                "checkpoint's own.", LIVE, minimum=0, maximum=MAX_STEPS),
    Declaration('seed', 0, 'Seed of the sampler noise.', LIVE, minimum=0, maximum=2**31 - 1),
    Declaration('autostart', False, 'Configure and activate without a lifecycle manager.',
                AT_START),
)


@dataclass(frozen=True, kw_only=True)
class PolicyParameters:
    """The values of DECLARATIONS at one time."""

    checkpoint: str
    robot: str
    device: str
    dtype: str
    threads: int
    compile: bool
    fp8: bool
    instruction: str
    image_transport: str
    max_age_s: float
    max_ages_s: str
    max_skew_s: float
    min_rate_hz: float
    frozen_pictures: int
    picture_size: str
    motion: str
    execution: str
    sampler_steps: int
    seed: int
    autostart: bool


def declare(node, *, can_configure) -> list[str]:
    """Declare every parameter on a node and check later changes; return what is wrong now.

    A bad value or an unknown name in the given overrides leaves the default in place and is
    reported, so that the node can refuse to configure instead of dying. `can_configure()` says
    whether parameters that take effect at configure may be changed now.
    """
    problems = []
    for declaration in DECLARATIONS:
        arguments = (declaration.name, declaration.default, declaration.descriptor())
        try:
            value = node.declare_parameter(*arguments).value
            problem = declaration.problem(value)
        except (InvalidParameterTypeException, InvalidParameterValueException,
                ParameterException) as error:
            node.declare_parameter(*arguments, ignore_override=True)
            given = node._parameter_overrides[declaration.name].value
            problem = declaration.problem(given) if type(given) is type(
                declaration.default) else None
            problem = problem or (f'{declaration.name} must be '
                                  f'{type(declaration.default).__name__}, got {given!r}: {error}')
        if problem:
            problems.append(problem)
    known = [declaration.name for declaration in DECLARATIONS]
    for name in node._parameter_overrides:
        if name not in known and not name.startswith(_OWNED_BY_RCLPY):
            problems.append(f'unknown parameter {name!r} ({known_or_hint(name, known)})')

    declarations = {declaration.name: declaration for declaration in DECLARATIONS}

    def check(parameters) -> SetParametersResult:
        for parameter in parameters:
            declaration = declarations.get(parameter.name)
            if declaration is None:
                continue
            problem = declaration.problem(parameter.value)
            if problem is None and declaration.takes_effect == AT_CONFIGURE \
                    and not can_configure():
                problem = (f'{parameter.name} takes effect at configure: deactivate and clean '
                           f'up the node first')
            if problem is not None:
                return SetParametersResult(successful=False, reason=problem)
        return SetParametersResult(successful=True)

    node.add_on_set_parameters_callback(check)
    return problems


def read(node) -> PolicyParameters:
    """Return the present values."""
    return PolicyParameters(**{declaration.name: node.get_parameter(declaration.name).value
                               for declaration in DECLARATIONS})
