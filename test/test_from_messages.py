"""ROS messages to arrays, on hand-made messages."""

import struct
import zlib
from time import monotonic
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from meanflow_ros.ros import from_messages
from meanflow_ros.ros.bag import TYPES

RGB = np.array([[[255, 0, 1], [2, 250, 3], [4, 5, 245]],
                [[10, 20, 30], [40, 50, 60], [70, 80, 91]]], np.uint8)   # 2 rows of 3 pixels
ALPHA = np.array([[[9], [8], [7]], [[6], [5], [4]]], np.uint8)
GREY = np.array([[[11], [22], [33]], [[44], [55], [66]]], np.uint8)
PIXELS = {'rgb8': RGB, 'bgr8': RGB[:, :, ::-1], 'mono8': GREY,
          'rgba8': np.concatenate([RGB, ALPHA], 2),
          'bgra8': np.concatenate([RGB[:, :, ::-1], ALPHA], 2)}


def image_message(encoding, padding=0, /, **changes):
    rows = PIXELS[encoding].reshape(2, -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=171)
    return SimpleNamespace(**{'encoding': encoding, 'width': 3, 'height': 2,
                              'step': padded.shape[1], 'is_bigendian': 0,
                              'data': padded.tobytes(), **changes})


@pytest.mark.parametrize('is_bigendian', [0, 1])
@pytest.mark.parametrize('padding', [0, 1, 5])
@pytest.mark.parametrize('encoding', PIXELS)
def test_every_encoding_gives_the_right_pixels(encoding, padding, is_bigendian):
    picture = from_messages.image(image_message(encoding, padding, is_bigendian=is_bigendian))
    expected = GREY.repeat(3, axis=2) if encoding == 'mono8' else RGB
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.parametrize('kind', [bytes, bytearray, memoryview, np.frombuffer])
def test_the_data_may_be_any_kind_of_buffer(kind):
    data = RGB.tobytes()
    data = kind(data, np.uint8) if kind is np.frombuffer else kind(data)
    np.testing.assert_array_equal(from_messages.image(image_message('rgb8', data=data)), RGB)


def test_rgb8_without_padding_is_not_copied():
    data = np.frombuffer(RGB.tobytes(), np.uint8)
    assert np.shares_memory(from_messages.image(image_message('rgb8', data=data)), data)


def test_a_message_of_a_bag_is_read_like_any_other():
    header = TYPES.types['std_msgs/msg/Header'](
        stamp=TYPES.types['builtin_interfaces/msg/Time'](sec=5, nanosec=7), frame_id='')
    message = TYPES.types['sensor_msgs/msg/Image'](
        header=header, height=2, width=3, encoding='bgr8', is_bigendian=0, step=9,
        data=np.frombuffer(PIXELS['bgr8'].tobytes(), np.uint8))
    np.testing.assert_array_equal(from_messages.image(message), RGB)
    assert from_messages.time_ns(message.header.stamp) == 5_000_000_007


@pytest.mark.parametrize('changes, message', [
    ({'encoding': '16UC1'}, "encoding '16UC1' is not supported, use one of rgb8, bgr8"),
    ({'encoding': 'x' * 9999}, "encoding 'x{40}' is not supported"),
    ({'data': RGB.tobytes()[:-1]}, 'data has 17 bytes but step 9 x height 2 needs 18'),
    ({'data': RGB.tobytes() + b'\0'}, 'data has 19 bytes'),
    ({'data': b''}, 'data has 0 bytes'),
    ({'width': 0}, 'no pixels: 0x2'),
    ({'height': 0, 'data': b''}, 'no pixels: 3x0'),
    ({'step': 8, 'data': RGB.tobytes()[:16]}, 'step is 8 bytes but a row of 3 rgb8 .* takes 9'),
    ({'step': 0, 'data': b''}, 'step is 0 bytes'),
    ({'width': 4097, 'height': 4096, 'step': 4097 * 3}, '4097x4096 is over the cap'),
    ({'width': 2**32 - 1, 'height': 2**32 - 1}, 'over the cap'),
])
def test_a_malformed_picture_is_refused(changes, message):
    broken = image_message('rgb8', **changes)
    with pytest.raises(ValueError, match=message):
        from_messages.image(broken)
    with pytest.raises(ValueError, match=message):
        from_messages.check_image(broken)


def test_rgba_data_does_not_pass_as_rgb():
    message = image_message('rgba8', encoding='rgb8', step=9)
    with pytest.raises(ValueError, match='data has 24 bytes'):
        from_messages.image(message)


def compressed(extension, picture, **changes):
    done, data = cv2.imencode(extension, picture)
    assert done
    return SimpleNamespace(**{'format': extension[1:], 'data': data.reshape(-1), **changes})


def test_a_png_is_decoded_exactly():
    np.testing.assert_array_equal(
        from_messages.compressed_image(compressed('.png', RGB[:, :, ::-1])), RGB)


def test_a_jpeg_is_decoded_in_rgb_order():
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:] = (200, 100, 30)
    found = from_messages.compressed_image(compressed('.jpg', picture[:, :, ::-1].copy()))
    assert found.shape == (32, 48, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - picture).max() <= 4


def test_a_grey_and_a_transparent_png_become_rgb():
    grey = from_messages.compressed_image(compressed('.png', GREY))
    np.testing.assert_array_equal(grey, GREY.repeat(3, axis=2))
    opaque = np.concatenate([RGB[:, :, ::-1], np.full((2, 3, 1), 255, np.uint8)], 2)
    np.testing.assert_array_equal(
        from_messages.compressed_image(compressed('.png', opaque)), RGB)


@pytest.mark.parametrize('data, message', [
    (b'', 'must have 1 to 67108864 bytes, got 0'),
    (b'not a picture', r"\('png', 13 bytes\) cannot be decoded"),
    (b'\xff\xd8\xff\xe0', 'cannot be decoded'),
    (b'\x89PNG\r\n\x1a\n' + b'\0' * 40, 'cannot be decoded'),
])
def test_broken_compressed_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        from_messages.compressed_image(SimpleNamespace(format='png', data=data))


def test_compressed_data_over_the_cap_is_refused():
    data = np.zeros(from_messages.MAX_COMPRESSED_BYTES + 1, np.uint8)
    with pytest.raises(ValueError, match='got 67108865'):
        from_messages.compressed_image(SimpleNamespace(format='jpeg', data=data))


def test_a_few_bytes_that_stand_for_gigapixels_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(from_messages.cv2, 'imdecode', lambda *_: pytest.fail('decoded'))
    png = compressed('.png', RGB).data.tobytes()
    bomb = png[:16] + struct.pack('>II', 60000, 60001) + png[24:]
    jpeg = compressed('.jpg', np.zeros((32, 48, 3), np.uint8)).data.tobytes()
    frame = jpeg.index(b'\xff\xc0')
    thumbnail = b'\xff\xc0\x00\x11\x08\x00\x10\x00\x10'     # its frame is not the picture's
    section = b'\xff\xe1' + struct.pack('>H', 2 + len(thumbnail)) + thumbnail
    large = (jpeg[:2] + section + b'\xff' + jpeg[2:frame + 5] + struct.pack('>HH', 65500, 65499)
             + jpeg[frame + 9:])
    for data, size in ((bomb, '60000x60001'), (large, '65499x65500')):
        with pytest.raises(ValueError, match=f'of {size} is over the cap'):
            from_messages.compressed_image(SimpleNamespace(format='', data=data))


@pytest.mark.parametrize('extension', ['.bmp', '.tiff', '.webp'])
def test_only_jpeg_and_png_are_decoded(extension):
    with pytest.raises(ValueError, match='no header of a JPEG or PNG'):
        from_messages.compressed_image(compressed(extension, RGB))


def joints(names, positions):
    return SimpleNamespace(name=names, position=positions)


def test_joints_are_matched_by_name_in_any_order():
    message = joints(['wrist', 'grip', 'elbow', 'base'], [0.31, -7.0, 1.7, -0.2])
    found = from_messages.joint_positions(message, ['base', 'wrist', 'elbow'])
    assert found.dtype == np.float64
    assert found.tolist() == [-0.2, 0.31, 1.7]


def test_a_joint_that_is_not_asked_for_may_be_nan():
    message = joints(['a', 'b'], [0.31, float('nan')])
    assert from_messages.joint_positions(message, ['a']).tolist() == [0.31]


@pytest.mark.parametrize('message, error', [
    (joints(['a', 'c'], [0.1, 0.2]), "joint state has no 'b', it has a, c"),
    (joints([], []), "joint state has no 'a', it has no joints"),
    (joints(['a', 'b'], [0.1, float('nan')]), "joint 'b' is not finite: nan"),
    (joints(['b', 'a'], [0.1, float('-inf')]), "joint 'a' is not finite: -inf"),
    (joints(['a', 'b'], [0.1]), '2 names but 1 positions'),
    (joints(['a', 'b'], []), '2 names but 0 positions'),
])
def test_a_bad_joint_state_is_refused(message, error):
    with pytest.raises(ValueError, match=error):
        from_messages.joint_positions(message, ['a', 'b'])


def time(seconds, nanoseconds=0):
    return SimpleNamespace(sec=seconds, nanosec=nanoseconds)


def trajectory(names, *points):
    return SimpleNamespace(
        header=SimpleNamespace(stamp=time(1_700_000_000, 123_456_789)), joint_names=names,
        points=[SimpleNamespace(positions=positions, time_from_start=time(*start))
                for positions, start in points])


def test_a_trajectory_is_put_in_the_order_of_the_action_space():
    message = trajectory(['z', 'x', 'y'], ([3.3, 1.1, 2.2], (0, 33_300_000)),
                         ([6.6, 4.4, 5.5], (1, 5)))
    found = from_messages.timed_actions(message, ('x', 'y', 'z'))
    assert found.stamp_ns == 1_700_000_000_123_456_789
    assert (found.due_ns - found.stamp_ns).tolist() == [33_300_000, 1_000_000_005]
    assert found.actions.tolist() == [[1.1, 2.2, 3.3], [4.4, 5.5, 6.6]]


@pytest.mark.parametrize('message, error', [
    (trajectory(['x'], ([0.1], (0, 1))), r"trajectory is for \['x'\], expected \['x', 'y'\]"),
    (trajectory(['x', 'z'], ([0.1, 0.2], (0, 1))), r"trajectory is for \['x', 'z'\]"),
    (trajectory(['x', 'x'], ([0.1, 0.2], (0, 1))), 'trajectory is for'),
    (trajectory(['x', 'y', 'y'], ([0.1, 0.2, 0.3], (0, 1))), 'trajectory is for'),
    (trajectory(['x', 'y']), 'must have points of 2 positions'),
    (trajectory(['x', 'y'], ([0.1], (0, 1))), 'must have points of 2 positions'),
    (trajectory(['x', 'y'], ([0.1, 0.2], (0, 1)), ([], (0, 2))), 'must have points of 2'),
    (trajectory(['x', 'y'], ([0.1, float('nan')], (0, 1))), 'not finite'),
    (trajectory(['x', 'y'], ([0.1, 0.2], (0, 5)), ([0.1, 0.2], (0, 5))), 'due times must incr'),
])
def test_a_bad_trajectory_is_refused(message, error):
    with pytest.raises(ValueError, match=error):
        from_messages.timed_actions(message, ('x', 'y'))


def png_with(length: int | None = None, chunks: int = 0, cut: int = 0) -> bytes:
    """Return a PNG: of an IDAT that says this length, with empty chunks, without its end."""
    data = cv2.imencode('.png', np.full((16, 20, 3), 90, np.uint8))[1].tobytes()
    at = data.index(b'IDAT') - 4
    empty = b'\0\0\0\0tEXt' + zlib.crc32(b'tEXt').to_bytes(4, 'big')
    told = data[at:at + 4] if length is None else length.to_bytes(4, 'big')
    return (data[:at] + empty * chunks + told + data[at + 4:])[:len(data) - cut if cut else None]


@pytest.mark.parametrize('length', [2**32 - 1, 2**31 - 1, 0xa70000d2, 2**20, 300])
def test_a_png_whose_chunk_says_that_gigabytes_follow_is_refused_at_once(length):
    message = SimpleNamespace(format='png', data=png_with(length))
    began = monotonic()
    with pytest.raises(ValueError, match='the chunk of the PNG at byte 33 is not whole'):
        from_messages.compressed_image(message)
    assert monotonic() - began < 0.1    # OpenCV makes room for it, for up to 17 s


def test_a_png_that_is_cut_off_or_has_no_end_of_chunks_is_refused_and_a_whole_one_is_not():
    for data, reason in ((png_with(cut=5), 'is not whole'), (png_with(cut=12), 'is not whole'),
                         (png_with(chunks=2**16), 'more than 65536 chunks')):
        with pytest.raises(ValueError, match=reason):
            from_messages.check_compressed_image(SimpleNamespace(format='png', data=data))
    for data in (png_with(), png_with(chunks=100), png_with() + b'trailing'):
        picture = from_messages.compressed_image(SimpleNamespace(format='png', data=data))
        assert picture.shape == (16, 20, 3) and (picture == 90).all()
