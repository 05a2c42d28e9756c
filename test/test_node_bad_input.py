"""Whatever is wrong with an input is named; nothing is published, and a good input recovers."""

import itertools
import os
import shutil

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

import torch  # noqa: E402, I001
from safetensors.torch import load_file, save_file  # noqa: E402
from std_msgs.msg import String  # noqa: E402

from micro_policy import CAMERAS, HEIGHT, WIDTH  # noqa: E402
from node_rig import Rig, seconds  # noqa: E402


@pytest.fixture(scope='module')
def shared(micro_checkpoint):
    with Rig(micro_checkpoint) as rig:
        rig.activate().recovers()
        yield rig


@pytest.fixture
def rig(shared):
    """Return an active rig that has just published; it must still do so afterwards."""
    shared.settle()
    yield shared
    shared.recovers()


@pytest.fixture(scope='module')
def unconfigured(micro_checkpoint):
    with Rig(micro_checkpoint) as rig:
        rig.diagnosed('unconfigured')
        yield rig


# Pictures


def bad_picture(feeder, **fields):
    """Return a `picture` for Feeder.feed: plain rgb8 with these fields changed."""
    def picture(name, pixels, stamp_ns):
        message = feeder.image(pixels, stamp_ns)
        if name == 'wrist':
            for field, value in fields.items():
                setattr(message, field, value)
        return message
    return picture


@pytest.mark.parametrize('fields, words', [
    ({'encoding': '16UC1'}, "encoding '16UC1' is not supported, use one of rgb8"),
    ({'encoding': ''}, "encoding '' is not supported"),
    ({'encoding': 'x' * 100_000}, "encoding 'xxx"),
    ({'data': bytes(100)}, 'data has 100 bytes but step 192 x height 48 needs 9216'),
    ({'data': b''}, 'data has 0 bytes'),
    ({'data': bytes(HEIGHT * WIDTH * 3 + 1)}, 'data has 9217 bytes'),
    ({'width': 0, 'height': 0, 'step': 0, 'data': b''}, 'picture has no pixels: 0x0'),
    ({'width': 2**32 - 1, 'height': 2**32 - 1}, 'is over the cap of'),
    ({'step': 7}, 'step is 7 bytes but a row of 64 rgb8 pixels takes 192')])
def test_a_bad_picture_is_named(rig, fields, words):
    picture = bad_picture(rig.feeder, **fields)
    rig.no_chunk('camera/wrist: ', words, each=rig.feeder.steadily(picture=picture))


def test_a_camera_that_never_comes_is_named(rig):
    rig.reset()
    rig.no_chunk('camera/wrist: nothing has been received',
                 each=rig.feeder.steadily(without=('wrist',)))
    rig.logged('no chunk: camera/wrist: nothing has been received',
               each=rig.feeder.steadily(without=('wrist',)))


@pytest.mark.parametrize('silent', [*CAMERAS, 'joints'])
def test_an_input_that_stops_is_named(rig, silent):
    name = 'joint_states' if silent == 'joints' else f'camera/{silent}'
    each = rig.feeder.steadily(without=(silent,))
    rig.diagnosed('no chunk', name, ' s old, at most 0.5 s is allowed', each=each)
    rig.settle()
    rig.no_chunk(name, each=each)
    rig.recovers()
    rig.logged(f'producing chunks again (was: {name}')


def test_cameras_that_are_not_synchronised_are_named(rig):
    rig.reset()
    rig.no_chunk('camera/wrist: is 0.', 'behind camera/static, at most 0.06 s is allowed',
                 each=lambda: rig.feeder.feed(wrist_ns=-seconds(0.2)))


# Stamps


def test_a_stamp_that_goes_backward_is_named(rig):
    stamp_ns = max(rig.node._ingest.newest_stamps_ns().values())
    rig.no_chunk('stamp goes backward by 1.', each=lambda: rig.feeder.feed(
        stamp_ns=stamp_ns - seconds(1.0)))


def test_a_stamp_that_repeats_is_named(rig):
    stamp_ns = max(rig.node._ingest.newest_stamps_ns().values())
    rig.no_chunk('stamp repeats', each=lambda: rig.feeder.feed(stamp_ns=stamp_ns))


@pytest.mark.parametrize('stamp_ns', [0, -seconds(5.0), 2**31 * 10**9 - seconds(1)])
def test_a_nonsense_stamp_is_named(rig, stamp_ns):
    rig.reset()
    words = 's in the future' if stamp_ns > 0 else 's old, at most'
    stamps = itertools.count(stamp_ns)
    rig.no_chunk(words, each=lambda: rig.feeder.feed(stamp_ns=next(stamps)))
    rig.reset()


def test_a_clock_that_jumps_back_forgets_everything(micro_checkpoint):
    parameters = {'use_sim_time': True, 'autostart': True}
    with Rig(micro_checkpoint, parameters=parameters) as rig:
        def at(clock_s):
            stamps = itertools.count(seconds(clock_s))

            def each():
                rig.feeder.tick(seconds(clock_s))
                rig.feeder.feed(stamp_ns=next(stamps))
            return each
        rig.chunk(each=at(20.0))
        rig.settle()
        rig.feeder.chunks.clear()
        rig.logged('the clock jumped back by 17.000 s',
                   each=lambda: rig.feeder.tick(seconds(3.0)))
        rig.no_chunk('clock: it jumped back by 17.000 s')
        rig.no_chunk('s in the future', each=lambda: rig.feeder.feed(stamp_ns=seconds(20.1)))
        rig.reset()
        rig.chunk(each=at(3.1))


# Joint states


def publish_joints(rig, values):
    """Return a function that feeds good pictures and these joints."""
    def each():
        stamp_ns = rig.feeder.feed(without=('joints',))
        rig.feeder.joints.publish(rig.feeder.joint_state(values, stamp_ns))
    return each


@pytest.mark.parametrize('values, words', [
    ({'a': 0.1, 'b': 0.5}, "joint state has no 'c', it has a, b"),
    ({}, "joint state has no 'a', it has no joints"),
    ({'a': 0.1, 'b': np.nan, 'c': 2.0}, "joint 'b' is not finite: nan"),
    ({'a': 0.1, 'b': 0.5, 'c': -np.inf}, "joint 'c' is not finite: -inf")])
def test_bad_joint_states_are_named(rig, values, words):
    rig.no_chunk('joint_states: ', words, each=publish_joints(rig, values))


def test_more_names_than_positions_are_named(rig):
    def each():
        stamp_ns = rig.feeder.feed(without=('joints',))
        message = rig.feeder.joint_state({'a': 0.1, 'b': 0.5, 'c': 3.0}, stamp_ns)
        message.position = message.position[:2]
        rig.feeder.joints.publish(message)
    rig.no_chunk('joint_states: joint state has 3 names but 2 positions', each=each)


def test_more_joints_in_another_order_are_fine(rig):
    since_ns = rig.feeder.now_ns()
    rig.chunk(since_ns=since_ns, each=publish_joints(
        rig, {'gripper': np.nan, 'c': 3.0, 'b': 0.5, 'a': 0.1}))


# Instructions


def cdr_string(data: bytes) -> bytes:
    """Return std_msgs/String with these bytes as the middleware sends it (little endian)."""
    return b'\0\1\0\0' + (len(data) + 1).to_bytes(4, 'little') + data + b'\0'


def test_the_hand_made_bytes_are_a_string_message(rig):
    rig.feeder.instruction.publish(cdr_string('pull – the lever'.encode()))
    rig.logged("instruction: 'pull – the lever'")
    rig.say('push the lever')


@pytest.mark.parametrize('message, words', [
    (String(data=''), 'instruction: instruction is empty'),
    (String(data=' \n\t'), 'instruction: instruction is empty'),
    (String(data='x' * 100_000), 'instruction must be at most 4096 bytes, got 100000'),
    (cdr_string(b'push \xff\xfe lever'), 'instruction: instruction is not valid UTF-8'),
    (cdr_string(b'push \xed\xa0\x80'), 'instruction: instruction is not valid UTF-8')],
    ids=['empty', 'space', '100 kB', 'not UTF-8', 'surrogate'])
def test_a_bad_instruction_stops_chunks_until_a_good_one(rig, message, words):
    rig.feeder.instruction.publish(message)
    rig.diagnosed('no chunk', words, each=rig.feeder.steadily())
    rig.settle()
    rig.no_chunk(words, each=rig.feeder.steadily())
    rig.say('push the lever')


@pytest.mark.parametrize('data', [
    b'\0\1\0\0', b'\0\1\0\0\xff\xff\xff\x7fabc', b'\0\1\0\0' + b'\xff' * 64],
    ids=['empty', 'cut', 'rubbish'])
def test_bytes_that_are_no_message_do_not_end_the_node(rig, data):
    for publisher in (rig.feeder.instruction, rig.feeder.joints, *rig.feeder.pictures.values()):
        for _ in range(3):
            publisher.publish(data)
    rig.diagnosed('')
    rig.say(f'pull lever {len(data)}')


# Checkpoints


def spoil_missing(path):
    shutil.rmtree(path)


def spoil_without_weights(path):
    (path / 'model.safetensors').unlink()


def spoil_truncated(path):
    os.truncate(path / 'model.safetensors', 4000)


def spoil_yaml(path):
    os.truncate(path / 'policy.yaml', 300)


def spoil_tokenizer(path):
    os.truncate(path / 'tokenizer.json', 300)


def spoil_nan(path):
    weights = load_file(path / 'model.safetensors')
    name = sorted(weights)[5]
    weights[name].view(-1)[0] = np.nan
    save_file(weights, path / 'model.safetensors')


def spoil_shape(path):
    text = (path / 'policy.yaml').read_text()
    (path / 'policy.yaml').write_text(text.replace('width: 32', 'width: 36'))


def configuring_fails(rig, *words):
    """Assert that configure fails and says these words; the node is unconfigured again."""
    assert not rig.transition('configure')
    assert rig.state == 'unconfigured'
    status = rig.diagnosed('configure failed', *words)
    assert status.level == b'\2'
    rig.logged('configure failed')
    assert rig.node._policy is None


def configuring_works(rig):
    assert rig.transition('configure'), rig.log()
    assert rig.diagnosed('inactive').level == b'\0'
    assert rig.transition('cleanup')


@pytest.mark.parametrize('spoil, words', [
    (spoil_missing, ['does not exist']),
    (spoil_without_weights, ['has no model.safetensors']),
    (spoil_truncated, ['model.safetensors cannot be read, it may be truncated']),
    (spoil_yaml, ['policy.yaml']),
    (spoil_tokenizer, ['tokenizer.json']),
    (spoil_nan, ['model.safetensors', 'holds NaN or infinite weights']),
    (spoil_shape, ['model.safetensors', 'policy.yaml asks for'])])
def test_a_bad_checkpoint_is_named_and_a_good_one_works_afterwards(
        unconfigured, micro_checkpoint, tmp_path, spoil, words):
    path = tmp_path / 'spoilt'
    shutil.copytree(micro_checkpoint, path)
    spoil(path)
    assert unconfigured.set_parameter('checkpoint', str(path)).successful
    configuring_fails(unconfigured, str(path), *words)
    assert unconfigured.set_parameter('checkpoint', str(micro_checkpoint)).successful
    configuring_works(unconfigured)


def test_a_checkpoint_of_another_robot_is_refused(unconfigured):
    assert unconfigured.set_parameter('robot', 'franka').successful
    configuring_fails(unconfigured, "is for robot 'micro_robot', this node is for 'franka'")
    assert unconfigured.set_parameter('robot', 'micro_robot').successful
    configuring_works(unconfigured)
    assert unconfigured.set_parameter('robot', '').successful


def test_a_gpu_that_is_not_there_is_named(unconfigured):
    count = torch.cuda.device_count()
    assert unconfigured.set_parameter('device', f'cuda:{count}').successful
    configuring_fails(unconfigured, f"device 'cuda:{count}' was asked for but PyTorch sees "
                                    f'{count} CUDA GPUs')
    assert unconfigured.set_parameter('device', 'cpu').successful
    configuring_works(unconfigured)


def test_a_bad_instruction_parameter_is_named(unconfigured):
    assert unconfigured.set_parameter('instruction', 'x' * 5000).successful
    configuring_fails(unconfigured, 'instruction must be at most 4096 bytes, got 5000')
    assert unconfigured.set_parameter('instruction', '').successful
    configuring_works(unconfigured)


# Parameters files


@pytest.mark.parametrize('line, words', [
    ('sampler_step: 4', ["unknown parameter 'sampler_step' (did you mean 'sampler_steps'?)"]),
    ('nonsense.of.mine: 4', ["unknown parameter 'nonsense.of.mine'", 'known: checkpoint']),
    ('sampler_steps: four', ['sampler_steps must be int', "'four'"]),
    ('max_age_s: 1', ['max_age_s must be float', '1']),
    ('instruction: 3', ['instruction must be str', '3']),
    ('autostart: "yes"', ['autostart must be bool', "'yes'"]),
    ('sampler_steps: 65', ['sampler_steps must be 0 to 64, got 65']),
    ('max_skew_s: 0.0', ['max_skew_s must be 0.0001 to 60, got 0.0']),
    ('max_age_s: .nan', ['max_age_s must be 0.001 to 60, got nan']),
    ('max_ages_s: joint_states', ['max_ages_s is written STREAM:=SECONDS', "'joint_states'"]),
    ('dtype: float16', ["dtype must match 'auto|float32|bfloat16', got 'float16'"]),
    ('qos_overrides./NS/camera/static/image_raw.subscription.reliability: bogus', ['bogus']),
    ('qos_overrides./NS/camera/static/image_raw.subscription.depth: many', ['depth'])])
def test_a_bad_parameters_file_keeps_the_node_unconfigured(micro_checkpoint, tmp_path, line,
                                                           words):
    path = tmp_path / 'parameters.yaml'

    def write(feeder):
        text = line.replace('/NS', feeder.node.get_namespace())
        path.write_text(f'/**:\n  ros__parameters:\n    seed: 3\n    {text}\n')
    with Rig(micro_checkpoint, arguments=['--params-file', str(path)],
             before_node=write) as rig:
        assert rig.node.get_parameter('seed').value == 3
        configuring_fails(rig, *words)


@pytest.mark.parametrize('ages, words', [
    ('camera/wirst:=0.2', ["no stream 'camera/wirst'", "did you mean 'camera/wrist'?"]),
    ('joint_states:=4000', ["max_ages_s of 'joint_states'", 'below 3600'])])
def test_an_age_of_no_stream_or_out_of_range_keeps_the_node_unconfigured(
        unconfigured, ages, words):
    assert unconfigured.set_parameter('max_ages_s', ages).successful
    configuring_fails(unconfigured, *words)
    assert not unconfigured.set_parameter('max_ages_s', 'wrist').successful
    assert unconfigured.set_parameter('max_ages_s', '').successful
    configuring_works(unconfigured)


def test_a_stream_of_the_node_has_an_age_of_its_own(micro_checkpoint):
    with Rig(micro_checkpoint, parameters={
            'max_age_s': 5.0, 'max_ages_s': 'camera/wrist:=0.25'}) as rig:
        rig.activate().recovers()
        rig.no_chunk('camera/wrist', 'at most 0.25 s is allowed',
                     each=rig.feeder.steadily(without=('wrist',)))


def test_a_good_parameters_file_is_used(micro_checkpoint, tmp_path):
    path = tmp_path / 'parameters.yaml'
    path.write_text('/**:\n  ros__parameters:\n    seed: 3\n    max_age_s: 0.25\n')
    with Rig(micro_checkpoint, arguments=['--params-file', str(path)]) as rig:
        rig.activate().recovers()
        rig.no_chunk('at most 0.25 s is allowed')
