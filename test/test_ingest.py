"""Streams of messages to one observation, or to the reason why there is none."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from meanflow_ros.core.contract import ActionSpace, CameraSpec, RobotSpec
from meanflow_ros.ros import from_messages
from meanflow_ros.ros.bag import TYPES
from meanflow_ros.ros.ingest import COMPRESSED_IMAGE, IMAGE, Ingest
from meanflow_ros.ros.streams import IngestLimits, NoObservation, read_ages

MS = 1_000_000
T0 = 1_700_000_000_123_456_789
ROBOT = RobotSpec(
    robot='arm', state_names=('elbow', 'base'), horizon=3, period_s=0.0333,
    cameras=tuple(CameraSpec(name=name, width=3, height=2) for name in ('front', 'wrist')),
    action_space=ActionSpace(name='eef', dimensions=('x',), units=('m',), lower=[-0.3],
                             upper=[0.7]))


def header(stamp_ns):
    return SimpleNamespace(stamp=SimpleNamespace(sec=stamp_ns // 10**9,
                                                 nanosec=stamp_ns % 10**9))


def picture(stamp_ns, value=7, **changes):
    return SimpleNamespace(**{
        'header': header(stamp_ns), 'encoding': 'rgb8', 'width': 3, 'height': 2, 'step': 9,
        'is_bigendian': 0, 'data': bytes([value] * 18), **changes})


def joints(stamp_ns, names=('base', 'elbow'), positions=(-0.2, 1.7)):
    return SimpleNamespace(header=header(stamp_ns), name=list(names), position=list(positions))


def feed(ingest, stamp_ns, *, now_ns=None, leave_out=(), value=7):
    """Give every stream one good message of this stamp."""
    now_ns = stamp_ns if now_ns is None else now_ns
    for camera in ('front', 'wrist'):
        if camera not in leave_out:
            ingest.add_image(camera, picture(stamp_ns, value), now_ns=now_ns)
    if 'joints' not in leave_out:
        ingest.add_joint_state(joints(stamp_ns), now_ns=now_ns)
    if 'instruction' not in leave_out:
        ingest.set_instruction('open it')


def why_not(ingest, now_ns):
    with pytest.raises(NoObservation) as caught:
        ingest.observe(now_ns=now_ns)
    assert str(caught.value) == f'{caught.value.stream}: {caught.value.reason}'
    return caught.value


@pytest.fixture
def ingest():
    return Ingest(ROBOT)


def test_messages_of_one_stamp_make_one_observation(ingest):
    ingest.add_image('front', picture(T0, 11), now_ns=T0)
    ingest.add_image('wrist', picture(T0, 22), now_ns=T0)
    ingest.add_joint_state(joints(T0), now_ns=T0)
    ingest.set_instruction('  open it ')
    seen = ingest.observe(now_ns=T0)
    assert seen.stamp_ns == T0
    assert seen.instruction == 'open it'
    assert seen.state.tolist() == [1.7, -0.2]
    assert {name: (image.shape, set(image.flat)) for name, image in seen.images.items()} == {
        'front': ((2, 3, 3), {11}), 'wrist': ((2, 3, 3), {22})}


def test_of_two_cameras_at_different_rates_the_newest_pictures_that_belong_together_are_used(
        ingest):
    ingest.set_instruction('open it')
    for i in range(7):                                             # 30 Hz against 7.5 Hz
        ingest.add_image('front', picture(T0 + i * 33 * MS, 10 + i), now_ns=T0 + 250 * MS)
    for i in range(2):
        ingest.add_image('wrist', picture(T0 + (5 + i * 133) * MS, 20 + i), now_ns=T0 + 250 * MS)
    for i in range(25):
        ingest.add_joint_state(joints(T0 + i * 10 * MS, positions=(i, -i)), now_ns=T0 + 250 * MS)
    seen = ingest.observe(now_ns=T0 + 250 * MS)
    assert (seen.images['front'][0, 0, 0], seen.images['wrist'][0, 0, 0]) == (14, 21)
    assert seen.stamp_ns == T0 + 132 * MS      # the front picture, 6 ms older than the other
    assert seen.state.tolist() == [-13.0, 13.0]


def test_t_obs_is_the_stamp_of_the_oldest_picture_used(ingest):
    feed(ingest, T0, leave_out=['wrist'])
    ingest.add_image('wrist', picture(T0 - 17 * MS), now_ns=T0)
    assert ingest.observe(now_ns=T0 + 3 * MS).stamp_ns == T0 - 17 * MS


def test_newest_stamps_name_every_stream(ingest):
    feed(ingest, T0, leave_out=['joints'])
    assert ingest.newest_stamps_ns() == {
        'camera/front': T0, 'camera/wrist': T0, 'joint_states': None}


@pytest.mark.parametrize('left_out, stream', [
    ('front', 'camera/front'), ('wrist', 'camera/wrist'), ('joints', 'joint_states'),
    ('instruction', 'instruction')])
def test_a_stream_that_never_came_is_waited_for_by_name(ingest, left_out, stream):
    feed(ingest, T0, leave_out=[left_out])
    missing = why_not(ingest, T0)
    assert missing.stream == stream and 'received' in missing.reason and missing.waiting
    feed(ingest, T0 + MS)
    assert ingest.observe(now_ns=T0 + MS).stamp_ns == T0 + MS


@pytest.mark.parametrize('stopped, stream', [
    ('front', 'camera/front'), ('wrist', 'camera/wrist'), ('joints', 'joint_states')])
def test_the_stream_that_stopped_is_the_one_that_is_named(ingest, stopped, stream):
    feed(ingest, T0)
    for i in range(1, 31):
        feed(ingest, T0 + i * 33 * MS, leave_out=[stopped])
    now_ns = T0 + 30 * 33 * MS
    stale = why_not(ingest, now_ns)
    assert stale.stream == stream and not stale.waiting
    assert '0.990 s old, at most 0.5 s is allowed' in stale.reason
    feed(ingest, now_ns + 33 * MS)
    assert ingest.observe(now_ns=now_ns + 33 * MS).stamp_ns == now_ns + 33 * MS


def test_a_picture_is_usable_up_to_the_age_limit_and_not_a_nanosecond_more(ingest):
    feed(ingest, T0)
    assert ingest.observe(now_ns=T0 + 500 * MS).stamp_ns == T0
    assert 'old' in why_not(ingest, T0 + 500 * MS + 1).reason


@pytest.mark.parametrize('stamp_ns, reason', [
    (T0 - 40 * MS, 'stamp goes backward by 0.040 s'),
    (T0, 'stamp repeats'),
    (T0 + 301 * MS, 'stamp is 0.300 s in the future')])
def test_a_stamp_out_of_order_stops_observations_until_the_next_good_one(
        ingest, stamp_ns, reason):
    feed(ingest, T0)
    now_ns = T0 + MS
    for stream, add in (
            ('camera/wrist', lambda stamp: ingest.add_image('wrist', picture(stamp),
                                                            now_ns=now_ns)),
            ('joint_states', lambda stamp: ingest.add_joint_state(joints(stamp),
                                                                  now_ns=now_ns))):
        with pytest.raises(ValueError, match=reason):
            add(stamp_ns)
        fault = why_not(ingest, now_ns)
        assert (fault.stream, fault.reason, fault.waiting) == (stream, reason, False)
        add(T0 + 1)
        assert ingest.observe(now_ns=now_ns).stamp_ns == T0


def test_a_stamp_a_little_in_the_future_is_taken(ingest):
    feed(ingest, T0 + 250 * MS, now_ns=T0)
    assert ingest.observe(now_ns=T0).stamp_ns == T0 + 250 * MS


@pytest.mark.parametrize('changes, reason', [
    ({'encoding': 'yuv422'}, "encoding 'yuv422' is not supported"),
    ({'data': bytes(17)}, 'data has 17 bytes'),
    ({'width': 0}, 'no pixels'),
    ({'height': 0, 'data': b''}, 'no pixels'),
    ({'step': 8, 'data': bytes(16)}, 'step is 8 bytes')])
def test_a_malformed_picture_stops_observations_until_the_next_good_one(ingest, changes, reason):
    feed(ingest, T0)
    with pytest.raises(ValueError, match=reason):
        ingest.add_image('front', picture(T0 + MS, **changes), now_ns=T0 + MS)
    fault = why_not(ingest, T0 + MS)
    assert fault.stream == 'camera/front' and reason in fault.reason
    ingest.add_image('front', picture(T0 + 2 * MS), now_ns=T0 + 2 * MS)
    assert ingest.observe(now_ns=T0 + 2 * MS).stamp_ns == T0


@pytest.mark.parametrize('message, reason', [
    (joints(T0 + MS, positions=(float('nan'), 1.7)), "joint 'base' is not finite"),
    (joints(T0 + MS, names=('base', 'grip')), "joint state has no 'elbow'"),
    (joints(T0 + MS, positions=(1.0,)), '2 names but 1 positions')])
def test_a_bad_joint_state_stops_observations_until_the_next_good_one(ingest, message, reason):
    feed(ingest, T0)
    with pytest.raises(ValueError, match=reason):
        ingest.add_joint_state(message, now_ns=T0 + MS)
    fault = why_not(ingest, T0 + MS)
    assert fault.stream == 'joint_states' and reason in fault.reason
    ingest.add_joint_state(joints(T0 + 2 * MS), now_ns=T0 + 2 * MS)
    assert ingest.observe(now_ns=T0 + 2 * MS).stamp_ns == T0


def test_pictures_too_far_apart_do_not_make_an_observation(ingest):
    feed(ingest, T0, leave_out=['wrist'])
    ingest.add_image('wrist', picture(T0 + 61 * MS), now_ns=T0 + 61 * MS)
    fault = why_not(ingest, T0 + 61 * MS)
    assert fault.stream == 'camera/front'
    assert fault.reason == 'is 0.061 s behind camera/wrist, at most 0.06 s is allowed'
    ingest.add_image('front', picture(T0 + 2 * MS), now_ns=T0 + 61 * MS)
    ingest.add_joint_state(joints(T0 + 61 * MS), now_ns=T0 + 61 * MS)
    assert ingest.observe(now_ns=T0 + 61 * MS).stamp_ns == T0 + 2 * MS


def test_a_joint_state_too_far_from_the_pictures_is_not_used(ingest):
    feed(ingest, T0, leave_out=['joints'])
    ingest.add_joint_state(joints(T0 - 61 * MS), now_ns=T0)
    fault = why_not(ingest, T0)
    assert fault.stream == 'joint_states' and '0.061 s apart' in fault.reason


def test_the_limits_are_those_that_were_given():
    ingest = Ingest(ROBOT, limits=IngestLimits(max_age_s=0.01, max_skew_s=0.002, future_s=0.001))
    feed(ingest, T0)
    assert '0.011 s old, at most 0.01 s' in why_not(ingest, T0 + 11 * MS).reason
    with pytest.raises(ValueError, match='in the future'):
        ingest.add_image('front', picture(T0 + 2 * MS), now_ns=T0)
    ingest.add_image('front', picture(T0 + 3 * MS), now_ns=T0 + 3 * MS)
    ingest.add_image('wrist', picture(T0 + 6 * MS), now_ns=T0 + 6 * MS)
    ingest.add_joint_state(joints(T0 + 3 * MS), now_ns=T0 + 6 * MS)
    assert '0.003 s apart' in why_not(ingest, T0 + 6 * MS).reason


AGES = {'camera/wrist': 0.2, 'joint_states': 0.05}


@pytest.mark.parametrize('late, stream, words', [
    (dict(front=500, wrist=200, joints=50), None, ''),        # each at its limit
    (dict(front=501, wrist=200, joints=50), 'camera/front', '0.501 s old, at most 0.5 s'),
    (dict(front=500, wrist=201, joints=50), 'camera/wrist', '0.201 s old, at most 0.2 s'),
    (dict(front=500, wrist=200, joints=51), 'joint_states', '0.051 s old, at most 0.05 s'),
    (dict(front=530, wrist=210, joints=70), 'camera/front', '0.530 s'),    # 30, 10, 20 beyond
    (dict(front=530, wrist=210, joints=90), 'joint_states', '0.090 s')])   # 30, 10, 40 beyond
def test_every_stream_has_its_own_largest_age(late, stream, words):
    ingest = watchful(max_age_s=0.5, max_ages_s=AGES, max_skew_s=1.0)
    feed(ingest, T0, leave_out=['front', 'wrist', 'joints'])
    now_ns = T0 + 1000 * MS
    for camera in ('front', 'wrist'):
        ingest.add_image(camera, picture(now_ns - late[camera] * MS), now_ns=now_ns)
    ingest.add_joint_state(joints(now_ns - late['joints'] * MS), now_ns=now_ns)
    if stream is None:
        assert ingest.observe(now_ns=now_ns).stamp_ns == now_ns - 500 * MS
    else:
        fault = why_not(ingest, now_ns)
        assert (fault.stream, fault.kind) == (stream, 'stale') and words in fault.reason


@pytest.mark.parametrize('stream, at_ms', [('camera/front', 501), ('camera/wrist', 201),
                                           ('joint_states', 51)])
def test_every_stream_may_be_silent_for_its_own_age_though_its_stamps_run_ahead(stream, at_ms):
    ages = {'camera/front': 0.5, **AGES}
    ingest = watchful(max_age_s=9.0, max_ages_s={stream: ages[stream]})
    feed(ingest, T0 + 200 * MS, now_ns=T0)
    assert ingest.observe(now_ns=T0 + (at_ms - 1) * MS).stamp_ns == T0 + 200 * MS
    fault = why_not(ingest, T0 + (at_ms if at_ms < 202 else at_ms + 200) * MS)
    assert (fault.stream, fault.kind) == (stream, 'stale')
    assert f'at most {ages[stream]:g} s is allowed' in fault.reason


def test_a_fresh_joint_state_beside_older_pictures_is_not_stale():
    ingest = watchful(max_ages_s={'joint_states': 0.02})
    for late in range(0, 300, 10):
        ingest.add_joint_state(joints(T0 + late * MS), now_ns=T0 + late * MS)
    feed(ingest, T0 + 100 * MS, now_ns=T0 + 290 * MS, leave_out=['joints'])
    observation = ingest.observe(now_ns=T0 + 300 * MS)
    assert observation.stamp_ns == T0 + 100 * MS
    assert why_not(ingest, T0 + 311 * MS).stream == 'joint_states'


@pytest.mark.parametrize('ages, reason', [
    ({'camera/wirst': 0.2}, "no stream 'camera/wirst' .did you mean 'camera/wrist'"),
    ({'wrist': 0.2}, "no stream 'wrist'"), ({'instruction': 1.0}, "no stream 'instruction'"),
    *(({'joint_states': value}, "max_ages_s of 'joint_states' must be a number above 0 and below")
      for value in (0.0, -1, 3600.0, float('nan'), 'old', True, None))])
def test_an_age_of_a_stream_that_is_none_or_out_of_range_is_refused_by_name(ages, reason):
    with pytest.raises(ValueError, match=reason):
        watchful(max_ages_s=ages)
    with pytest.raises(ValueError, match='max_ages_s'):
        Ingest(dataclasses.replace(ROBOT, state_names=()),
               limits=IngestLimits(max_ages_s={'joint_states': 0.1}))


def test_ages_are_read_from_words_and_what_is_none_is_explained():
    assert read_ages('') == {} == read_ages('  ')
    assert read_ages('camera/wrist:=0.2  joint_states:=5e-2') == AGES
    for text, reason in (('joint_states', 'STREAM:=SECONDS'), (':=3', 'STREAM:=SECONDS'),
                         ('joint_states:=soon', "got 'joint_states:=soon'"),
                         ('a:=1 a:=2', "'a' twice")):
        with pytest.raises(ValueError, match=reason):
            read_ages(text)


@pytest.mark.parametrize('name', ['max_age_s', 'max_skew_s', 'future_s'])
@pytest.mark.parametrize('value', [0.0, -1.0, 3600.0, float('nan')])
def test_limits_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f'{name} must be above 0 and below 3600'):
        IngestLimits(**{name: value})


@pytest.mark.parametrize('text, reason', [
    ('', 'instruction is empty'), (' \n', 'instruction is empty'),
    ('x' * 100_000, 'at most 4096 bytes, got 100000'), ('open \ufffd', 'not valid UTF-8'),
    ('open \udcff', 'not valid UTF-8')])
def test_a_bad_instruction_stops_observations_until_the_next_good_one(ingest, text, reason):
    feed(ingest, T0)
    with pytest.raises(ValueError, match=reason):
        ingest.set_instruction(text)
    fault = why_not(ingest, T0)
    assert fault.stream == 'instruction' and reason in fault.reason
    assert ingest.set_instruction(' 关上 ') == '关上'
    assert ingest.observe(now_ns=T0).instruction == '关上'


@pytest.mark.parametrize('data, reason', [
    (b'\0\1\0\0' + b'\xff' * 12, 'not a std_msgs/msg/String'), (b'', 'not a std_msgs/msg/String'),
    (b'\0\1\0\0\3\0\0\0a\xff\0', 'is not valid UTF-8'),
    (b'\0\1\0\0\2\x10\0\0' + b'x' * 4097 + b'\0', 'at most 4096 bytes, got 4097')])
def test_bytes_that_are_no_instruction_stop_observations_too(ingest, data, reason):
    feed(ingest, T0)
    with pytest.raises(ValueError, match=reason):
        ingest.set_serialized_instruction(data)
    assert why_not(ingest, T0).stream == 'instruction' and ingest.instruction is None
    good = b'\0\1\0\0\5\0\0\0open\0'
    assert ingest.set_serialized_instruction(good) == ingest.instruction == 'open'
    assert ingest.observe(now_ns=T0).instruction == 'open'


@pytest.mark.parametrize('data, reason', [
    (b'\0\1\0\0' + b'\xff' * 60, 'not a sensor_msgs/msg/JointState'),
    (bytes(2**18 + 1), 'joint state has 262145 bytes, at most 262144 are read')])
def test_bytes_that_are_no_joint_state_stop_observations(ingest, data, reason):
    feed(ingest, T0)
    with pytest.raises(ValueError, match=reason):
        ingest.add_serialized_joint_state(data, now_ns=T0)
    fault = why_not(ingest, T0)
    assert fault.stream == 'joint_states' and reason in fault.reason


@pytest.mark.parametrize('type_name', [IMAGE, COMPRESSED_IMAGE])
def test_a_picture_message_with_too_many_bytes_is_refused_before_it_is_read(
        ingest, monkeypatch, type_name):
    feed(ingest, T0)
    monkeypatch.setattr('meanflow_ros.ros.ingest.deserialize', None)
    with pytest.raises(ValueError, match='picture message has 68157441 bytes, at most 68157440'):
        ingest.add_serialized('front', bytes(65 * 2**20 + 1), type_name, now_ns=T0 + MS)
    fault = why_not(ingest, T0 + MS)
    assert (fault.stream, fault.kind) == ('camera/front', 'malformed')


def test_the_largest_picture_that_is_allowed_is_read(ingest):
    side, frame = 4096, 'x' * 1000
    message = TYPES.types[IMAGE](
        header=TYPES.types['std_msgs/msg/Header'](
            stamp=TYPES.types['builtin_interfaces/msg/Time'](sec=5, nanosec=0), frame_id=frame),
        height=side, width=side, encoding='rgba8', is_bigendian=0, step=4 * side + 128,
        data=np.zeros(side * (4 * side + 128), np.uint8))
    data = TYPES.serialize_cdr(message, IMAGE)
    ingest.add_serialized('front', data, IMAGE, now_ns=5 * 10**9)
    assert ingest.newest_stamps_ns()['camera/front'] == 5 * 10**9


def test_the_default_instruction_serves_until_one_comes():
    ingest = Ingest(ROBOT, default_instruction=' wait here ')
    feed(ingest, T0, leave_out=['instruction'])
    assert ingest.observe(now_ns=T0).instruction == 'wait here'
    ingest.set_instruction('open it')
    assert ingest.observe(now_ns=T0).instruction == 'open it'
    with pytest.raises(ValueError):
        ingest.set_instruction('')
    assert why_not(ingest, T0).stream == 'instruction'


@pytest.mark.parametrize('default', ['  ', 'x' * 5000])
def test_a_bad_default_instruction_is_refused_at_once(default):
    with pytest.raises(ValueError, match='instruction'):
        Ingest(ROBOT, default_instruction=default)


def test_a_backward_jump_of_the_clock_forgets_everything_and_is_returned(ingest):
    assert ingest.clock(T0) is None
    feed(ingest, T0)
    assert ingest.clock(T0) is None
    assert ingest.clock(T0 - 2500 * MS) == pytest.approx(-2.5)
    assert set(ingest.newest_stamps_ns().values()) == {None}
    assert why_not(ingest, T0 - 2500 * MS).waiting
    feed(ingest, T0 - 2400 * MS, leave_out=['instruction'])
    assert ingest.clock(T0 - 2400 * MS) is None
    assert ingest.observe(now_ns=T0 - 2400 * MS).stamp_ns == T0 - 2400 * MS


def test_a_backward_jump_of_the_clock_forgets_faults_too(ingest):
    ingest.clock(T0)
    feed(ingest, T0)
    with pytest.raises(ValueError):
        ingest.add_image('front', picture(T0), now_ns=T0)
    ingest.clock(T0 - MS)
    assert 'repeats' not in why_not(ingest, T0 - MS).reason


def test_a_jump_of_the_clock_is_the_reason_until_every_stream_has_come_again(ingest):
    ingest.clock(T0)
    feed(ingest, T0)
    ingest.clock(T0 - 2500 * MS)
    feed(ingest, T0 - 2500 * MS, leave_out=['wrist'])
    fault = why_not(ingest, T0 - 2500 * MS)
    assert (fault.stream, fault.kind, fault.waiting) == ('clock', 'clock', True)
    assert fault.reason == 'it jumped back by 2.500 s, nothing of camera/wrist since'
    feed(ingest, T0 - 2490 * MS)
    ingest.observe(now_ns=T0 - 2490 * MS)
    ingest.reset()
    assert why_not(ingest, T0 - 2490 * MS).kind == 'absent'


def test_a_robot_without_proprioception_needs_no_joint_states():
    blind = RobotSpec(robot='arm', state_names=(), cameras=ROBOT.cameras, horizon=3,
                      action_space=ROBOT.action_space, period_s=0.0333)
    ingest = Ingest(blind)
    ingest.add_joint_state(joints(T0, positions=(float('nan'), 0.0)), now_ns=T0)
    feed(ingest, T0, leave_out=['joints'])
    assert ingest.observe(now_ns=T0).state is None


def test_a_compressed_picture_is_decoded_and_a_broken_one_is_named(ingest):
    feed(ingest, T0, leave_out=['wrist'])
    with pytest.raises(ValueError, match='cannot be decoded'):
        ingest.add_compressed_image('wrist', SimpleNamespace(
            header=header(T0), format='jpeg', data=b'\xff\xd8 broken'), now_ns=T0)
    fault = why_not(ingest, T0)
    assert fault.stream == 'camera/wrist' and 'cannot be decoded' in fault.reason
    red = np.zeros((2, 3, 3), np.uint8)
    red[:, :, 2] = 201
    ingest.add_compressed_image('wrist', SimpleNamespace(
        header=header(T0 + MS), format='png', data=cv2.imencode('.png', red)[1].reshape(-1)),
        now_ns=T0 + MS)
    ingest.add_image('front', picture(T0 + MS), now_ns=T0 + MS)
    assert ingest.observe(now_ns=T0 + MS).images['wrist'][0, 0].tolist() == [201, 0, 0]


def test_a_jump_ahead_of_steady_time_forgets_everything_and_is_returned(ingest):
    ingest.clock(T0, 5 * MS)
    feed(ingest, T0)
    assert ingest.clock(T0 + 990 * MS, 5 * MS) is None        # less than a second: no jump
    assert ingest.clock(T0 + 3000 * MS, 15 * MS) == pytest.approx(2.0)
    assert why_not(ingest, T0 + 3000 * MS).waiting
    assert ingest.clock(T0 + 9000 * MS, 6015 * MS) is None    # time that has really passed


def test_simulated_time_may_run_fast(ingest):
    ingest.clock(T0)
    feed(ingest, T0)
    assert ingest.clock(T0 + 400 * MS) is None and ingest.clock(T0 + 90_000 * MS) is None
    assert not why_not(ingest, T0 + 90_000 * MS).waiting


@pytest.mark.parametrize(('break_it', 'kind'), [
    (lambda ingest: ingest.add_image('front', picture(T0 + 2 * MS, width=5), now_ns=T0),
     'malformed'),
    (lambda ingest: ingest.add_image('front', picture(T0), now_ns=T0), 'order'),
    (lambda ingest: ingest.add_image('front', picture(T0 + 9000 * MS), now_ns=T0), 'future'),
    (lambda ingest: ingest.set_instruction(' '), 'malformed'),
])
def test_what_is_wrong_with_an_input_has_a_kind(ingest, break_it, kind):
    feed(ingest, T0)
    with pytest.raises(ValueError):
        break_it(ingest)
    assert why_not(ingest, T0).kind == kind


def test_absent_stale_and_skewed_are_kinds_too(ingest):
    assert why_not(ingest, T0).kind == 'absent'
    feed(ingest, T0)
    assert why_not(ingest, T0 + 501 * MS).kind == 'stale'
    feed(ingest, T0 + 600 * MS, leave_out=['wrist'])
    assert why_not(ingest, T0 + 640 * MS).kind == 'stale'
    ingest.add_image('wrist', picture(T0 + 700 * MS), now_ns=T0 + 700 * MS)
    assert why_not(ingest, T0 + 700 * MS).kind == 'skew'


def test_every_stream_is_old_by_its_arrival_too(ingest):
    feed(ingest, T0 + 200 * MS, now_ns=T0)     # stamps that run ahead
    assert ingest.observe(now_ns=T0 + 500 * MS).stamp_ns == T0 + 200 * MS
    reason = why_not(ingest, T0 + 501 * MS)
    assert reason.kind == 'stale' and reason.reason.startswith('nothing has come for 0.501 s')


def watchful(**limits):
    return Ingest(ROBOT, limits=IngestLimits(**limits))


def test_a_camera_that_repeats_a_picture_is_frozen_until_it_changes():
    ingest = watchful(frozen_pictures=3)
    for number in range(2):
        ingest.add_image('front', picture(T0 + number, 9), now_ns=T0)
        feed(ingest, T0 + 10 * (number + 1), leave_out=['front'], value=number)
    assert ingest.observe(now_ns=T0).images['front'][0, 0, 0] == 9      # two are not three
    for number in (21, 22):
        with pytest.raises(ValueError, match='camera hangs'):
            ingest.add_image('front', picture(T0 + number, 9), now_ns=T0)
    reason = why_not(ingest, T0)
    assert (reason.stream, reason.kind) == ('camera/front', 'frozen')
    assert reason.reason.startswith('the last 4 pictures are identical')
    ingest.add_image('front', picture(T0 + 23, 9, data=bytes([9] * 17 + [8])), now_ns=T0)
    assert ingest.observe(now_ns=T0).stamp_ns == T0 + 20


def test_a_picture_that_differs_behind_its_first_bytes_is_no_repeat():
    ingest = watchful(frozen_pictures=2)
    large = bytearray(300 * 20 * 3)
    for number in range(4):
        large[-1] = number
        ingest.add_image('front', picture(T0 + number, width=300, height=20, step=900,
                                          data=bytes(large)), now_ns=T0)


def jpeg(stamp_ns, value):
    _, data = cv2.imencode('.png', np.full((2, 3, 3), value, np.uint8))
    return SimpleNamespace(header=header(stamp_ns), format='png', data=data.tobytes())


def test_compressed_pictures_are_decoded_ahead_and_one_that_waits_is_overtaken(monkeypatch):
    go, where, decode = threading.Event(), [], from_messages.compressed_image

    def slow(message):
        where.append(threading.current_thread().name)
        assert go.wait(20)
        return decode(message)

    monkeypatch.setattr(from_messages, 'compressed_image', slow)
    with ThreadPoolExecutor(1, thread_name_prefix='decode') as decoder:
        ingest = Ingest(ROBOT, decoder=decoder)
        for number in range(3):
            stamp_ns = T0 + number * 10 * MS
            feed(ingest, stamp_ns, leave_out=('wrist',))
            ingest.add_compressed_image('wrist', jpeg(stamp_ns, 50 + number), now_ns=stamp_ns)
        go.set()
        assert ingest.observe(now_ns=stamp_ns).images['wrist'][0, 0, 0] == 52
    assert len(where) == 2 and all(name.startswith('decode') for name in where)


def test_what_nobody_foresaw_passes_on_and_is_the_fault_of_its_stream(ingest, monkeypatch):
    feed(ingest, T0)
    monkeypatch.setattr(from_messages, 'joint_positions', None)
    with pytest.raises(TypeError):
        ingest.add_joint_state(joints(T0 + 1), now_ns=T0)
    fault = why_not(ingest, T0)
    assert (fault.stream, fault.kind) == ('joint_states', 'malformed')
    assert fault.reason.startswith('TypeError: ')
    monkeypatch.undo()
    ingest.add_joint_state(joints(T0 + 2), now_ns=T0)
    assert ingest.observe(now_ns=T0).stamp_ns == T0


def test_a_broken_picture_that_was_decoded_ahead_is_named():
    with ThreadPoolExecutor(1) as decoder:
        ingest = Ingest(ROBOT, decoder=decoder)
        feed(ingest, T0, leave_out=('wrist',))
        message = jpeg(T0, 3)
        whole = message.data    # every chunk is, but not what is in one
        message.data = whole[:45] + b'\xff' * (len(whole) - 61) + whole[-16:]
        ingest.add_compressed_image('wrist', message, now_ns=T0)
        assert why_not(ingest, T0).stream == 'camera/wrist'


def test_a_compressed_camera_that_repeats_its_bytes_is_frozen_too():
    ingest = watchful(frozen_pictures=2)
    same = cv2.imencode('.png', np.zeros((2, 3, 3), np.uint8))[1].reshape(-1)
    message = SimpleNamespace(header=header(T0), format='png', data=same)
    ingest.add_compressed_image('wrist', message, now_ns=T0)
    message = SimpleNamespace(header=header(T0 + 1), format='png', data=same.copy())
    with pytest.raises(ValueError, match='identical'):
        ingest.add_compressed_image('wrist', message, now_ns=T0)


def test_a_camera_below_the_rate_floor_is_slow_by_name():
    ingest = watchful(min_rate_hz=12.5, max_age_s=10.0)
    for number in range(9):
        feed(ingest, T0 + 80 * MS * number, value=number)
    assert ingest.observe(now_ns=T0 + 640 * MS).stamp_ns == T0 + 640 * MS    # 12.5 Hz
    feed(ingest, T0 + 720 * MS, leave_out=['wrist'])
    ingest.add_image('wrist', picture(T0 + 735 * MS), now_ns=T0 + 735 * MS)  # 7 in 0.575 s
    reason = why_not(ingest, T0 + 735 * MS)
    assert (reason.stream, reason.kind) == ('camera/wrist', 'slow')
    assert '12.2 pictures per second' in reason.reason


@pytest.mark.parametrize(('rule', 'width', 'height', 'taken'), [
    ('any', 5, 1, True), ('aspect', 3, 2, True), ('aspect', 300, 200, True),
    ('aspect', 301, 200, True), ('aspect', 310, 200, False), ('exact', 3, 2, True),
    ('exact', 6, 4, False),
])
def test_a_picture_of_the_wrong_size_is_refused_by_the_rule(rule, width, height, taken):
    ingest = watchful(picture_size=rule)
    feed(ingest, T0, leave_out=['wrist'])
    ingest.add_image('wrist', picture(T0, width=width, height=height, step=3 * width,
                                      data=bytes(3 * width * height)), now_ns=T0)
    if taken:
        assert ingest.observe(now_ns=T0).images['wrist'].shape == (height, width, 3)
    else:
        reason = why_not(ingest, T0)
        assert (reason.stream, reason.kind) == ('camera/wrist', 'size')
        assert f'picture is {width}x{height}, the checkpoint was trained on 3x2' in reason.reason


@pytest.mark.parametrize(('name', 'value'), [
    ('min_rate_hz', -0.1), ('min_rate_hz', 1001), ('frozen_pictures', 1),
    ('frozen_pictures', -2), ('picture_size', 'some')])
def test_what_cannot_be_watched_for_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        IngestLimits(**{name: value})
