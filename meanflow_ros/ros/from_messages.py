"""ROS messages -> arrays, as pure functions.

Messages are read by their field names alone, so live messages (rclpy) and recorded ones
(rosbags) go through the same code and no ROS needs to be installed. Whatever cannot be read
raises a ValueError that says what is wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, TimedActions

CHANNELS = {'rgb8': 3, 'bgr8': 3, 'rgba8': 4, 'bgra8': 4, 'mono8': 1}
MAX_PIXELS = 4096 * 4096
MAX_RAW_BYTES = MAX_PIXELS * max(CHANNELS.values())
MAX_COMPRESSED_BYTES = 64 * 1024 * 1024
MAX_PNG_CHUNKS = 2**16       # 8 KiB of data each is usual, so that 64 MiB are an eighth of it
MAX_HEADER_BYTES = 2**20     # before a JPEG's size: a few sections of 64 KiB (EXIF, thumbnails)
_JPEG_FRAMES = {*range(0xc0, 0xd0)} - {0xc4, 0xc8, 0xcc}
TWIST_FIELDS = ('linear.x', 'linear.y', 'linear.z', 'angular.x', 'angular.y', 'angular.z')
ActionReader = Callable[[object, int], TimedActions]


def time_ns(time) -> int:
    """Return a builtin_interfaces Time or Duration in nanoseconds."""
    return time.sec * NANOSECONDS + time.nanosec


def check_image(message) -> None:
    """ValueError unless a sensor_msgs/Image has a known encoding and all of its data."""
    if message.encoding not in CHANNELS:
        raise ValueError(f'encoding {message.encoding[:40]!r} is not supported, '
                         f'use one of {", ".join(CHANNELS)}')
    if message.width < 1 or message.height < 1:
        raise ValueError(f'picture has no pixels: {message.width}x{message.height}')
    if message.width * message.height > MAX_PIXELS:
        raise ValueError(f'picture of {message.width}x{message.height} is over the cap of '
                         f'{MAX_PIXELS} pixels')
    row = message.width * CHANNELS[message.encoding]
    if message.step < row:
        raise ValueError(f'step is {message.step} bytes but a row of {message.width} '
                         f'{message.encoding} pixels takes {row}')
    if len(message.data) != message.step * message.height:
        raise ValueError(f'data has {len(message.data)} bytes but step {message.step} x height '
                         f'{message.height} needs {message.step * message.height}')


def image(message) -> np.ndarray:
    """Return a sensor_msgs/Image as RGB (H, W, 3) uint8; rgb8 without padding is not copied.

    All supported encodings have one byte per channel, so `is_bigendian` changes nothing.
    """
    check_image(message)
    channels = CHANNELS[message.encoding]
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    pixels = rows[:, :message.width * channels].reshape(message.height, message.width, channels)
    if message.encoding == 'mono8':
        return np.repeat(pixels, 3, axis=2)
    if message.encoding.startswith('bgr'):
        return np.ascontiguousarray(pixels[:, :, 2::-1])
    return pixels[:, :, :3]


def check_compressed_image(message) -> None:
    """ValueError unless a sensor_msgs/CompressedImage is JPEG or PNG and small when decoded.

    Only headers are read: a few bytes can stand for gigabytes of pixels, or say that gigabytes
    follow, for which a decoder would make room.
    """
    if not 0 < len(message.data) <= MAX_COMPRESSED_BYTES:
        raise ValueError(f'compressed picture must have 1 to {MAX_COMPRESSED_BYTES} bytes, '
                         f'got {len(message.data)}')
    width, height = _declared_size(bytes(message.data[:MAX_HEADER_BYTES]))
    if not width * height:
        raise ValueError(f'compressed picture ({message.format[:40]!r}, {len(message.data)} '
                         f'bytes) cannot be decoded: it has no header of a JPEG or PNG')
    if width * height > MAX_PIXELS:
        raise ValueError(f'compressed picture of {width}x{height} is over the cap of '
                         f'{MAX_PIXELS} pixels')
    if bytes(message.data[:1]) == b'\x89':
        _require_whole_chunks(message.data)


def _require_whole_chunks(data) -> None:
    """ValueError unless every chunk of a PNG up to IEND lies within the data."""
    at = 8
    for _ in range(MAX_PNG_CHUNKS):
        head = bytes(data[at:at + 8])
        length = int.from_bytes(head[:4], 'big')
        if len(head) < 8 or at + 12 + length > len(data):
            raise ValueError(f'compressed picture ({len(data)} bytes) cannot be decoded: the '
                             f'chunk of the PNG at byte {at} is not whole')
        if head[4:] == b'IEND':
            return
        at += 12 + length
    raise ValueError(f'compressed picture ({len(data)} bytes) has more than {MAX_PNG_CHUNKS} '
                     f'chunks')


def _declared_size(data: bytes) -> tuple[int, int]:
    """Return width and height that a PNG's IHDR or a JPEG's first frame header says, else 0, 0."""
    if data.startswith(b'\x89PNG\r\n\x1a\n') and data[12:16] == b'IHDR' and len(data) >= 24:
        return struct.unpack('>II', data[16:24])
    at = 2 if data.startswith(b'\xff\xd8') else len(data)
    while at + 9 <= len(data) and data[at] == 0xff:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack('>HH', data[at + 5:at + 9])
            return width, height
        if marker == 0xff:                                  # padding
            at += 1
        elif marker == 0x01 or 0xd0 <= marker <= 0xd8:      # without a length
            at += 2
        else:
            at += 2 + struct.unpack('>H', data[at + 2:at + 4])[0]
    return 0, 0


def compressed_image(message) -> np.ndarray:
    """Return a sensor_msgs/CompressedImage (jpeg, png) as RGB (H, W, 3) uint8."""
    check_compressed_image(message)
    data = np.frombuffer(message.data, np.uint8)
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ValueError(f'compressed picture cannot be decoded: {error}') from None
    if pixels is None:
        raise ValueError(f'compressed picture ({message.format[:40]!r}, {data.size} bytes) '
                         f'cannot be decoded')
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def joint_positions(message, names: Sequence[str]) -> np.ndarray:
    """Return the positions (P,) of the joints `names`, matched by name in any order.

    ValueError names the joints that are missing or not finite.
    """
    if len(message.name) != len(message.position):
        raise ValueError(f'joint state has {len(message.name)} names '
                         f'but {len(message.position)} positions')
    positions = dict(zip(message.name, message.position))
    missing = [name for name in names if name not in positions]
    if missing:
        raise ValueError(f'joint state has no {missing[0]!r}, it has '
                         f'{", ".join(list(message.name)[:20]) or "no joints"}')
    values = np.array([positions[name] for name in names], np.float64)
    if not np.isfinite(values).all():
        bad = names[int(np.argmin(np.isfinite(values)))]
        raise ValueError(f'joint {bad!r} is not finite: {positions[bad]}')
    return values


def timed_actions(message, dimensions: Sequence[str]) -> TimedActions:
    """Return a trajectory_msgs/JointTrajectory as actions in the order of `dimensions`.

    ValueError for other joint names, missing positions or non-finite values.
    """
    if sorted(message.joint_names) != sorted(dimensions):
        raise ValueError(f'trajectory is for {list(message.joint_names)[:20]}, '
                         f'expected {list(dimensions)}')
    order = [list(message.joint_names).index(name) for name in dimensions]
    start_ns = time_ns(message.header.stamp)
    points = [np.asarray(point.positions, np.float64) for point in message.points]
    if not points or any(point.shape != (len(order),) for point in points):
        raise ValueError(f'trajectory must have points of {len(order)} positions')
    actions = np.stack(points)[:, order]
    if not np.isfinite(actions).all():
        raise ValueError('trajectory has positions that are not finite')
    return TimedActions(stamp_ns=start_ns, actions=actions, due_ns=[
        start_ns + time_ns(point.time_from_start) for point in message.points])


def _action_now(stamp_ns: int, values) -> TimedActions:
    actions = np.asarray(values, np.float64)
    if not np.isfinite(actions).all():
        raise ValueError(f'action is not finite: {actions}')
    return TimedActions(stamp_ns=stamp_ns, due_ns=[stamp_ns], actions=actions[None])


def _header_ns(message, received_ns: int) -> int:
    """Return the header's stamp; a stamp of zero means now, as controllers take it."""
    return time_ns(message.header.stamp) or received_ns


def action_reader(type_name: str, dimensions: Sequence[str],
                  twist_fields: Sequence[str] = TWIST_FIELDS) -> ActionReader:
    """Return a function (message, received_ns) -> TimedActions for a topic of this type.

    JointTrajectory and JointState (its positions) are matched by name to `dimensions`, arrays by
    position, TwistStamped by `twist_fields`. Messages without a header are due when they were
    received, and so are those whose stamp is zero. ValueError for another type, or for twist
    fields that are not as many as the dimensions; the function raises ValueError for a message
    of another size, of other names or with values that are not finite.
    """
    size = len(dimensions)

    def trajectory(message, received_ns: int) -> TimedActions:
        timed = timed_actions(message, dimensions)
        shift_ns = _header_ns(message, received_ns) - timed.stamp_ns
        return TimedActions(stamp_ns=timed.stamp_ns + shift_ns, actions=timed.actions,
                            due_ns=timed.due_ns + shift_ns) if shift_ns else timed

    def joint_state(message, received_ns: int) -> TimedActions:
        return _action_now(_header_ns(message, received_ns), joint_positions(message, dimensions))

    def array(message, received_ns: int) -> TimedActions:
        if len(message.data) != size:
            raise ValueError(f'action has {len(message.data)} numbers, expected {size}: '
                             f'{", ".join(dimensions)}')
        return _action_now(received_ns, message.data)

    def twist(message, received_ns: int) -> TimedActions:
        return _action_now(_header_ns(message, received_ns), [
            getattr(getattr(message.twist, part), axis)
            for part, axis in (name.split('.') for name in twist_fields)])

    readers = {
        'trajectory_msgs/msg/JointTrajectory': trajectory,
        'sensor_msgs/msg/JointState': joint_state,
        'std_msgs/msg/Float32MultiArray': array,
        'std_msgs/msg/Float64MultiArray': array,
        'geometry_msgs/msg/TwistStamped': twist,
    }
    if type_name not in readers:
        raise ValueError(f'actions cannot be read from {type_name}, use one of '
                         f'{", ".join(readers)}')
    if readers[type_name] is twist and len(twist_fields) != size:
        raise ValueError(f'{len(twist_fields)} twist fields for the {size} dimensions '
                         f'{", ".join(dimensions)}: give one each')
    return readers[type_name]


def scalar_action(message, received_ns: int) -> TimedActions:
    """Return a Float32, Float64, Int32 or Bool as an action of one dimension, due on receipt."""
    return _action_now(received_ns, [float(message.data)])
