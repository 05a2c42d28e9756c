"""From streams of messages to one complete Observation, or the reason why there is none.

Every stream (a camera, the joint states, the instruction) keeps its newest messages. `observe`
picks the newest pictures that belong together and the joint state nearest to them. Anything
absent, stale, slow, frozen, malformed, of the wrong size or out of order yields no observation:
NoObservation names the stream, the kind and the reason, and the next good message recovers. Live
node, bag replay and training share this file; only the source of the messages and of `now_ns`
differs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future

import numpy as np

from meanflow_ros.core.contract import (
    MAX_INSTRUCTION_BYTES, NANOSECONDS, CameraSpec, Observation, RobotSpec, clean_instruction)
from meanflow_ros.ros import from_messages
from meanflow_ros.ros.bag import deserialize, deserialize_text
from meanflow_ros.ros.streams import (
    ABSENT, CLOCK, FROZEN, JOINT_STATES, MALFORMED, SIZE, SKEW, SLOW, STALE, BadInput,
    IngestLimits, NoObservation, Stream, noting_fault)

IMAGE, COMPRESSED_IMAGE = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
CAMERA_BUFFER = 8
STATE_BUFFER = 256
MAX_BYTES = {type_name: data + 2**20 for type_name, data in (   # header, padding of the rows
    (IMAGE, from_messages.MAX_RAW_BYTES), (COMPRESSED_IMAGE, from_messages.MAX_COMPRESSED_BYTES))}
MAX_STATE_BYTES = 2**18    # of a joint state: thousands of joints
CLOCK_JUMP_S = 1.0        # the clock may run ahead of steady time by less than this, between looks
ASPECT_TOLERANCE = 0.01   # of width / height


def ahead_or_back(jump_s: float) -> str:
    """Return in words how far the clock jumped."""
    return f'{"back" if jump_s < 0 else "ahead"} by {abs(jump_s):.3f} s'


class Ingest:
    """Buffers of every stream that a robot's policy needs. Not thread-safe: one lock outside.

    decoder: where compressed pictures are decoded when they come; else it is when they are used.
    """

    def __init__(self, robot: RobotSpec, *, limits: IngestLimits | None = None,
                 default_instruction: str = '', decoder: Executor | None = None):
        self._robot = robot
        self._decoder = decoder
        self._decoding: dict[str, Future] = {}
        self._limits = limits or IngestLimits()
        self._limits.require_streams(robot.camera_names, bool(robot.state_names))
        self._default_instruction = (clean_instruction(default_instruction)
                                     if default_instruction else '')
        self._cameras = {name: Stream(CAMERA_BUFFER) for name in robot.camera_names}
        self._state = Stream(STATE_BUFFER) if robot.state_names else None
        self._instruction: str | None = None
        self._instruction_fault: str | None = None
        self._now_ns: int | None = None
        self._steady_ns: int | None = None
        self._jump_s: float | None = None      # of the clock, until every stream has come again

    def reset(self) -> None:
        """Forget every picture and joint state; the instruction stays."""
        self._jump_s = None
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
            self._jump_s = jump_s if jump_s < 0 else ahead_s
            return self._jump_s
        return None

    def add_image(self, camera: str, message, *, now_ns: int) -> None:
        """Take a sensor_msgs/Image; ValueError says why it cannot be used."""
        self._add(camera, message, now_ns, from_messages.check_image, from_messages.image)

    def add_compressed_image(self, camera: str, message, *, now_ns: int) -> None:
        """Take a sensor_msgs/CompressedImage; it is decoded when it is used, or by the decoder."""
        self._add(camera, message, now_ns, from_messages.check_compressed_image,
                  from_messages.compressed_image)
        if self._decoder:
            stamp_ns, _ = self._cameras[camera].items[-1]
            self._cameras[camera].items[-1] = stamp_ns, (
                message, self._decoding_ahead(camera, message))

    def _decoding_ahead(self, camera: str, message) -> Callable:
        """Return what gives the picture that is being decoded; one that waits is overtaken."""
        future = self._decoder.submit(from_messages.compressed_image, message)
        if camera in self._decoding:
            self._decoding[camera].cancel()
        self._decoding[camera] = future

        def decoded(message) -> np.ndarray:
            if future.cancelled():
                return from_messages.compressed_image(message)
            return future.result()
        return decoded

    def add_serialized(self, camera: str, data: bytes, type_name: str, *, now_ns: int) -> None:
        """Take a serialised picture of either type, as a raw subscription gives it."""
        with noting_fault(self._cameras[camera]):
            if len(data) > MAX_BYTES[type_name]:
                raise ValueError(f'picture message has {len(data)} bytes, at most '
                                 f'{MAX_BYTES[type_name]} are read')
            message = deserialize(data, type_name)
        add = self.add_image if type_name == IMAGE else self.add_compressed_image
        add(camera, message, now_ns=now_ns)

    def _add(self, camera: str, message, now_ns: int, check: Callable, decode: Callable) -> None:
        stream = self._cameras[camera]
        with noting_fault(stream):
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
        with noting_fault(self._state):
            positions = from_messages.joint_positions(message, self._robot.state_names)
            self._state.add(from_messages.time_ns(message.header.stamp), positions,
                            now_ns=now_ns, future_ns=self._future_ns())

    def add_serialized_joint_state(self, data: bytes, *, now_ns: int) -> None:
        """Take a serialised sensor_msgs/JointState, as a raw subscription gives it."""
        if self._state is None:
            return
        with noting_fault(self._state):
            if len(data) > MAX_STATE_BYTES:
                raise ValueError(f'joint state has {len(data)} bytes, at most {MAX_STATE_BYTES} '
                                 f'are read')
            message = deserialize(data, 'sensor_msgs/msg/JointState')
        self.add_joint_state(message, now_ns=now_ns)

    @property
    def instruction(self) -> str | None:
        """Return what was told last, None if nothing good was."""
        return None if self._instruction_fault else self._instruction

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
            if not stream.items and self._jump_s is not None:
                raise NoObservation('clock', CLOCK, f'it jumped {ahead_or_back(self._jump_s)}, '
                                                    f'nothing of {name} since', waiting=True)
            if not stream.items:
                raise NoObservation(name, ABSENT, 'nothing has been received', waiting=True)
        self._jump_s = None
        instruction = self._current_instruction()
        newest_common = min(stream.items[-1][0] for stream in self._cameras.values())
        chosen = {name: stream.nearest(newest_common) for name, stream in self._cameras.items()}
        stamp_ns = min(stamp for stamp, _ in chosen.values())
        stamps = {f'camera/{name}': stamp for name, (stamp, _) in chosen.items()}
        state = None
        if self._state is not None:
            stamps[JOINT_STATES], state = self._state.nearest(stamp_ns)
        self._require_fresh(now_ns)
        self._require_arriving(now_ns)
        self._require_together(stamps, stamp_ns)
        return Observation(stamp_ns=stamp_ns, images=self._decode(chosen),
                           instruction=instruction, state=state)

    def _streams(self) -> dict[str, Stream]:
        cameras = {f'camera/{name}': stream for name, stream in self._cameras.items()}
        return cameras if self._state is None else {**cameras, JOINT_STATES: self._state}

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

    def _require_fresh(self, now_ns: int) -> None:
        """Refuse a stream whose newest message is too old; that beyond its limit most is named."""
        ages_s = {name: (now_ns - stream.items[-1][0]) / NANOSECONDS
                  for name, stream in self._streams().items()}
        name = max(ages_s, key=lambda each: ages_s[each] - self._limits.max_age_of(each))
        limit_s = self._limits.max_age_of(name)
        if ages_s[name] > limit_s:
            raise NoObservation(name, STALE, f'newest usable message is {ages_s[name]:.3f} s '
                                             f'old, at most {limit_s:g} s is allowed')

    def _require_arriving(self, now_ns: int) -> None:
        """Refuse streams that have ended, though stamps that run ahead look fresh, or are slow."""
        for name, stream in self._streams().items():
            silent_s = (now_ns - stream.arrived_ns) / NANOSECONDS
            limit_s = self._limits.max_age_of(name)
            if silent_s > limit_s:
                raise NoObservation(name, STALE, f'nothing has come for {silent_s:.3f} s, at most '
                                                 f'{limit_s:g} s is allowed')
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
