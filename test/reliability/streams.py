"""How a stream of messages goes wrong: functions from a message to what is published in its place.

Each takes the message and a dict of its own, which holds only the stream's `period_s` when the
fault begins, and returns pairs (delay in seconds, message or its bytes).
"""

from __future__ import annotations

import copy
import math

import cv2
import numpy as np
from rclpy.serialization import serialize_message

from meanflow_ros.ros import to_messages
from meanflow_ros.ros.from_messages import time_ns
from reliability.robot import CAMERAS
from sensor_msgs.msg import CompressedImage, Image, JointState

FLOOD = 10


def restamped(message, add_ns: int):
    """Return a copy with a later stamp, or clock; what has none stays as it is."""
    other = copy.copy(message)
    if hasattr(message, 'header'):
        other.header = copy.deepcopy(message.header)
        other.header.stamp = to_messages.time(max(0, time_ns(message.header.stamp) + add_ns))
    elif hasattr(message, 'clock'):
        other.clock = to_messages.time(max(0, time_ns(message.clock) + add_ns))
    return other


def changed(message, **fields):
    """Return a copy with some fields changed."""
    other = restamped(message, 0)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def one(function):
    """Turn a function from message to message into a fault."""
    return lambda message, memory: [(0.0, function(message))]


def dropped(message, memory):
    """Send nothing."""
    return []


def lossy(message, memory):
    """Lose two of three."""
    memory['n'] = memory.get('n', 0) + 1
    return [(0.0, message)] if memory['n'] % 3 == 0 else []


def late(seconds):
    """Send so late, with the stamp of now."""
    return lambda message, memory: [(seconds, message)]


delayed = late(1.0)


def duplicated(message, memory):
    """Send everything twice, the second time half a period later."""
    return [(0.0, message), (memory['period_s'] / 2, message)]


def reordered(message, memory):
    """Swap each two: the earlier one comes half a period after the later one."""
    if 'held' not in memory:
        memory['held'] = message
        return []
    return [(0.0, message), (memory['period_s'] / 2, memory.pop('held'))]


def frozen(message, memory):
    """Send the first content for ever, with new stamps."""
    first = memory.setdefault('first', message)
    if not hasattr(message, 'header'):
        return [(0.0, first)]
    return [(0.0, restamped(first, time_ns(message.header.stamp) - time_ns(first.header.stamp)))]


def repeating(message, memory):
    """Send the first message for ever, its stamp too."""
    return [(0.0, memory.setdefault('first', message))]


def flooded(message, memory):
    """Send at ten times the rate, each with a stamp of its own."""
    step_s = memory['period_s'] / FLOOD
    return [(i * step_s, restamped(message, round(i * step_s * 1e9))) for i in range(FLOOD)]


def truncated(message, memory):
    """Send half of the message's bytes."""
    data = serialize_message(message)
    return [(0.0, data[:len(data) // 2])]


def garbled(message, memory):
    """Send bytes of the right length that mean nothing: every length in them is huge."""
    data = serialize_message(message)
    return [(0.0, data[:4] + b'\xff' * (len(data) - 4))]


def jpeg(edit):
    """Turn a function from a JPEG's bytes to others into a fault."""
    return one(lambda m: changed(m, data=edit(bytes(m.data))))


def _garbled_scan(data: bytes) -> bytes:
    """Return a JPEG of good headers and enough noise, without a marker in it."""
    begin = data.index(b'\xff\xda') + 14
    return data[:begin] + _noise.bytes(2 * len(data)).replace(b'\xff', b'\xfe') + b'\xff\xd9'


def _bomb(data: bytes) -> bytes:
    """Return a JPEG that declares 65500 x 65500 pixels, 13 GB when it is decoded."""
    frame = data.index(b'\xff\xc0')
    return data[:frame + 5] + 2 * (65500).to_bytes(2, 'big') + data[frame + 9:]


def compressed(picture) -> CompressedImage:
    """Return an Image as JPEG."""
    pixels = np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width, 3)
    return CompressedImage(header=picture.header, format='rgb8; jpeg compressed bgr8',
                           data=cv2.imencode('.jpg', pixels[..., ::-1])[1].tobytes())


_noise = np.random.default_rng(29)
ANY = {
    'dropped': dropped, 'lossy': lossy, 'delayed': delayed, 'duplicated': duplicated,
    'reordered': reordered, 'frozen': frozen, 'repeating': repeating, 'flooded': flooded,
    'truncated': truncated, 'garbled': garbled}

COMPRESSED = {
    **ANY,
    'empty': one(lambda m: CompressedImage(header=m.header)),
    'truncated_JPEG': jpeg(lambda data: data[:len(data) // 2]),
    'garbled_JPEG': jpeg(lambda data: _noise.bytes(len(data))),
    'garbled_scan': jpeg(_garbled_scan),
    'decompression_bomb': jpeg(_bomb),
}

CLOCK = {     # garbled, it is a negative time
    **ANY, 'delayed': late(0.6),
    'near_zero': one(lambda m: type(m)(clock=type(m.clock)(sec=3)))}

PICTURES = {
    **ANY,
    'empty': one(lambda m: Image()),
    'wrong_size': one(lambda m: changed(m, height=7, width=640, step=1920,
                                             data=(2 * bytes(m.data))[:13440])),
    'wrong_encoding': one(lambda m: changed(m, encoding='16UC1')),
    'short_data': one(lambda m: changed(m, data=bytes(100))),
    'huge_header': one(lambda m: changed(m, height=2**32 - 1, width=2**32 - 1)),
    'future': one(lambda m: restamped(m, 3600 * 10**9)),
    'zero_stamp': one(lambda m: restamped(m, -2**62)),
}

JOINTS = {
    **ANY,
    'empty': one(lambda m: JointState()),
    'nan': one(lambda m: changed(m, position=[*m.position[:-1], math.nan])),
    'infinite': one(lambda m: changed(m, position=[-math.inf, *m.position[1:]])),
    'far': one(lambda m: changed(m, position=[1e300] * len(m.position))),
    'missing_joint': one(lambda m: changed(m, name=m.name[:-1], position=m.position[:-1])),
    'lengths_differ': one(lambda m: changed(m, position=m.position[:-1])),
    'future': one(lambda m: restamped(m, 3600 * 10**9)),
    'zero_stamp': one(lambda m: restamped(m, -2**62)),
}


def a_million_names(message, memory):
    """Send a million joints beside the robot's, once a second."""
    memory['n'] = memory.get('n', -1) + 1
    if memory['n'] % 30:
        return []
    if 'message' not in memory:
        names = [f'j{i}' for i in range(10**6)]
        memory['message'] = changed(message, name=[*message.name, *names],
                                    position=[*message.position, *[0.0] * 10**6])
    return [(0.0, serialize_message(restamped(memory['message'], time_ns(
        message.header.stamp) - time_ns(memory['message'].header.stamp))))]


JOINTS['a_million_names'] = a_million_names

FAULTS = {'joints': JOINTS, 'instruction': ANY, 'description': ANY, 'clock': CLOCK,
          **dict.fromkeys(CAMERAS, PICTURES),
          **{f'{name}/compressed': COMPRESSED for name in CAMERAS}}
