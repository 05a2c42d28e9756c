"""From streams of messages to one complete Observation, or the reason why there is none.

Every stream (a camera, the joint states, the instruction) keeps its newest messages. `observe`
picks the newest pictures that belong together and the joint state nearest to them. Anything
absent, stale, slow, frozen, malformed, of the wrong size or out of order yields no observation:
NoObservation names the stream, the kind and the reason, and the next good message recovers. Live
node, bag replay and training share this file; only the source of the messages and of `now_ns`
differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import (
    MAX_INSTRUCTION_BYTES, NANOSECONDS, CameraSpec, Observation, RobotSpec, clean_instruction)
from meanflow_ros.ros import from_messages
from meanflow_ros.ros.bag import deserialize, deserialize_text

IMAGE, COMPRESSED_IMAGE = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
CAMERA_BUFFER = 8
STATE_BUFFER = 256
MAX_STATE_BYTES = 2**18    # of a joint state: thousands of joints
CLOCK_JUMP_S = 1.0        # the clock may run ahead of steady time by less than this, between looks
ASPECT_TOLERANCE = 0.01   # of width / height
PICTURE_SIZES = ('exact', 'aspect', 'any')
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
    max_skew_s: largest difference of the stamps within one observation. future_s: how far ahead
    of the clock a stamp may be. min_rate_hz: fewest pictures per second of a camera, over the
    pictures kept, 0 for none. frozen_pictures: so many identical pictures one after the other are
    a camera that hangs, 0 for never (a simulated camera has no noise). picture_size: `exact`, that
    of the checkpoint; `aspect`, its ratio of width to height; or `any`.
    """

    max_age_s: float = 0.5
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
        if not 0 <= self.min_rate_hz <= 1000:
            raise ValueError(f'min_rate_hz must be 0 to 1000, got {self.min_rate_hz}')
        if self.frozen_pictures < 0 or self.frozen_pictures == 1:
            raise ValueError(f'frozen_pictures must be 0 or at least 2, '
                             f'got {self.frozen_pictures}')
        if self.picture_size not in PICTURE_SIZES:
            raise ValueError(f'picture_size must be one of {PICTURE_SIZES}, '
                             f'got {self.picture_size!r}')


class _Stream:
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
        return min(self.items, key=lambda entry: abs(entry[0] - stamp_ns))

    def rate_hz(self) -> float:
        """Return messages per second of those that are kept; inf for fewer than half of them."""
        if 2 * len(self.items) < self.items.maxlen:
            return np.inf
        return (len(self.items) - 1) * NANOSECONDS / (self.items[-1][0] - self.items[0][0])


class Ingest:
    """Buffers of every stream that a robot's policy needs. Not thread-safe: one lock outside."""

    def __init__(self, robot: RobotSpec, *, limits: IngestLimits | None = None,
                 default_instruction: str = ''):
        self._robot = robot
        self._limits = limits or IngestLimits()
        self._default_instruction = (clean_instruction(default_instruction)
                                     if default_instruction else '')
        self._cameras = {name: _Stream(CAMERA_BUFFER) for name in robot.camera_names}
        self._state = _Stream(STATE_BUFFER) if robot.state_names else None
        self._instruction: str | None = None
        self._instruction_fault: str | None = None
        self._now_ns: int | None = None
        self._steady_ns: int | None = None

    def reset(self) -> None:
        """Forget every picture and joint state; the instruction stays."""
        for stream in self._streams().values():
            stream.clear()

    def clock(self, now_ns: int, steady_ns: int | None = None) -> float | None:
        """Note the time; on a jump forget all inputs and return it in seconds, negative if back.

        steady_ns: of a clock that never jumps. With it a jump ahead is seen too; without it, as
        for simulated time, which may run fast, only one backward.
        """
        before_ns, self._now_ns = self._now_ns, now_ns
        steady_before_ns, self._steady_ns = self._steady_ns, steady_ns
        if before_ns is None:
            return None
        jump_s = (now_ns - before_ns) / NANOSECONDS
        ahead_s = 0.0 if None in (steady_ns, steady_before_ns) else (
            jump_s - (steady_ns - steady_before_ns) / NANOSECONDS)
        if jump_s < 0 or ahead_s > CLOCK_JUMP_S:
            self.reset()
            return jump_s if jump_s < 0 else ahead_s
        return None

    def add_image(self, camera: str, message, *, now_ns: int) -> None:
        """Take a sensor_msgs/Image; ValueError says why it cannot be used."""
        self._add(camera, message, now_ns, from_messages.check_image, from_messages.image)

    def add_compressed_image(self, camera: str, message, *, now_ns: int) -> None:
        """Take a sensor_msgs/CompressedImage; it is decoded when it is used."""
        self._add(camera, message, now_ns, from_messages.check_compressed_image,
                  from_messages.compressed_image)

    def add_serialized(self, camera: str, data: bytes, type_name: str, *, now_ns: int) -> None:
        """Take a serialised picture of either type, as a raw subscription gives it."""
        with _noting_fault(self._cameras[camera]):
            message = deserialize(data, type_name)
        add = self.add_image if type_name == IMAGE else self.add_compressed_image
        add(camera, message, now_ns=now_ns)

    def _add(self, camera: str, message, now_ns: int, check: Callable, decode: Callable) -> None:
        stream = self._cameras[camera]
        with _noting_fault(stream):
            check(message)
            stream.add(from_messages.time_ns(message.header.stamp), (message, decode),
                       now_ns=now_ns, future_ns=self._future_ns())
            if self._limits.frozen_pictures:
                stream.note_data(message.data)
                if stream.same >= self._limits.frozen_pictures:
                    raise BadInput(FROZEN, f'the last {stream.same} pictures are identical: the '
                                           f'camera hangs (frozen_pictures)')

    def add_joint_state(self, message, *, now_ns: int) -> None:
        """Take a sensor_msgs/JointState; ValueError names the joint that is missing or bad."""
        if self._state is None:
            return
        with _noting_fault(self._state):
            positions = from_messages.joint_positions(message, self._robot.state_names)
            self._state.add(from_messages.time_ns(message.header.stamp), positions,
                            now_ns=now_ns, future_ns=self._future_ns())

    def add_serialized_joint_state(self, data: bytes, *, now_ns: int) -> None:
        """Take a serialised sensor_msgs/JointState, as a raw subscription gives it."""
        if self._state is None:
            return
        with _noting_fault(self._state):
            if len(data) > MAX_STATE_BYTES:
                raise ValueError(f'joint state has {len(data)} bytes, at most {MAX_STATE_BYTES} '
                                 f'are read')
            message = deserialize(data, 'sensor_msgs/msg/JointState')
        self.add_joint_state(message, now_ns=now_ns)

    def set_serialized_instruction(self, data: bytes) -> str:
        """Take a serialised std_msgs/String as the instruction, see `set_instruction`."""
        try:
            text = deserialize_text(data, MAX_INSTRUCTION_BYTES)
        except ValueError as error:
            self._instruction_fault = f'instruction {error}'
            raise ValueError(self._instruction_fault) from None
        return self.set_instruction(text)

    def set_instruction(self, text: str) -> str:
        """Take an instruction and return it cleaned.

        A bad one raises ValueError and, since nobody asked for the old one, stops observations.
        """
        try:
            if '\ufffd' in text:
                raise ValueError('instruction is not valid UTF-8')
            self._instruction = clean_instruction(text)
        except ValueError as error:
            self._instruction_fault = str(error)
            raise
        self._instruction_fault = None
        return self._instruction

    @property
    def instruction(self) -> str | None:
        """Return what was told last, None if nothing good was."""
        return None if self._instruction_fault else self._instruction

    def newest_state(self) -> np.ndarray | None:
        """Return the newest joint positions (P,), None if there are none."""
        return self._state.items[-1][1] if self._state and self._state.items else None

    def newest_stamps_ns(self) -> dict[str, int | None]:
        """Return the newest stamp of each stream, None where nothing has come."""
        return {name: stream.items[-1][0] if stream.items else None
                for name, stream in self._streams().items()}

    def newest_common_ns(self) -> int | None:
        """Return the oldest of the cameras' newest stamps, None if a camera has no picture."""
        newest = [stream.items[-1][0] if stream.items else None
                  for stream in self._cameras.values()]
        return None if None in newest else min(newest)

    def observe(self, *, now_ns: int) -> Observation:
        """Return the newest complete observation; NoObservation says what is missing.

        The pictures are those nearest to the oldest of the cameras' newest stamps.
        """
        for name, stream in self._streams().items():
            if stream.fault is not None:
                raise NoObservation(name, stream.fault.kind, str(stream.fault))
            if not stream.items:
                raise NoObservation(name, ABSENT, 'nothing has been received', waiting=True)
        instruction = self._current_instruction()
        newest_common = min(stream.items[-1][0] for stream in self._cameras.values())
        chosen = {name: stream.nearest(newest_common) for name, stream in self._cameras.items()}
        stamp_ns = min(stamp for stamp, _ in chosen.values())
        stamps = {f'camera/{name}': stamp for name, (stamp, _) in chosen.items()}
        state = None
        if self._state is not None:
            stamps['joint_states'], state = self._state.nearest(stamp_ns)
        self._require_fresh(stamps, now_ns)
        self._require_arriving(now_ns)
        self._require_together(stamps, stamp_ns)
        return Observation(stamp_ns=stamp_ns, images=self._decode(chosen),
                           instruction=instruction, state=state)

    def _streams(self) -> dict[str, _Stream]:
        cameras = {f'camera/{name}': stream for name, stream in self._cameras.items()}
        return cameras if self._state is None else {**cameras, 'joint_states': self._state}

    def _future_ns(self) -> int:
        return round(self._limits.future_s * NANOSECONDS)

    def _current_instruction(self) -> str:
        if self._instruction_fault is not None:
            raise NoObservation('instruction', MALFORMED, self._instruction_fault)
        instruction = self._instruction or self._default_instruction
        if not instruction:
            raise NoObservation('instruction', ABSENT, 'none has been received and there is no '
                                                       'default', waiting=True)
        return instruction

    def _require_fresh(self, stamps: dict[str, int], now_ns: int) -> None:
        name = min(stamps, key=stamps.get)
        age_s = (now_ns - stamps[name]) / NANOSECONDS
        if age_s > self._limits.max_age_s:
            raise NoObservation(name, STALE, f'newest usable message is {age_s:.3f} s old, at '
                                             f'most {self._limits.max_age_s:g} s is allowed')

    def _require_arriving(self, now_ns: int) -> None:
        """Refuse streams that have ended, though stamps that run ahead look fresh, or are slow."""
        for name, stream in self._streams().items():
            silent_s = (now_ns - stream.arrived_ns) / NANOSECONDS
            if silent_s > self._limits.max_age_s:
                raise NoObservation(name, STALE, f'nothing has come for {silent_s:.3f} s, at most '
                                                 f'{self._limits.max_age_s:g} s is allowed')
        for name, stream in self._cameras.items():
            if stream.rate_hz() < self._limits.min_rate_hz:
                raise NoObservation(f'camera/{name}', SLOW, f'{stream.rate_hz():.1f} pictures per '
                                    f'second, at least {self._limits.min_rate_hz:g} are needed')

    def _require_together(self, stamps: dict[str, int], stamp_ns: int) -> None:
        for name, stamp in stamps.items():
            skew_s = abs(stamp - stamp_ns) / NANOSECONDS
            if skew_s > self._limits.max_skew_s:
                behind = min(stamps, key=lambda key: self._streams()[key].items[-1][0])
                if stamp > stamp_ns and behind != name:    # it has come on time, not the other
                    raise NoObservation(behind, SKEW, f'is {skew_s:.3f} s behind {name}, at most '
                                                      f'{self._limits.max_skew_s:g} s is allowed')
                raise NoObservation(name, SKEW, f'message is {skew_s:.3f} s apart from the oldest '
                                                f'picture, at most {self._limits.max_skew_s:g} s '
                                                f'is allowed')

    def _decode(self, chosen) -> dict[str, np.ndarray]:
        images = {}
        for camera in self._robot.cameras:
            _, (message, decode) = chosen[camera.name]
            try:
                images[camera.name] = decode(message)
                self._require_size(camera, images[camera.name])
            except ValueError as error:
                raise NoObservation(f'camera/{camera.name}', getattr(error, 'kind', MALFORMED),
                                    str(error)) from None
        return images

    def _require_size(self, camera: CameraSpec, image: np.ndarray) -> None:
        height, width = image.shape[:2]
        rule = self._limits.picture_size
        ratio = (width / height) / (camera.width / camera.height)
        if (rule == 'exact' and (width, height) != (camera.width, camera.height)
                or rule == 'aspect' and abs(ratio - 1) > ASPECT_TOLERANCE):
            raise BadInput(SIZE, f'picture is {width}x{height}, the checkpoint was trained on '
                                 f'{camera.width}x{camera.height} (picture_size: {rule})')


class _noting_fault:
    """Record a ValueError as the stream's fault and let it pass on."""

    def __init__(self, stream: _Stream):
        self._stream = stream

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, ValueError):
            self._stream.fault = error if isinstance(error, BadInput) else BadInput(
                MALFORMED, str(error))
        return False
