"""ROS messages -> arrays, as pure functions.

Messages are read by their field names alone, so live messages (rclpy) and recorded ones
(rosbags) go through the same code and no ROS needs to be installed. Whatever cannot be read
raises a ValueError that says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, TimedActions

CHANNELS = {'rgb8': 3, 'bgr8': 3, 'rgba8': 4, 'bgra8': 4, 'mono8': 1}
MAX_PIXELS = 4096 * 4096
MAX_COMPRESSED_BYTES = 64 * 1024 * 1024


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


def compressed_image(message) -> np.ndarray:
    """Return a sensor_msgs/CompressedImage (jpeg, png) as RGB (H, W, 3) uint8."""
    data = np.frombuffer(message.data, np.uint8)
    if not 0 < data.size <= MAX_COMPRESSED_BYTES:
        raise ValueError(f'compressed picture must have 1 to {MAX_COMPRESSED_BYTES} bytes, '
                         f'got {data.size}')
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
