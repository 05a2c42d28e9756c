"""The guard: the only maker of SafeChunk and SafeCommand, so all that moves a robot passes here.

`check` looks at a whole chunk before any of it is used, `command` at every single command of an
output that streams. What is wrong has a kind, and each kind a remedy: the chunk is rejected,
clamped, or slowed down in time with its path kept. Nothing here depends on a clock or on chance,
so a replay gives the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from meanflow_ros.core.contract import (
    _GUARD_SEAL, ActionChunk, RobotSpec, SafeChunk, SafeCommand, TimedActions)
from meanflow_ros.core.limiter import Limiter
from meanflow_ros.core.limits import RATES, Limits
from meanflow_ros.core.timeline import steps_still_due

LIMIT_TOLERANCE = 1e-6  # share of a dimension's range, or of a rate's limit: for rounding alone
REJECT, CLAMP, SLOW = 'reject', 'clamp', 'slow'
REMEDIES = {'position': (REJECT, CLAMP), 'workspace': (REJECT, CLAMP),
            'velocity': (REJECT, CLAMP, SLOW), 'acceleration': (REJECT, CLAMP, SLOW),
            'jerk': (REJECT, CLAMP, SLOW), 'first_step': (REJECT, CLAMP)}
_GAP_PERIODS = 5   # control periods without a command after which the robot counts as standing


class Rejected(ValueError):
    """A chunk that the guard refuses; `kind` is one of a few words, the message says which."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What the guard checks beside shape, finiteness and lateness, which always reject.

    limits: of every dimension; None takes those of the checkpoint. workspace: name -> (lowest,
    highest), a box inside the position limits. first_step: (A,) largest distance of the first
    step from where the robot is; None checks nothing. state_range: lowest and highest (P,) state
    of the training data; a state further outside than `state_margin` half ranges rejects, inf
    checks nothing. remedies: kind -> one of REMEDIES[kind], reject by default. max_slowdown: a
    chunk that would have to be slowed down more is rejected.
    """

    limits: Limits | None = None
    workspace: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    first_step: np.ndarray | None = None
    state_range: tuple[np.ndarray, np.ndarray] | None = None
    state_margin: float = np.inf
    remedies: Mapping[str, str] = field(default_factory=dict)
    max_slowdown: float = 4.0

    def __post_init__(self):
        for kind, remedy in self.remedies.items():
            if kind not in REMEDIES:
                raise ValueError(f'there is no remedy for {kind!r}, only for {list(REMEDIES)}')
            if remedy not in REMEDIES[kind]:
                raise ValueError(f'the remedy for {kind!r} must be one of {REMEDIES[kind]}, '
                                 f'got {remedy!r}')
        if not 1 <= self.max_slowdown < np.inf:
            raise ValueError(f'max_slowdown must be at least 1, got {self.max_slowdown}')
        if not self.state_margin >= 0:
            raise ValueError(f'state_margin must be at least 0, got {self.state_margin}')


class Guard:
    """Checks chunks and commands for one robot; see the module's first lines.

    interventions: how often each kind was found, `<kind>`, `<kind> clamped`, `<kind> slowed`.
    """

    def __init__(self, robot: RobotSpec, settings: GuardSettings | None = None):
        self._robot, self._settings = robot, settings or GuardSettings()
        space = robot.action_space
        limits = self._settings.limits or Limits.of(space)
        self.limits = limits.within(Limits.of(space))
        box = self.limits
        for name, (low, high) in self._settings.workspace.items():
            box = box.tightened('lower', {name: low}).tightened('upper', {name: high})
        self._box = box
        if self._settings.first_step is not None and (
                np.shape(self._settings.first_step) != (space.size,)
                or not (np.asarray(self._settings.first_step) > 0).all()):
            raise ValueError(f'first_step must be {space.size} numbers above 0, '
                             f'got {self._settings.first_step}')
        self.interventions: Counter[str] = Counter()
        self._limiter: Limiter | None = None
        self._commanded_ns = 0

    @property
    def rejections(self) -> Counter[str]:
        """Return how often each kind has rejected a chunk."""
        return Counter({kind: count for kind, count in self.interventions.items()
                        if not kind.endswith(('clamped', 'slowed'))})

    def check(self, chunk: ActionChunk, *, now_ns: int, start: np.ndarray | None = None,
              state: np.ndarray | None = None, motion: np.ndarray | None = None,
              motion_ns: np.ndarray | None = None) -> SafeChunk:
        """Return the steps still due at `now_ns`; Rejected (counted by kind) otherwise.

        start: (A,) where the robot is, in the units of the action. state: (P,) as observed.
        motion: (3, A) position, velocity and acceleration that are commanded at motion_ns (A,), by
        default now; None where the robot stands. A first step that is clamped continues from
        there.
        """
        try:
            self._require_familiar(state)
            self._require_shape(chunk)
            timed = steps_still_due(chunk, now_ns=now_ns)
            actions = self._within_box(chunk.actions)
            if timed is None:
                late_s = (now_ns - chunk.due_ns(len(chunk.actions) - 1)) / 1e9
                raise Rejected('expired', f'every step of the chunk was due before now, the last '
                                          f'{late_s:.3f} s ago: inference is too slow or the '
                                          f'picture too old')
            if actions is not chunk.actions:
                timed = TimedActions(stamp_ns=timed.stamp_ns, due_ns=timed.due_ns,
                                     actions=actions[-len(timed.actions):])
            return self._sealed(self._steady(timed, start, now_ns, motion, motion_ns))
        except Rejected as error:
            self.interventions[error.kind] += 1
            raise

    def command(self, target: np.ndarray | None, *, now_ns: int, period_s: float,
                velocity: np.ndarray | None = None) -> SafeCommand:
        """Return the next command of a stream on the way to `target` (A,); None is a stop.

        velocity: (A,) with which the target moves on, by default as it came from the last one.

        Between the commands of a stream all limits hold, whatever the targets are: see `Limiter`.
        Call `stand` first. period_s: of the control loop; a call that comes earlier moves less,
        one that comes later does not move more, and after a gap the robot counts as standing.
        """
        if self._limiter is None:
            raise RuntimeError('stand() must say where the robot is before the first command')
        if target is not None and not (np.shape(target) == (self._robot.action_space.size,)
                                       and np.isfinite(target).all()):
            self.interventions['not_finite'] += 1
            target = None
        passed_s = (now_ns - self._commanded_ns) / 1e9 if self._commanded_ns else period_s
        if passed_s > _GAP_PERIODS * period_s:
            self._limiter.stand(np.clip(self._robot.action_space.at_rest(self._limiter.position),
                                        self._box.lower, self._box.upper))
        if passed_s > 0:
            self._limiter.step(target, min(passed_s, period_s), velocity)
            self._commanded_ns = now_ns
        return SafeCommand(values=self._limiter.position, stamp_ns=now_ns,
                           space=self._robot.action_space, seal=_GUARD_SEAL)

    def last_command(self, *, now_ns: int, period_s: float) -> SafeCommand:
        """Return a command after which none needs to come: rates are 0 at once.

        A controller that holds the last rate would go on for ever. Positions move on as far as a
        stop within their limits goes in one period.
        """
        stop = self.command(None, now_ns=now_ns, period_s=period_s)
        return SafeCommand(values=self._robot.action_space.at_rest(stop.values), stamp_ns=now_ns,
                           space=self._robot.action_space, seal=_GUARD_SEAL)

    def check_plan(self, plan: TimedActions,
                   start: tuple[int, np.ndarray, np.ndarray] | None = None) -> SafeChunk:
        """Seal what a timeline made of checked chunks, for an output that takes it whole.

        Where chunks meet, the change may be beyond a limit: it is tracked within the limits, from
        the first step on. start: the time (ns), position and velocity (A,), NaN where nothing is
        known, that the robot has before the first step: the way from there keeps the limits too.
        Only numbers inside the position limits pass; Rejected otherwise.
        """
        names = self._robot.action_space.dimensions
        slack = LIMIT_TOLERANCE * (self._box.upper - self._box.lower)
        inside = ((plan.actions >= self._box.lower - slack)
                  & (plan.actions <= self._box.upper + slack)).all(axis=0)
        if not inside.all():
            self.interventions['position'] += 1
            raise Rejected('position', f'{names[int(np.argmin(inside))]!r} leaves its limits')
        whole, velocity = plan, np.zeros(len(names))
        if start is not None:
            position = np.where(np.isnan(start[1]), plan.actions[0], start[1])
            velocity = np.nan_to_num(start[2])
            whole = _with_first(plan, start[0], position)
        excess = _excess(whole, self.limits)
        if any((excess[kind] > 1 + LIMIT_TOLERANCE).any() for kind in RATES) \
                or not self._continues(whole, velocity, start):
            self.interventions['seam clamped'] += 1
            whole = self._tracked(whole, np.clip(whole.actions[0], self._box.lower,
                                                 self._box.upper), velocity)
        return self._sealed(whole if start is None else _without_first(whole))

    def _continues(self, whole: TimedActions, velocity: np.ndarray, start) -> bool:
        """Whether the first gap of a plan begins with this velocity, but for the acceleration."""
        if start is None:
            return True
        gap_s = (whole.due_ns[1] - whole.due_ns[0]) / 1e9
        change = np.abs((whole.actions[1] - whole.actions[0]) / gap_s - velocity)
        return bool((2 * change <= self.limits.acceleration * gap_s * (1 + LIMIT_TOLERANCE)
                     + 1e-9).all())

    @property
    def commanded(self) -> np.ndarray:
        """Return the last command of the stream (A,), where it stands before the first."""
        return self._limiter.position

    def motion(self, *, now_ns: int, period_s: float) -> np.ndarray:
        """Return position, velocity and acceleration of the stream at `now_ns`, (3, A).

        It goes on from the last command as it was moving then, for one control period at most;
        after a gap it counts as standing, as in `command`.
        """
        position, velocity, acceleration = self._limiter.state
        passed_s = max(0.0, (now_ns - self._commanded_ns) / 1e9) if self._commanded_ns else 0.0
        if passed_s > _GAP_PERIODS * period_s:
            still = np.zeros(len(position))
            return np.stack([self._robot.action_space.at_rest(position), still, still])
        passed_s = min(passed_s, period_s)
        ahead = position + velocity * passed_s + acceleration * passed_s**2 / 2
        return np.stack([np.clip(ahead, self._box.lower, self._box.upper),
                         velocity + acceleration * passed_s, acceleration])

    def stand(self, position: np.ndarray) -> None:
        """Begin a stream of commands from where the robot stands, (A,) in the action's units.

        Rejected if that is no number, or outside the limits by more than a hundredth of the range.
        """
        try:
            self._limiter = Limiter(self._box, self.require_inside(position))
        except Rejected as error:
            self.interventions[error.kind] += 1
            raise
        self._commanded_ns = 0

    def require_inside(self, position: np.ndarray, which: np.ndarray | bool = True) -> np.ndarray:
        """Return where the robot stands (A,), within the limits but for a hundredth of the range.

        Rejected otherwise. which: (A,) bool, the dimensions that are looked at.
        """
        outside = which & ~self.is_inside(position)
        if outside.any():
            name = self._box.names[int(np.argmax(outside))]
            raise Rejected('first_step', f'{name!r} is at {position[np.argmax(outside)]:.6g}, '
                                         f'outside its limits: move the robot inside them first')
        return np.clip(position, self._box.lower, self._box.upper)

    def is_inside(self, position: np.ndarray) -> np.ndarray:
        """Return (A,) bool: what is within the limits but for a hundredth of the range."""
        room = 0.01 * (self._box.upper - self._box.lower)
        return ((position >= self._box.lower - room) & (position <= self._box.upper + room))

    def _sealed(self, timed: TimedActions) -> SafeChunk:
        return SafeChunk(timed=timed, space=self._robot.action_space, seal=_GUARD_SEAL)

    def _require_familiar(self, state: np.ndarray | None) -> None:
        settings = self._settings
        if state is None or settings.state_range is None or np.isinf(settings.state_margin):
            return
        low, high = settings.state_range
        beyond = np.maximum(low - state, state - high) / ((high - low) / 2)
        worst = int(np.argmax(beyond))
        if not beyond[worst] <= settings.state_margin:
            raise Rejected('unfamiliar', f'{self._robot.state_names[worst]!r} is at '
                                         f'{state[worst]:.6g}, the demonstrations were within '
                                         f'[{low[worst]:.6g}, {high[worst]:.6g}]')

    def _require_shape(self, chunk: ActionChunk) -> None:
        space = self._robot.action_space
        expected = (self._robot.horizon, space.size)
        if chunk.actions.shape != expected:
            raise Rejected('shape', f'the chunk has shape {chunk.actions.shape}, the checkpoint '
                                    f'promises {expected}')
        finite = np.isfinite(chunk.actions)
        if not finite.all():
            step, dimension = np.argwhere(~finite)[0]
            raise Rejected('not_finite', f'{space.dimensions[dimension]!r} is not finite at '
                                         f'step {step}')

    def _within_box(self, actions: np.ndarray) -> np.ndarray:
        """Return the actions, inside the position limits and the workspace."""
        space = self._robot.action_space
        for kind, limits in (('position', self.limits), ('workspace', self._box)):
            slack = LIMIT_TOLERANCE * (limits.upper - limits.lower)
            with np.errstate(over='ignore'):
                outside = (actions < limits.lower - slack) | (actions > limits.upper + slack)
            if not outside.any():
                continue
            if self._remedy(kind) == REJECT:
                step, dimension = np.argwhere(outside)[0]
                raise Rejected(kind, f'{space.dimensions[dimension]!r} is '
                                     f'{actions[step, dimension]:.6g} {space.units[dimension]} at '
                                     f'step {step}, outside [{limits.lower[dimension]:g}, '
                                     f'{limits.upper[dimension]:g}]')
            self.interventions[f'{kind} clamped'] += 1
            actions = np.clip(actions, limits.lower, limits.upper)
        return actions

    def _steady(self, timed: TimedActions, start: np.ndarray | None, now_ns: int,
                motion: np.ndarray | None, motion_ns: np.ndarray | None) -> TimedActions:
        """Return the steps with a first one near the robot, and within the limits of change."""
        names, tolerance = self._robot.action_space.dimensions, self._settings.first_step
        if start is not None and tolerance is not None:
            far = ~(np.abs(timed.actions[0] - start) <= tolerance)
            if far.any():
                worst = int(np.argmax(far))
                if self._remedy('first_step') == REJECT or not np.isfinite(start).all():
                    raise Rejected('first_step', f'{names[worst]!r} would begin at '
                                                 f'{timed.actions[0, worst]:.6g}, the robot is at '
                                                 f'{start[worst]:.6g}, at most '
                                                 f'{tolerance[worst]:g} apart is allowed')
                self.interventions['first_step clamped'] += 1
                begin = self.require_inside(start if motion is None else motion[0])
                if motion is not None and not np.isfinite(motion).all():
                    raise Rejected('not_finite', 'the motion that is under way is not finite')
                timed = (self._tracked(timed, begin) if motion is None else
                         _without_first(self.follow(timed, now_ns=now_ns, motion=motion,
                                                    motion_ns=motion_ns)))
        excess = _excess(timed, self.limits)
        for kind in RATES:
            worst = int(np.argmax(excess[kind]))
            if excess[kind][worst] <= 1 + LIMIT_TOLERANCE:
                continue
            if self._remedy(kind) == REJECT:
                limit = getattr(self.limits, kind)[worst]
                raise Rejected(kind, f'{names[worst]!r} would reach {excess[kind][worst]:.3g} x '
                                     f'its {kind} limit of {limit:g}')
            if self._remedy(kind) == CLAMP:
                self.interventions[f'{kind} clamped'] += 1
                return self._tracked(timed, np.clip(timed.actions[0], self._box.lower,
                                                    self._box.upper))
            self.interventions[f'{kind} slowed'] += 1
            timed = self._slowed(timed)
            excess = _excess(timed, self.limits)
        return timed

    def _remedy(self, kind: str) -> str:
        return self._settings.remedies.get(kind, REJECT)

    def follow(self, timed: TimedActions, *, now_ns: int, motion: np.ndarray,
               motion_ns: np.ndarray | None = None) -> TimedActions:
        """Return what a robot does within the limits that follows the steps from now on.

        It begins with where it is. motion: (3, A), what it does at motion_ns (A,), by default now:
        until then it has that velocity.
        """
        position = np.clip(motion[0], self._box.lower, self._box.upper)
        begin_ns = min(now_ns, int(timed.due_ns[0]) - 1)
        whole = _with_first(timed, begin_ns, position)
        path = self._tracked(whole, position, *motion[1:])
        if motion_ns is None or (motion_ns <= now_ns).all():
            return path
        actions = path.actions.copy()
        for at_ns in np.unique(motion_ns[motion_ns > now_ns]):
            which = motion_ns == at_ns
            since_s = (whole.due_ns - at_ns)[:, None] / 1e9
            actions[:, which] = np.clip(position + since_s * motion[1], self._box.lower,
                                        self._box.upper)[:, which]
            ahead = timed.after(int(at_ns) + 1)
            if ahead is not None:
                later = self._tracked(_with_first(ahead, int(at_ns), position), position,
                                      *motion[1:])
                actions[-len(ahead.due_ns):, which] = later.actions[1:, which]
        return TimedActions(stamp_ns=path.stamp_ns, due_ns=path.due_ns, actions=actions)

    def _tracked(self, timed: TimedActions, start: np.ndarray, velocity: np.ndarray | None = None,
                 acceleration: np.ndarray | None = None) -> TimedActions:
        """Return what a robot does that follows the steps from `start` within limits.

        velocity, acceleration: (A,) that it has there, 0 by default.
        """
        limiter = Limiter(self._box, start)
        if velocity is not None:
            limiter.move(start, velocity, acceleration)
        actions = [start, *(limiter.step(action, gap_ns / 1e9) for action, gap_ns
                            in zip(timed.actions[1:], np.diff(timed.due_ns)))]
        return TimedActions(stamp_ns=timed.stamp_ns, due_ns=timed.due_ns,
                            actions=np.array(actions))

    def _slowed(self, timed: TimedActions) -> TimedActions:
        """Return the same path in more time: due times stretch from the first on.

        Rates become smaller by the factor, so that what they add up to is the same.
        """
        rate = self._robot.action_space.is_rate
        factor = 1.0
        for order, kind in enumerate(RATES, 1):
            excess = _excess(timed, self.limits)[kind]
            factor = max(factor, *(excess ** (1 / np.where(rate, order + 1, order))))
        factor *= 1 + LIMIT_TOLERANCE
        if factor > self._settings.max_slowdown:
            raise Rejected('velocity', f'the chunk would have to be {factor:.3g} x slower to keep '
                                       f'the limits, at most {self._settings.max_slowdown:g} x '
                                       f'is allowed')
        since = (timed.due_ns - timed.due_ns[0]) * factor
        actions = np.where(rate, timed.actions / factor, timed.actions)
        beyond = rate & ((actions < self._box.lower) & (timed.actions >= self._box.lower)
                         | (actions > self._box.upper)
                         & (timed.actions <= self._box.upper)).any(axis=0)
        if beyond.any():
            name = self._box.names[int(np.argmax(beyond))]
            raise Rejected('position', f'{name!r} would leave its limits, made {factor:.3g} x '
                                       f'slower: they leave out 0')
        return TimedActions(stamp_ns=timed.stamp_ns,
                            due_ns=timed.due_ns[0] + np.ceil(since).astype(np.int64),
                            actions=actions)


def _with_first(timed: TimedActions, due_ns: int, action: np.ndarray) -> TimedActions:
    return TimedActions(stamp_ns=timed.stamp_ns, due_ns=np.append(due_ns, timed.due_ns),
                        actions=np.vstack([action, timed.actions]))


def _without_first(timed: TimedActions) -> TimedActions:
    return TimedActions(stamp_ns=timed.stamp_ns, due_ns=timed.due_ns[1:],
                        actions=timed.actions[1:])


def _excess(timed: TimedActions, limits: Limits) -> dict[str, np.ndarray]:
    """Return, for each rate of change, the largest finite difference over its limit, (A,)."""
    values, times = timed.actions, (timed.due_ns - timed.due_ns[0]) / 1e9
    result = {}
    with np.errstate(over='ignore', invalid='ignore'):
        for kind in RATES:
            if len(values) > 1:
                values = np.diff(values, axis=0) / np.diff(times)[:, None]
                times = (times[1:] + times[:-1]) / 2
                share = np.abs(values).max(axis=0) / getattr(limits, kind)
                result[kind] = np.where(np.isnan(share), np.inf, share)
            else:
                result[kind] = np.zeros(values.shape[1])
    return result
