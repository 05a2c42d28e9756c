"""The types that flow: RobotSpec, Observation, ActionChunk, SafeChunk, SafeCommand.

Each is frozen and validated once, when it is made; after that it is trusted. Arrays are copied
and made read-only. Time is ROS time in nanoseconds; step i of a chunk is due at
`stamp_ns + (i + first_step) * period_s` (the time rule).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass

import numpy as np

MAX_INSTRUCTION_BYTES = 4096
MAX_CAMERAS = 4
CAMERA_NAME = r'[A-Za-z]\w{0,63}'
NANOSECONDS = 1_000_000_000
MAX_TIME_NS = 2**62   # stamps and due times stay below it, so that their differences fit int64


def frozen_array(values, dtype, ndim: int, name: str) -> np.ndarray:
    """Copy `values` into a read-only array; ValueError if it has not `ndim` dimensions."""
    array = np.array(values, dtype=dtype)
    if array.ndim != ndim:
        raise ValueError(f'{name} must have {ndim} dimension(s), got shape {array.shape}')
    array.flags.writeable = False
    return array


def due_times_ns(stamp_ns: int, steps: int, *, period_s: float, first_step: int) -> np.ndarray:
    """Return the ROS times (steps,) int64 at which steps are due, by the time rule.

    ValueError where a time is not below 2**62 ns or steps fall on one nanosecond.
    """
    last_s = (steps + first_step) * period_s
    if not (abs(stamp_ns) < MAX_TIME_NS and last_s * NANOSECONDS < MAX_TIME_NS):
        raise ValueError(f'due times must stay below 2**62 ns, got the stamp {stamp_ns} ns and '
                         f'{steps} steps of {period_s} s after {first_step}')
    due_ns = stamp_ns + np.rint((np.arange(steps) + first_step) * period_s * NANOSECONDS).astype(
        np.int64)
    if (np.diff(due_ns) < 1).any():
        raise ValueError(f'steps of {period_s} s are not a nanosecond apart')
    return due_ns


def _require_unique_names(names: tuple[str, ...], what: str) -> None:
    if any(not isinstance(n, str) or not n for n in names):
        raise ValueError(f'{what} must be non-empty strings, got {list(names)}')
    if len(set(names)) != len(names):
        raise ValueError(f'{what} must be unique, got {list(names)}')


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """What the numbers of an action mean: one name, unit and range per dimension.

    lower, upper: (A,) float64, finite, lower < upper, in `units`.
    max_velocity, max_acceleration, max_jerk: (A,) how fast the commanded value may change, in
    units per s, s^2 and s^3; .inf or None where nothing is known.
    rates: the dimensions whose value is itself a rate (a velocity, or a step's increment): they
    stand still at 0, all others at their last value. gripper: the dimensions that are grippers.
    """

    name: str
    dimensions: tuple[str, ...]
    units: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    max_velocity: np.ndarray | None = None
    max_acceleration: np.ndarray | None = None
    max_jerk: np.ndarray | None = None
    rates: tuple[str, ...] = ()
    gripper: tuple[str, ...] = ()

    def __post_init__(self):
        _require_unique_names(self.dimensions, f'dimensions of action space {self.name!r}')
        size = len(self.dimensions)
        if size < 1:
            raise ValueError(f'action space {self.name!r} needs at least one dimension')
        if len(self.units) != size:
            raise ValueError(f'action space {self.name!r} has {size} dimensions '
                             f'but {len(self.units)} units')
        for bound in ('lower', 'upper'):
            values = frozen_array(getattr(self, bound), np.float64, 1, f'{bound} limits')
            if values.shape != (size,) or not np.isfinite(values).all():
                raise ValueError(f'{bound} limits of action space {self.name!r} must be '
                                 f'{size} finite numbers, got {values}')
            object.__setattr__(self, bound, values)
        for name, low, high in zip(self.dimensions, self.lower, self.upper):
            if not 0 < float(high) - float(low) < np.inf:
                raise ValueError(f'limits of {name!r} must have lower < upper and a finite '
                                 f'range, got [{low}, {high}]')
        for bound in ('max_velocity', 'max_acceleration', 'max_jerk'):
            if getattr(self, bound) is not None:
                values = frozen_array(getattr(self, bound), np.float64, 1, bound)
                if values.shape != (size,) or not (values > 0).all():
                    raise ValueError(f'{bound} of action space {self.name!r} must be {size} '
                                     f'numbers above 0 (.inf for no limit), got {values}')
                object.__setattr__(self, bound, values)
        for role in ('rates', 'gripper'):
            names = tuple(getattr(self, role))
            _require_unique_names(names, f'{role} of action space {self.name!r}')
            unknown = [name for name in names if name not in self.dimensions]
            if unknown:
                raise ValueError(f'{role} names {unknown[0]!r}, which is no dimension of action '
                                 f'space {self.name!r}: {list(self.dimensions)}')

    @property
    def size(self) -> int:
        """Return A, the number of action dimensions."""
        return len(self.dimensions)

    @property
    def is_rate(self) -> np.ndarray:
        """Return (A,) bool: which dimensions are rates."""
        return np.isin(self.dimensions, self.rates)

    def at_rest(self, last: np.ndarray) -> np.ndarray:
        """Return the command (A,) that stands still after `last`: rates 0, the rest as it is."""
        return np.where(self.is_rate, 0.0, last)


@dataclass(frozen=True, kw_only=True)
class CameraSpec:
    """A camera that the policy looks through; width and height in pixels, as in training."""

    name: str
    width: int
    height: int

    def __post_init__(self):
        if self.width < 1 or self.height < 1:
            raise ValueError(f'camera {self.name!r} must be at least 1x1 pixels, '
                             f'got {self.width}x{self.height}')


@dataclass(frozen=True, kw_only=True)
class RobotSpec:
    """What a policy needs from a robot, and what it commands.

    cameras: 1 to 4, in the order in which the encoder sees them.
    state_names: joint names of the proprioception, in order; empty means none is used.
    horizon: T, steps of a chunk. period_s: seconds between steps, > 0.
    first_step: k of the time rule, 0 if the recorded action of an observation is due at its stamp.
    """

    robot: str
    cameras: tuple[CameraSpec, ...]
    state_names: tuple[str, ...]
    action_space: ActionSpace
    horizon: int
    period_s: float
    first_step: int = 0

    def __post_init__(self):
        _require_unique_names(self.camera_names, 'cameras')
        if not 1 <= len(self.cameras) <= MAX_CAMERAS:
            raise ValueError(f'cameras must be 1 to {MAX_CAMERAS}, got {len(self.cameras)}')
        for name in self.camera_names:
            if not re.fullmatch(CAMERA_NAME, name, re.ASCII):
                raise ValueError(f'{name[:80]!r} is no name for a camera: it becomes part of '
                                 f'topics and of files, and must match {CAMERA_NAME}')
        _require_unique_names(self.state_names, 'state_names')
        if self.horizon < 1:
            raise ValueError(f'horizon must be at least 1, got {self.horizon}')
        if not (np.isfinite(self.period_s) and self.period_s > 0):
            raise ValueError(f'period_s must be finite and above 0, got {self.period_s}')
        if self.first_step < 0:
            raise ValueError(f'first_step must be at least 0, got {self.first_step}')

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Return the camera names in the order in which the encoder sees them."""
        return tuple(camera.name for camera in self.cameras)

    def due_ns(self, stamp_ns: int) -> np.ndarray:
        """Return when the steps of a chunk that answers an observation are due, (T,) int64."""
        return due_times_ns(stamp_ns, self.horizon, period_s=self.period_s,
                            first_step=self.first_step)


def clean_instruction(text: str) -> str:
    """Return the instruction without surrounding space.

    ValueError if it is empty, longer than 4096 bytes, or not valid UTF-8 text.
    """
    try:
        size = len(text.encode('utf-8'))
    except UnicodeEncodeError as error:
        raise ValueError(f'instruction is not valid UTF-8: {error.reason}') from None
    if size > MAX_INSTRUCTION_BYTES:
        raise ValueError(f'instruction must be at most {MAX_INSTRUCTION_BYTES} bytes, got {size}')
    text = text.strip()
    if not text:
        raise ValueError('instruction is empty')
    return text


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the robot saw, felt and was told at one time.

    stamp_ns: ROS time of the oldest camera picture used (t_obs).
    images: camera name -> (H, W, 3) uint8 RGB. state: (P,) float64 finite, or None.
    """

    stamp_ns: int
    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray | None = None

    def __post_init__(self):
        for name, image in self.images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f'image of camera {name!r} must be (H, W, 3) uint8, '
                                 f'got {image.shape} {image.dtype}')
            if image.size == 0:
                raise ValueError(f'image of camera {name!r} is empty: {image.shape}')
        object.__setattr__(self, 'instruction', clean_instruction(self.instruction))
        if self.state is not None:
            state = frozen_array(self.state, np.float64, 1, 'state')
            if not np.isfinite(state).all():
                raise ValueError(f'state must be finite, got {state}')
            object.__setattr__(self, 'state', state)


@dataclass(frozen=True, kw_only=True)
class ActionChunk:
    """What a policy proposes: T actions in ActionSpace units and order, not yet checked.

    actions: (T, A) float64. stamp_ns: t_obs of the observation it answers.
    """

    actions: np.ndarray
    stamp_ns: int
    period_s: float
    first_step: int = 0

    def __post_init__(self):
        object.__setattr__(self, 'actions', frozen_array(self.actions, np.float64, 2, 'actions'))
        if not (np.isfinite(self.period_s) and self.period_s > 0):
            raise ValueError(f'period_s must be finite and above 0, got {self.period_s}')

    def due_ns(self, step: int) -> int:
        """ROS time at which `step` (0 .. T-1) is due."""
        return self.stamp_ns + round((step + self.first_step) * self.period_s * NANOSECONDS)

    def timed(self) -> 'TimedActions':
        """Return the steps with their due times; ValueError for times that cannot be."""
        return TimedActions(stamp_ns=self.stamp_ns, actions=self.actions, due_ns=due_times_ns(
            self.stamp_ns, len(self.actions), period_s=self.period_s, first_step=self.first_step))


@dataclass(frozen=True, kw_only=True)
class TimedActions:
    """Actions (N, A) with the ROS time at which each is due, strictly increasing (N,) int64.

    from_ns: the time from which these steps replace what was to be done before them: the due time
    of the first one, unless steps that were slowed down are due later than was meant.
    """

    stamp_ns: int
    due_ns: np.ndarray
    actions: np.ndarray
    from_ns: int | None = None

    def __post_init__(self):
        object.__setattr__(self, 'actions', frozen_array(self.actions, np.float64, 2, 'actions'))
        object.__setattr__(self, 'due_ns', frozen_array(self.due_ns, np.int64, 1, 'due_ns'))
        if len(self.due_ns) != len(self.actions) or len(self.due_ns) == 0:
            raise ValueError(f'{len(self.actions)} actions need as many due times, at least 1, '
                             f'got {len(self.due_ns)}')
        if (np.diff(self.due_ns) <= 0).any():
            raise ValueError('due times must increase from step to step')
        if self.from_ns is None:
            object.__setattr__(self, 'from_ns', int(self.due_ns[0]))

    def after(self, time_ns: int) -> 'TimedActions | None':
        """Return the steps due at `time_ns` or later; None when there is none."""
        first = int(np.searchsorted(self.due_ns, time_ns))
        if first == 0:
            return self
        if first == len(self.due_ns):
            return None
        return TimedActions(stamp_ns=self.stamp_ns, due_ns=self.due_ns[first:],
                            actions=self.actions[first:])


_GUARD_SEAL = object()


def _require_seal(seal) -> None:
    if seal is not _GUARD_SEAL:
        raise TypeError('only the guard makes a SafeChunk or a SafeCommand')


@dataclass(frozen=True, kw_only=True)
class SafeChunk:
    """The steps of a chunk that the guard has let pass; only this becomes a command.

    Only `core/guard.py` may make one: any other caller gets a TypeError. The seal is not kept, so
    an existing SafeChunk does not help to make another.
    """

    timed: TimedActions
    space: ActionSpace
    seal: InitVar[object] = None

    def __post_init__(self, seal):
        _require_seal(seal)


@dataclass(frozen=True, kw_only=True)
class SafeCommand:
    """One command (A,) that the guard has let pass, for outputs that stream; as SafeChunk."""

    values: np.ndarray
    stamp_ns: int
    space: ActionSpace
    seal: InitVar[object] = None

    def __post_init__(self, seal):
        _require_seal(seal)
        object.__setattr__(self, 'values', frozen_array(self.values, np.float64, 1, 'command'))
