"""One recorded episode as training pairs: observations, and the actions that were due after each.

An observation and the commands need not share stamps: cameras run at 30 Hz, commands at 50 Hz.
Step i of a chunk is due at `stamp + (i + first_step) * period_s` (the time rule). Its value is
the command in force then: a command holds until the next one comes (zero-order hold). A command
that comes at most half a period later, and is nearer than the one held, is taken instead, so
that rounding and jitter of the stamps do not pick the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from meanflow_ros.core.contract import NANOSECONDS, RobotSpec, TimedActions


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An episode or a recording that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Episode:
    """N observations of one demonstration, each with the chunk of T actions that follows it.

    instructions: one per observation. pictures: (N, C, S, S, 3) uint8 RGB, cameras in the robot's
    order. states: (N, P). chunks: (N, T, A), physical units; relative dimensions hold the
    difference to the state of the observation. executed: (N, T, A), the same of what the robot
    was told, the chunks themselves by default. mask: (N, T), False for steps that were due after
    the recording's end, where the chunk repeats the last action. ValueError if they disagree.
    """

    name: str
    instructions: tuple[str, ...]
    pictures: np.ndarray
    states: np.ndarray
    chunks: np.ndarray
    mask: np.ndarray
    executed: np.ndarray | None = None

    def __post_init__(self):
        if self.executed is None:
            object.__setattr__(self, 'executed', self.chunks)
        if self.executed.shape != self.chunks.shape:
            raise ValueError(f'executed must have the shape of chunks, {self.chunks.shape}, '
                             f'got {self.executed.shape}')
        counts = {name: len(getattr(self, name))
                  for name in ('instructions', 'pictures', 'states', 'chunks', 'mask')}
        if len(set(counts.values())) != 1 or not counts['mask']:
            raise ValueError(f'every part of an episode needs the same length of at least 1, '
                             f'got {counts}')
        for name, ndim in (('pictures', 5), ('states', 2), ('chunks', 3), ('mask', 2)):
            if getattr(self, name).ndim != ndim:
                raise ValueError(f'{name} must have {ndim} dimensions, '
                                 f'got shape {getattr(self, name).shape}')
        for name in ('states', 'chunks', 'executed'):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f'{name} must be finite')

    def __len__(self) -> int:
        return len(self.mask)


def held_at(stamps_ns: np.ndarray, times_ns: np.ndarray, slack_ns: int) -> np.ndarray:
    """Return the index into `stamps_ns` (M,) of what holds at `times_ns` (...), -1 before all.

    slack_ns: how much later something may come and still be taken, if it is the nearer one.
    """
    held = np.searchsorted(stamps_ns, times_ns, side='right') - 1
    following = np.minimum(held + 1, len(stamps_ns) - 1)
    ahead = stamps_ns[following] - times_ns
    since = np.where(held < 0, np.iinfo(np.int64).max, times_ns - stamps_ns[held])
    return np.where((ahead >= 0) & (ahead <= slack_ns) & (ahead < since), following, held)


class ActionStream:
    """The commands of one topic during one episode, by the time at which each was due."""

    def __init__(self):
        self._stamp_ns: int | None = None
        self._due_ns: list[int] = []
        self._values: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._due_ns)

    def add(self, timed: TimedActions) -> None:
        """Take a message; it replaces what is due from its first step on.

        ValueError if its stamp is older than that of the message before it.
        """
        if self._stamp_ns is not None and timed.stamp_ns < self._stamp_ns:
            raise ValueError(f'the stamp of an action goes backward by '
                             f'{(self._stamp_ns - timed.stamp_ns) / NANOSECONDS:.3f} s')
        self._stamp_ns = timed.stamp_ns
        while self._due_ns and self._due_ns[-1] >= timed.due_ns[0]:
            self._due_ns.pop()
            self._values.pop()
        self._due_ns += timed.due_ns.tolist()
        self._values += list(timed.actions)

    def require_steady(self, longest_ns: int) -> None:
        """ValueError if there is no command, or more than `longest_ns` from one to the next."""
        if not self._due_ns:
            raise ValueError('there is no action')
        pauses = np.diff(self._due_ns)
        if len(pauses) and pauses.max() > longest_ns:
            at = int(pauses.argmax())
            raise ValueError(
                f'no action for {pauses[at] / NANOSECONDS:.3f} s, '
                f'{(self._due_ns[at] - self._due_ns[0]) / NANOSECONDS:.3f} s after the first; '
                f'at most {longest_ns / NANOSECONDS:.3f} s is allowed (max_action_gap)')

    def sample(self, due_ns: np.ndarray, slack_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the values (..., D) in force at `due_ns` (...), and whether there was one (...).

        slack_ns: how much later a command may come and still be taken, see the module. Before
        the first command the value is the first; after the last it is the last.
        """
        chosen = held_at(np.array(self._due_ns, np.int64), due_ns, slack_ns)
        return np.stack(self._values)[np.maximum(chosen, 0)], chosen >= 0

    def end_ns(self) -> int:
        """Return when the last command was due."""
        return self._due_ns[-1]


def sample_actions(streams: Sequence[ActionStream], due_ns: np.ndarray, robot: RobotSpec,
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return actions (..., A) in force at `due_ns` (...), which are known, which were recorded.

    streams: their dimensions follow one another. known: every stream had begun. recorded: the
    first stream had not ended; the others hold their last value.
    """
    slack_ns = round(robot.period_s * NANOSECONDS / 2)
    values, known = zip(*(stream.sample(due_ns, slack_ns) for stream in streams))
    recorded = due_ns <= streams[0].end_ns() + slack_ns
    return np.concatenate(values, axis=-1), np.logical_and.reduce(known), recorded


def due_times(stamps_ns: np.ndarray, robot: RobotSpec) -> np.ndarray:
    """Return when the steps of the chunks of observations at `stamps_ns` (N,) are due, (N, T)."""
    steps = robot.first_step + np.arange(robot.horizon)
    offsets_ns = np.rint(steps * robot.period_s * NANOSECONDS).astype(np.int64)
    return np.asarray(stamps_ns, np.int64)[:, None] + offsets_ns


def pair(stamps_ns: np.ndarray, streams: Sequence[ActionStream], robot: RobotSpec,
         ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the observations that have actions (M,), their chunks (M, T, A) and masks (M, T).

    stamps_ns: t_obs of the observations (N,). ValueError if no observation has an action.
    """
    due_ns = due_times(stamps_ns, robot)                                           # (N, T)
    chunks, known, recorded = sample_actions(streams, due_ns, robot)
    rows = np.flatnonzero(known[:, 0] & recorded[:, 0])
    if not len(rows):
        raise ValueError(f'none of {len(stamps_ns)} observations has an action that was due at '
                         f'its stamp or later')
    return rows, chunks[rows], recorded[rows]


def make_relative(chunks: np.ndarray, states: np.ndarray, relative_to: Sequence[str],
                  state_names: Sequence[str]) -> np.ndarray:
    """Subtract from chunks (N, T, A) the states (N, P) that `relative_to` names, '' for none."""
    chunks = chunks.copy()
    for dimension, name in enumerate(relative_to):
        if name:
            chunks[:, :, dimension] -= states[:, None, list(state_names).index(name)]
    return chunks


def resize_picture(picture: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size, 3) exactly as the encoder does at inference."""
    if picture.shape[:2] == (size, size):
        return picture
    pixels = torch.tensor(picture).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (size, size), mode='bilinear', antialias=True,
                           align_corners=False)
    return pixels[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
