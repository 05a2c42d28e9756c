"""From the policy's chunks to what leaves the node: guard, timeline, outputs, and the safe stop.

No chunk, no motion: nothing is sent before the first one, and when none comes for `deadline_s`,
the words change, or somebody says stop, the robot does the safe action and then rests. One lock
outside; nothing here reads a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from meanflow_ros.core.contract import (
    NANOSECONDS, ActionChunk, RobotSpec, SafeChunk, SafeCommand, TimedActions)
from meanflow_ros.core.guard import Guard
from meanflow_ros.core.timeline import Mode, Prefix, StopAlongPath, Timeline, on_path
from meanflow_ros.ros.followed import Followed
from meanflow_ros.ros.motion_config import HOLD, NEUTRAL, MotionConfig, measured_names

NO_CHUNK, NO_SUBSCRIBER = 'no chunk', 'no subscriber'
REST_S = 1.0         # a stream goes on this long after the robot has come to rest
_SUBSCRIBERS_S = 0.1
_ASTRAY = 0.05          # share of its range by which a joint may lag, without first_step
_STANDING_PERIODS = 6   # without a command, after which a robot stands: then a stream may begin


class Motion:
    """What moves one robot; see the module's first lines.

    stopped: why the robot is stopping or stopped, None while it follows chunks or before the
    first one. stops: how often, by reason. last_command: (A,) of a stream, None before the first;
    where nothing is measured a new stream begins there. unheard: topics that nobody subscribes to.
    compares: whether joints are looked at that are not where they were sent; not so in a replay,
    whose recorded robot was sent elsewhere.
    """

    def __init__(self, robot: RobotSpec, config: MotionConfig, guard: Guard, mode: Mode,
                 outputs: Sequence = (), compares: bool = True):
        config.check(robot)
        self.robot, self.config = robot, config
        self.outputs = list(outputs)
        self.timeline = Timeline(period_ns=round(robot.period_s * NANOSECONDS), mode=mode)
        self.stopped: str | None = None
        self.stops: Counter[str] = Counter()
        self.last_command: np.ndarray | None = None
        self.unheard: list[str] = []
        self._measured = {name: robot.action_space.dimensions.index(name)
                          for name in measured_names(robot)}
        space = robot.action_space
        self._followed = Followed(self.outputs, guard, np.array([
            config.first_step.get(name, span) for name, span in zip(
                space.dimensions, _ASTRAY * (space.upper - space.lower))]), compares)
        # Of the newest chunk, or one that an open loop did not need; None: nothing to follow.
        self._accepted_ns: int | None = None
        self._target: np.ndarray | None = None    # last action that was due
        self._stop = None                         # gives the command (A,) at a time of the stop
        self._streaming = False
        self._silenced_ns: int | None = None
        self._rest_ns: int | None = None
        self._looked_ns = 0

    @property
    def guard(self) -> Guard:
        """What checks chunks and commands; another one brings other limits."""
        return self._followed.guard

    @guard.setter
    def guard(self, guard: Guard) -> None:
        self._followed.guard = guard

    @property
    def moving(self) -> bool:
        """Whether chunks are followed now."""
        return self._accepted_ns is not None

    @property
    def rests(self) -> bool:
        """Whether no stream is on its way to rest, or followed; trajectories end by themselves."""
        return not self._streaming or self._rest_ns is not None

    @property
    def streams(self) -> bool:
        """Whether `tick` must be called at the control rate."""
        return any(output.streams for output in self.outputs)

    def feel(self, state: np.ndarray) -> None:
        """Note the measured state (P,)."""
        felt = np.full(self.robot.action_space.size, np.nan)
        for name, index in self._measured.items():
            felt[index] = state[self.robot.state_names.index(name)]
        self._followed.feel(felt)

    @property
    def _felt(self) -> np.ndarray:
        return self._followed.felt

    def wants_chunk(self, now_ns: int, lead_ns: int) -> bool:
        """Whether a chunk for an observation that is there could be of use.

        An observation that an open loop does not need yet puts the deadline off: inputs live.
        lead_ns: how long inference takes.
        """
        if self.timeline.wants_chunk(now_ns, lead_ns):
            return True
        if self.moving:
            self._accepted_ns = now_ns
        return False

    def accept(self, chunk: ActionChunk, *, now_ns: int, epoch: int | None = None,
               state: np.ndarray | None = None, prefix: Prefix | None = None) -> SafeChunk | None:
        """Guard a chunk, follow it from now on and send it; None if the timeline discards it.

        It is not followed where a controller is missing. Rejected says why the guard refuses it.
        state: (P,) of the observation.
        """
        if self._is_coming_to_rest(now_ns):
            self.timeline.discarded['silenced'] += 1
            return None
        self._followed.watch(now_ns)
        self._followed.require(now_ns)
        start = self._start_of(chunk)
        safe = self.guard.check(chunk, now_ns=now_ns, state=state,
                                start=start if self._measured else None,
                                **self._under_way(start, now_ns))
        if not self._somebody_listens(now_ns):
            self._stop_for(NO_SUBSCRIBER, now_ns)
            return safe
        if not self.timeline.add(safe.timed, now_ns=now_ns, epoch=epoch, prefix=prefix):
            return None
        if self.streams and not self._streaming:
            self._begin_stream(safe)
        self._accepted_ns, self._stop, self.stopped, self._rest_ns = now_ns, None, None, None
        for output in self.outputs:
            if not output.streams:
                self._send_chunk(output, self.timeline.plan(now_ns) or safe.timed, now_ns)
        return safe

    def tick(self, now_ns: int) -> None:
        """Watch the deadline and the subscribers, and send the next command of every stream."""
        due = None
        self._followed.watch(now_ns)
        if self._accepted_ns is not None:
            late_s = (now_ns - self._accepted_ns) / NANOSECONDS
            if late_s > self.config.deadline_s:
                self._stop_for(NO_CHUNK, now_ns)
            elif not self._somebody_listens(now_ns):
                self._stop_for(NO_SUBSCRIBER, now_ns)
            else:
                due = self.timeline.at(now_ns)
        if self._streaming:
            self._send(due, now_ns)

    def halt(self, reason: str, now_ns: int) -> None:
        """Do the safe action and forget every chunk, those that are being inferred too."""
        self._stop_for(reason, now_ns)
        self.timeline.begin_epoch(reason)

    def _stop_for(self, reason: str, now_ns: int) -> None:
        followed = self.moving
        if followed or self.stopped != reason:
            self.stops[reason] += 1
        self.stopped, self._accepted_ns = reason, None
        if not followed:
            return
        path = self.timeline.plan(now_ns)
        self.timeline.clear()
        if path is not None and path.due_ns[0] - now_ns > self.config.deadline_s * NANOSECONDS:
            path = None      # the clock has jumped: that is not where the robot is
        if path is None and not self._streaming:
            return           # the controller has come to the end of its last trajectory
        if path is not None:     # as it is executed, which may lag far behind
            motion = self._under_way(np.where(np.isnan(self._felt), path.actions[0], self._felt),
                                     now_ns, stopping=True)
            path = self.guard.follow(path, now_ns=now_ns, **motion) if motion else path
        self._stop = self._safe_action(path, now_ns)
        for output in self.outputs:
            # Beyond its last trajectory a controller rests, where one is known.
            if output.streams or path is None and output.set_point(now_ns) is not None:
                continue
            if reason != NO_CHUNK or not self._followed.is_unsure(output, now_ns):
                self._send_stop(output, path, now_ns)
        self._forget_unheard()

    def clock_jumped(self, now_ns: int) -> None:
        """Silence; what lies beyond the last step has not been reached by a controller's clock."""
        beyond = self.timeline.plan(now_ns) is None
        self.silence('clock jump', now_ns)
        for output in self.outputs:
            if beyond and not output.streams:
                output.forget()

    def silence(self, reason: str, now_ns: int) -> None:
        """Halt, and send no more commands of a stream after one that stands still: rates are 0.

        No chunk is accepted before the robot has had time to come to rest, after the last silence
        of several.
        """
        self.halt(reason, now_ns)
        if self._streaming:
            self._stop = _constant(self._still())
            self._publish(self.guard.last_command(now_ns=now_ns, period_s=self.config.period_s))
            self._streaming = False
        self._silenced_ns = now_ns

    def hold(self) -> None:
        """Stop a stream within the limits, wherever the safe action has led it."""
        if self._streaming:
            self._stop = _constant(self.robot.action_space.at_rest(self.guard.commanded))

    def _is_coming_to_rest(self, now_ns: int) -> bool:
        """Whether the robot has just been silenced: its controllers may still move."""
        if self._silenced_ns is None:
            return False
        passed_s = (now_ns - self._silenced_ns) / NANOSECONDS
        return 0 <= passed_s < _STANDING_PERIODS * self.config.period_s

    def _start_of(self, chunk: ActionChunk) -> np.ndarray:
        """Return where the robot is, (A,).

        Where nothing is measured, where the chunk begins, or the limit beyond which it does.
        """
        if not np.isnan(self._felt).any():
            return self._felt
        first = chunk.actions[0] if chunk.actions.shape == (
            self.robot.horizon, self.robot.action_space.size) else np.full(len(self._felt), np.nan)
        limits = self.guard.limits
        return np.where(np.isnan(self._felt), np.clip(first, limits.lower, limits.upper),
                        self._felt)

    def _under_way(self, start: np.ndarray, now_ns: int, *, stopping: bool = False) -> dict:
        """Return position, velocity and acceleration that are commanded, (3, A), and when, (A,).

        That is now, and for a trajectory where the next one begins. Nothing where nothing is
        commanded. An output that does not move yet stands at `start` (A,). stopping: a joint that
        is measured too far from where it was sent does not stand there.
        """
        motion, motion_ns = np.zeros((3, len(start))), np.full(len(start), now_ns)
        motion[0], known = start, False
        for output in self.outputs:
            columns = output.columns
            if output.streams and self._streaming:
                sent = self.guard.motion(now_ns=now_ns, period_s=self.config.period_s)[:, columns]
                astray = np.abs(self._felt[columns] - sent[0]) > self._followed.tolerance(output)
                motion[:, columns] = np.where(astray & (not stopping), motion[:, columns], sent)
            elif not output.streams and output.set_point(now_ns) is not None:
                begins = self._followed.start(output, now_ns, stopping=stopping)
                motion[:2, columns], motion_ns[columns] = begins.begin, begins.begin_ns
            else:
                continue
            known = True
        return {'motion': motion, 'motion_ns': motion_ns} if known else {}

    def _send_chunk(self, output, timed: TimedActions, now_ns: int, *,
                    stopping: bool = False) -> None:
        """Send what lies ahead, on a way within the limits from where the controller will be.

        A step nearer to that than half a period is left out: the way to it would be steep for
        nothing. If none is left, the controller goes on as it was told.
        """
        start = self._followed.start(output, now_ns, stopping=stopping)
        first_ns = now_ns + output.lead_ns
        if start is not None:
            first_ns = max(first_ns, start.begin_ns + self.timeline.period_ns // 2)
        plan = timed.after(first_ns)
        if plan is None:
            return
        begins = None
        if start is not None:
            whole = np.full((2, self.robot.action_space.size), np.nan)
            whole[:, output.columns] = start.begin
            begins = start.begin_ns, *whole
        safe = self.guard.check_plan(plan, start=begins)
        self._followed.note_start(output, now_ns)
        output.send_chunk(safe, now_ns, self.guard.limits.velocity, start)

    def _begin_stream(self, safe: SafeChunk) -> None:
        space = self.robot.action_space
        unmeasured = safe.timed.actions[0] if self.last_command is None else self.last_command
        position = np.where(np.isnan(self._felt), unmeasured, self._felt)
        self.guard.stand(np.where(space.is_rate, 0.0, position))
        self._streaming = True

    def _somebody_listens(self, now_ns: int) -> bool:
        if self.config.require_subscribers and (
                self.unheard or now_ns - self._looked_ns >= _SUBSCRIBERS_S * NANOSECONDS
                or now_ns < self._looked_ns):
            self._looked_ns = now_ns
            self.unheard = [output.config.topic for output in self.outputs
                            if not output.publisher.get_subscription_count()]
            self._forget_unheard()
        return not self.unheard

    def _forget_unheard(self) -> None:
        """Forget the trajectories of controllers that are gone: they do not follow them."""
        for output in self.outputs:
            if not output.streams and output.config.topic in self.unheard:
                output.forget()

    def _send(self, due: np.ndarray | None, now_ns: int) -> None:
        target = due if self._stop is None else self._stop(now_ns)
        if target is None:
            target = self._still()
        self._target = target
        command = self.guard.command(
            target, now_ns=now_ns, period_s=self.config.period_s,
            velocity=self.timeline.velocity(now_ns) if target is due else None)
        before = self.last_command
        self._publish(command)
        if self._stop is None or before is None or not (
                np.array_equal(command.values, target) and np.array_equal(before, target)):
            self._rest_ns = None
        elif self._rest_ns is None:
            self._rest_ns = now_ns
        elif now_ns - self._rest_ns > REST_S * NANOSECONDS:
            self._streaming = False

    def _publish(self, command: SafeCommand) -> None:
        self.last_command = command.values
        for output in self.outputs:
            if output.streams:
                output.send_command(command)

    def _still(self) -> np.ndarray:
        last = self.guard.commanded if self._target is None else self._target
        return self.robot.action_space.at_rest(last)

    def _safe_action(self, path: TimedActions | None, now_ns: int):
        """Return a function from time to the command (A,) of the safe action."""
        if self.config.safe_action == NEUTRAL:
            return _constant(self.config.neutral_command(self.robot))
        if path is None or self.config.safe_action == HOLD:
            return _constant(self._still() if path is None else
                             self.robot.action_space.at_rest(on_path(path, now_ns)))
        return StopAlongPath(path, start_ns=now_ns, stop_s=self.config.stop_s,
                             is_rate=self.robot.action_space.is_rate).at

    def _send_stop(self, output, path: TimedActions | None, now_ns: int) -> None:
        """Send the stop as a trajectory: a controller would go on to the end of the last one.

        It begins when the lead is over, until when the controller follows the last one.
        """
        begin_ns, period_ns = now_ns + output.lead_ns, self.timeline.period_ns
        stop = self._safe_action(path, begin_ns)
        count = max(2, 1 + round(self.config.stop_s * NANOSECONDS / period_ns))
        due_ns = begin_ns + period_ns * np.arange(1, 1 + count)
        plan = TimedActions(stamp_ns=now_ns, due_ns=due_ns,
                            actions=np.array([stop(int(due)) for due in due_ns]))
        self._send_chunk(output, plan, now_ns, stopping=True)


def _constant(command: np.ndarray):
    return lambda now_ns: command
