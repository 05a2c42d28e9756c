"""One stream of messages: what is kept of it, when it counts as missing, and what is wrong.

Each way of being wrong has a kind, which NoObservation names.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS
from meanflow_ros.core.schema import known_or_hint

PICTURE_SIZES = ('exact', 'aspect', 'any')
JOINT_STATES = 'joint_states'
_FIRST_BYTES = 4096       # live pictures differ in them, so that the rest is rarely compared

KINDS = (ABSENT, STALE, SLOW, FROZEN, SKEW, MALFORMED, SIZE, ORDER, FUTURE, CLOCK) = (
    'absent', 'stale', 'slow', 'frozen', 'skew', 'malformed', 'size', 'order', 'future', 'clock')


class NoObservation(Exception):
    """There is no complete observation now; `stream`, `kind` and the message say why.

    waiting: nothing is wrong yet, the first message of the stream has not come.
    """

    def __init__(self, stream: str, kind: str, reason: str, *, waiting: bool = False):
        super().__init__(f'{stream}: {reason}')
        self.stream = stream
        self.kind = kind
        self.reason = reason
        self.waiting = waiting


class BadInput(ValueError):
    """A message that cannot be used; `kind` is one of the kinds of NoObservation."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class IngestLimits:
    """When an input counts as missing.

    max_age_s: every stream by itself: the oldest newest message, by its stamp and by its arrival.
    max_ages_s: stream (`camera/<name>`, `joint_states`) -> its own, in place of max_age_s.
    max_skew_s: largest difference of the stamps within one observation. future_s: how far ahead
    of the clock a stamp may be. min_rate_hz: fewest pictures per second of a camera, over the
    pictures kept, 0 for none. frozen_pictures: so many identical pictures one after the other are
    a camera that hangs, 0 for never (a simulated camera has no noise). picture_size: `exact`, that
    of the checkpoint; `aspect`, its ratio of width to height; or `any`.
    """

    max_age_s: float = 0.5
    max_ages_s: Mapping[str, float] = field(default_factory=dict)
    max_skew_s: float = 0.06
    future_s: float = 0.25
    min_rate_hz: float = 0.0
    frozen_pictures: int = 0
    picture_size: str = 'any'

    def __post_init__(self):
        for name in ('max_age_s', 'max_skew_s', 'future_s'):
            value = getattr(self, name)
            if not 0 < value < 3600:
                raise ValueError(f'{name} must be above 0 and below 3600, got {value}')
        for stream, value in self.max_ages_s.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) \
                    or not 0 < value < 3600:
                raise ValueError(f'max_ages_s of {stream!r} must be a number above 0 and below '
                                 f'3600, got {value!r}')
        if not 0 <= self.min_rate_hz <= 1000:
            raise ValueError(f'min_rate_hz must be 0 to 1000, got {self.min_rate_hz}')
        if self.frozen_pictures < 0 or self.frozen_pictures == 1:
            raise ValueError(f'frozen_pictures must be 0 or at least 2, '
                             f'got {self.frozen_pictures}')
        if self.picture_size not in PICTURE_SIZES:
            raise ValueError(f'picture_size must be one of {PICTURE_SIZES}, '
                             f'got {self.picture_size!r}')

    def max_age_of(self, stream: str) -> float:
        """Return how old, in seconds, a message of this stream may be."""
        return self.max_ages_s.get(stream, self.max_age_s)

    @property
    def least_max_age_s(self) -> float:
        """Return the strictest of all."""
        return min([self.max_age_s, *self.max_ages_s.values()])

    def require_streams(self, cameras: Sequence[str], has_state: bool) -> None:
        """ValueError if an age is given for a stream that the policy does not have."""
        known = [*(f'camera/{name}' for name in cameras), *([JOINT_STATES] if has_state else [])]
        for stream in self.max_ages_s:
            if stream not in known:
                raise ValueError(f'max_ages_s: the policy has no stream {stream!r} '
                                 f'({known_or_hint(stream, known)})')


def read_ages(text: str) -> dict[str, float]:
    """Read 'camera/wrist:=0.2 joint_states:=0.05', seconds by stream; ValueError otherwise."""
    ages: dict[str, float] = {}
    for part in text.split():
        stream, arrow, value = part.partition(':=')
        try:
            seconds = float(value)
        except ValueError:
            arrow = ''
        if not (stream and arrow):
            raise ValueError(f'max_ages_s is written STREAM:=SECONDS, joint_states:=0.05 for '
                             f'example, got {part!r}')
        if stream in ages:
            raise ValueError(f'max_ages_s gives {stream!r} twice')
        ages[stream] = seconds
    return ages


class Stream:
    """The newest messages of one topic, by stamp, and what is wrong with it, if anything.

    same: how many of the newest pictures are identical.
    """

    def __init__(self, size: int):
        self.items: deque[tuple[int, object]] = deque(maxlen=size)
        self.clear()

    def clear(self) -> None:
        self.items.clear()
        self.fault: BadInput | None = None
        self.arrived_ns = 0
        self.same = 1
        self._data = None

    def add(self, stamp_ns: int, item: object, *, now_ns: int, future_ns: int) -> None:
        if stamp_ns > now_ns + future_ns:
            raise BadInput(FUTURE, f'stamp is {(stamp_ns - now_ns) / NANOSECONDS:.3f} s in the '
                                   f'future')
        if self.items and stamp_ns <= self.items[-1][0]:
            back_s = (self.items[-1][0] - stamp_ns) / NANOSECONDS
            raise BadInput(ORDER, f'stamp goes backward by {back_s:.3f} s' if back_s
                           else 'stamp repeats')
        self.items.append((stamp_ns, item))
        self.arrived_ns = now_ns
        self.fault = None

    def note_data(self, data) -> None:
        """Count the pictures that are byte for byte that before."""
        data = np.frombuffer(data, np.uint8)
        before, self._data = self._data, data
        equal = (before is not None and before.size == data.size
                 and np.array_equal(before[:_FIRST_BYTES], data[:_FIRST_BYTES])
                 and np.array_equal(before, data))
        self.same = self.same + 1 if equal else 1

    def nearest(self, stamp_ns: int) -> tuple[int, object]:
        """Return the entry nearest in time, the earlier of two; stamps rise."""
        after = bisect.bisect_left(self.items, stamp_ns, key=lambda entry: entry[0])
        around = [self.items[place] for place in (after - 1, after)
                  if 0 <= place < len(self.items)]
        return min(around, key=lambda entry: abs(entry[0] - stamp_ns))

    def rate_hz(self) -> float:
        """Return messages per second of those that are kept; inf for fewer than half of them."""
        if 2 * len(self.items) < self.items.maxlen:
            return np.inf
        return (len(self.items) - 1) * NANOSECONDS / (self.items[-1][0] - self.items[0][0])


class noting_fault:
    """Record what is raised as the stream's fault and let it pass on; a ValueError is foreseen."""

    def __init__(self, stream: Stream):
        self._stream = stream

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, BadInput):
            self._stream.fault = error
        elif isinstance(error, Exception):
            unforeseen = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
            self._stream.fault = BadInput(MALFORMED, f'{unforeseen}{error}')
        return False
