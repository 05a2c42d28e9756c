"""What is gathered of one episode while it is replayed, and the EpisodeReplay that it becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, ActionChunk, Observation, RobotSpec
from meanflow_ros.core.timeline import Prefix
from meanflow_ros.evaluation.replay.driving import Driving
from meanflow_ros.evaluation.replay.episode import (
    UNFINISHED, EpisodeReplay, Pictures)
from meanflow_ros.evaluation.replay.execution import Heard, Ready, control_ticks, execute
from meanflow_ros.training.episode import ActionStream, sample_actions

PICTURE_WIDTH, PICTURE_QUALITY = 160, 70
MOST_PICTURES = 150          # kept of one episode and camera


@dataclass
class Taken:
    """An observation that the policy has taken; `observation` is let go when it was inferred.

    epoch: see Ready.
    """

    observation: Observation | None
    stamp_ns: int
    taken_ns: int
    done_ns: int
    state: np.ndarray
    epoch: int | None = None
    chunk: ActionChunk | None = None
    prefix: Prefix | None = None
    known: np.ndarray | None = None      # (T,) which steps of the chunk were heard, all if None


@dataclass
class Gathered:
    """An episode so far. missing: (what, from, to); halts, felt, unneeded: see Heard; in ns.

    actions: the action topic, then the gripper's. unusable: why action messages were not used.
    fault: why the episode cannot be used.
    """

    bag: str
    name: str
    number: int
    start_ns: int
    actions: list[ActionStream]
    first_due_ns: int | None = None
    taken: list[Taken] = field(default_factory=list)
    instructions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    halts: list[tuple[int, str]] = field(default_factory=list)
    felt: list[tuple[int, np.ndarray]] = field(default_factory=list)
    unneeded: list[int] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    missing: list[tuple[str, int, int]] = field(default_factory=list)
    pictures: Pictures = field(default_factory=Pictures)
    picture_every: int = 1
    fault: str = ''

    def keep_pictures(self, observation: Observation) -> None:
        """Keep small pictures of every n-th observation that is taken, n growing with time."""
        row, kept = len(self.taken), self.pictures
        if row % self.picture_every:
            return
        if len(kept.rows) >= MOST_PICTURES:
            self.picture_every *= 2
            kept.rows = kept.rows[::2]
            kept.cameras = {name: jpegs[::2] for name, jpegs in kept.cameras.items()}
            if row % self.picture_every:
                return
        kept.rows.append(row)
        for name, image in observation.images.items():
            kept.sizes[name] = image.shape[1], image.shape[0]
            kept.cameras.setdefault(name, []).append(small_jpeg(image))

    def require_comparable(self, longest_pause_s: float, still_missing: str) -> None:
        """ValueError unless there are actions without long pauses, and observations."""
        bad = self.unusable.most_common(1)
        for stream, what in zip(self.actions, ('action', 'gripper')):
            if not len(stream):
                raise ValueError(f'there is no usable message on the {what} topic'
                                 + (f': {bad[0][0]}' if bad else ''))
        self.actions[0].require_steady(round(longest_pause_s * NANOSECONDS))
        if not self.taken:
            raise ValueError(f'there is no observation in it '
                             f'({still_missing or "no picture was received"})')
        if bad:
            self.notes.append(f'{sum(self.unusable.values())} action messages could not be used: '
                              f'{bad[0][0]}')

    def replayed(self, driving: Driving, probed: np.ndarray,
                 probes: dict[str, np.ndarray]) -> EpisodeReplay:
        """Execute the chunks and compare; ValueError if nothing can be compared."""
        robot = driving.robot
        stamps_ns = np.array([taken.stamp_ns for taken in self.taken], np.int64)
        reference, recorded = self._reference(stamps_ns, robot)
        for taken, own, sure in zip(self.taken, reference, recorded):
            if taken.chunk is None:      # the recording itself is the policy
                taken.chunk = ActionChunk(actions=own, stamp_ns=taken.stamp_ns,
                                          period_s=robot.period_s, first_step=robot.first_step)
            if taken.known is not None:
                sure &= taken.known
        ticks_ns = control_ticks(self.first_due_ns, self.actions[0].end_ns(), robot.period_s)
        result = execute(
            [Ready(chunk=taken.chunk, done_ns=taken.done_ns, state=taken.state, epoch=taken.epoch,
                   prefix=taken.prefix, reference=own, recorded=sure)
             for taken, own, sure in zip(self.taken, reference, recorded)],
            Heard(halts=self.halts, felt=self.felt, unneeded=self.unneeded), ticks_ns, driving)
        taken_ns = np.array([taken.taken_ns for taken in self.taken], np.int64)
        newest = np.searchsorted(taken_ns, ticks_ns, side='right') - 1
        return EpisodeReplay(
            bag=self.bag, name=self.name, number=self.number, start_ns=self.start_ns,
            dimensions=robot.action_space.dimensions, instructions=tuple(self.instructions),
            notes=tuple(self.notes), first_step=robot.first_step, period_s=robot.period_s,
            length_s=(int(ticks_ns[-1]) - int(ticks_ns[0])) / NANOSECONDS,
            stamp_ns=stamps_ns, taken_ns=taken_ns,
            done_ns=np.array([taken.done_ns for taken in self.taken], np.int64),
            actions=np.stack([taken.chunk.actions for taken in self.taken]),
            reference=reference, recorded=recorded, last_action=self._last_actions(stamps_ns),
            states=np.stack([taken.state for taken in self.taken]),
            outcome=np.array([text or UNFINISHED for text in result.outcome], 'U32'),
            expired=result.expired, tick_ns=ticks_ns, executed=result.executed,
            expected=result.expected, tick_recorded=result.tick_recorded, source=result.source,
            step=result.step, age_s=result.age_s, missed=result.missed,
            stale=(result.source >= 0) & (result.source < newest),
            missing=within(self.missing, int(ticks_ns[0]), int(ticks_ns[-1])),
            interventions=dict(result.interventions), probed=probed, probes=probes,
            pictures=self.pictures)

    def _reference(self, stamps_ns: np.ndarray,
                   robot: RobotSpec) -> tuple[np.ndarray, np.ndarray]:
        """Return what was commanded when the steps of each chunk were due, and where it was."""
        steps = robot.first_step + np.arange(robot.horizon)
        due_ns = stamps_ns[:, None] + np.rint(steps * robot.period_s * NANOSECONDS).astype(
            np.int64)
        reference, known, recorded = sample_actions(self.actions, due_ns, robot)
        recorded = recorded & known
        if not recorded.any():
            raise ValueError('pictures and actions do not overlap in time')
        return reference, recorded

    def _last_actions(self, stamps_ns: np.ndarray) -> np.ndarray:
        """Return the command (N, A) in force just before each observation, NaN without one."""
        last, known = zip(*(stream.sample(stamps_ns - 1, 0) for stream in self.actions))
        return np.where(np.logical_and.reduce(known)[:, None], np.concatenate(last, 1), np.nan)


def within(spells: Sequence[tuple[str, int, int]], start_ns: int,
           end_ns: int) -> dict[str, list[float]]:
    """Return what -> [times, seconds] of the spells (what, from, to) inside [start_ns, end_ns]."""
    found: dict[str, list[float]] = {}
    for what, from_ns, to_ns in spells:
        seconds = (min(to_ns, end_ns) - max(from_ns, start_ns)) / NANOSECONDS
        if seconds > 0:
            times, total = found.get(what, (0, 0.0))
            found[what] = [times + 1, total + seconds]
    return found


def small_jpeg(image: np.ndarray) -> bytes:
    """Return a picture (H, W, 3) RGB as a JPEG of at most PICTURE_WIDTH pixels."""
    height, width = image.shape[:2]
    if width > PICTURE_WIDTH:
        image = cv2.resize(image, (PICTURE_WIDTH, max(1, round(height * PICTURE_WIDTH / width))),
                           interpolation=cv2.INTER_AREA)
    return cv2.imencode('.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
                        [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY])[1].tobytes()
