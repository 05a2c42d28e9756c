"""The lifecycle node over real ROS: what it publishes, when, and when it must not."""

import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

import torch  # noqa: E402, I001
from builtin_interfaces.msg import Time as TimeMessage  # noqa: E402
from rclpy.time import Time  # noqa: E402
from sensor_msgs.msg import CompressedImage  # noqa: E402
from std_msgs.msg import String  # noqa: E402

from meanflow_ros.core import loading  # noqa: E402
from meanflow_ros.core.contract import ActionChunk  # noqa: E402
from meanflow_ros.core.runtime import FastPolicy  # noqa: E402
from meanflow_ros.ros import policy_node, to_messages  # noqa: E402
from micro_policy import (  # noqa: E402
    CAMERAS, DIMENSIONS, FIRST_STEP, HORIZON, LOWER, PERIOD_S, UPPER)
from node_rig import Rig, positions, seconds, stamp_of, times_ns, until  # noqa: E402

RULE_NS = [seconds((step + FIRST_STEP) * PERIOD_S) for step in range(HORIZON)]


@pytest.fixture(scope='module')
def reference(micro_checkpoint):
    """Return the checkpoint, loaded apart from any node, on one thread as in the node."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield FastPolicy.load(micro_checkpoint)
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def shared(micro_checkpoint):
    with Rig(micro_checkpoint) as rig:
        yield rig.activate()


@pytest.fixture
def rig(shared):
    """Return an active rig with nothing in flight and no input; faults are taken back after."""
    shared.act()
    shared.settle()
    assert shared.reset().success
    shared.feeder.chunks.clear()
    yield shared
    shared.act()
    if shared.state == 'inactive':
        shared.transition('activate')


class Gate:
    """An `act` that waits inside the network until it is opened."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, real, observation, **options):
        self.entered.set()
        assert self.opened.wait(20.0)
        return real(observation, **options)


def assert_answers(chunk, reference, observation, **options):
    """Assert that a chunk is, bit by bit, what the policy says to an observation."""
    expected = reference.act(observation, **options)
    dropped = HORIZON - len(chunk.points)
    np.testing.assert_array_equal(positions(chunk), expected.actions[dropped:])


def sent(rig, chunk, instruction='push the lever', **changes):
    return replace(rig.feeder.sent[stamp_of(chunk)], instruction=instruction, **changes)


# Lifecycle


def test_the_node_goes_through_its_whole_lifecycle_twice(micro_checkpoint):
    with Rig(micro_checkpoint) as rig:
        for _ in range(2):
            assert rig.state == 'unconfigured'
            rig.activate()
            assert rig.state == 'active'
            rig.recovers()
            assert rig.transition('deactivate')
            assert rig.state == 'inactive'
            assert rig.transition('cleanup')


def test_inputs_while_inactive_give_no_chunk(rig):
    rig.recovers()
    assert rig.transition('deactivate')
    rig.settle()
    before = len(rig.feeder.chunks)
    last_ns = [rig.feeder.feed() for _ in range(5)][-1]
    until(lambda: set(rig.node._ingest.newest_stamps_ns().values()) == {last_ns}, 'all received',
          each=lambda: None)
    rig.settle()
    assert len(rig.feeder.chunks) == before
    assert rig.node._status.chunks == before
    assert rig.transition('activate')
    assert stamp_of(rig.recovers()) > last_ns


def test_a_chunk_in_flight_is_thrown_away_when_the_node_is_deactivated(rig):
    gate = Gate()
    rig.act(gate)
    until(gate.entered.is_set, 'inference', each=rig.feeder.steadily())
    assert rig.transition('deactivate')
    gate.opened.set()
    until(lambda: rig.node._status.discarded == 1, 'the end of the inference')
    rig.settle()
    assert not rig.feeder.chunks


def test_a_chunk_in_flight_does_not_survive_deactivate_and_activate(rig):
    gate = Gate()
    rig.act(gate)
    until(gate.entered.is_set, 'inference', each=rig.feeder.steadily())
    assert rig.transition('deactivate')
    assert rig.transition('activate')
    gate.opened.set()
    until(lambda: rig.node._status.discarded == 1, 'the end of the inference')
    rig.settle()
    assert not rig.feeder.chunks


def inference_threads():
    return [thread.name for thread in threading.enumerate()].count('inference')


def test_cleanup_frees_the_network_and_the_subscriptions(micro_checkpoint):
    with Rig(micro_checkpoint) as rig:
        topics = {subscription.topic_name for subscription in rig.node.subscriptions}
        threads = inference_threads()
        rig.activate().recovers()
        policy = weakref.ref(rig.node._policy)
        rig.no_chunk('wrist', each=rig.feeder.steadily(without=('wrist',)))
        assert rig.transition('deactivate')
        assert rig.transition('cleanup')
        gc.collect()
        assert policy() is None
        assert {s.topic_name for s in rig.node.subscriptions} == topics
        until(lambda: not any(publisher.get_subscription_count()
                              for publisher in rig.feeder.pictures.values()), 'disconnection')
        assert inference_threads() == threads
        status = rig.diagnosed('')
        assert (status.message, status.level) == ('unconfigured', b'\0')


def test_twenty_lifecycles_leave_nothing_behind(micro_checkpoint, monkeypatch):
    monkeypatch.setattr(loading, 'WARM_UP_RUNS', 1)

    def left(node):
        return (len(list(node.subscriptions)), len(list(node.publishers)),
                len(list(node.services)), threading.active_count())

    with Rig(micro_checkpoint) as rig:
        rig.diagnosed('unconfigured')
        before = left(rig.node)
        for _ in range(20):
            for name in ('configure', 'activate', 'deactivate', 'cleanup'):
                assert rig.transition(name)
        assert left(rig.node) == before
        rig.activate().recovers()


def test_the_node_can_be_cleaned_up_while_the_network_runs(micro_checkpoint):
    with Rig(micro_checkpoint) as rig:
        rig.activate()
        rig.act(lambda real, observation, **options: (time.sleep(0.3), real(
            observation, **options))[1])
        started = rig.feeder.now_ns()
        until(lambda: (rig.node._status.last_stamp_ns or 0) > started, 'inference',
              each=rig.feeder.steadily())
        assert rig.transition('deactivate')
        assert rig.transition('cleanup')
        assert not rig.feeder.chunks


def test_a_network_that_hangs_is_left_behind_unused_until_it_answers(
        micro_checkpoint, monkeypatch):
    monkeypatch.setattr(policy_node, 'END_S', 0.2)
    gate, closed = Gate(), []
    with Rig(micro_checkpoint) as rig:
        rig.activate()
        policy = weakref.ref(rig.node._policy)
        rig.node._policy.close = lambda: closed.append(gate.opened.is_set())
        rig.act(gate)
        until(gate.entered.is_set, 'inference', each=rig.feeder.steadily())
        assert rig.transition('deactivate') and rig.transition('cleanup')
        rig.logged('the network has not answered for 0.2 s: it is left behind')
        assert rig.diagnosed('has not answered yet').level == b'\2' and rig.node.hangs
        assert not rig.transition('configure') and not closed
        rig.logged('configure failed: the network of the last configuration')
        gate.opened.set()
        rig.logged('the network that was left behind has answered and is freed')
        assert closed == [True] and not rig.node.hangs and not rig.feeder.chunks
        rig.activate().recovers()
        gc.collect()
        assert policy() is None


HANGS = """
import sys, time
from meanflow_ros.ros import policy_node
def hangs(self, policy):
    while True:
        time.sleep(1)
policy_node.PolicyNode._infer_forever = hangs
policy_node.END_S = 0.5
sys.exit(policy_node.main(sys.argv))
"""


def test_an_interrupt_ends_a_node_whose_network_hangs_for_ever(micro_checkpoint):
    process = subprocess.Popen(
        [sys.executable, '-c', HANGS, '--ros-args', '-p', f'checkpoint:={micro_checkpoint}', '-p',
         'autostart:=true', '-p', 'threads:=1', '-r', '__ns:=/hangs'],
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watchdog = threading.Timer(90.0, process.kill)
    watchdog.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if 'active: publishing' in line:
            process.send_signal(signal.SIGINT)
    watchdog.cancel()
    text = ''.join(lines)
    assert process.wait() == 1, text
    assert 'the network has not answered for 0.5 s' in text and 'Traceback' not in text


def test_autostart_configures_and_activates(micro_checkpoint):
    with Rig(micro_checkpoint, parameters={'autostart': True}) as rig:
        rig.recovers()
        assert rig.state == 'active'


def test_without_autostart_the_node_waits_for_a_lifecycle_manager(micro_checkpoint):
    with Rig(micro_checkpoint) as rig:
        for _ in range(3):
            status = rig.diagnosed('unconfigured')
        assert (rig.state, status.level) == ('unconfigured', b'\0')


# What a chunk is


def test_a_chunk_names_the_dimensions_and_keeps_their_limits(rig):
    chunk = rig.recovers()
    assert tuple(chunk.joint_names) == DIMENSIONS
    assert (positions(chunk) >= LOWER).all() and (positions(chunk) <= UPPER).all()


@pytest.mark.parametrize('wrist_ns', [-20_000_000, 31_000_000])
def test_a_chunk_is_stamped_with_the_oldest_picture(rig, wrist_ns):
    stamp_ns = rig.feeder.now_ns() - seconds(0.05)
    chunk = rig.chunk(each=rig.feeder.steadily(wrist_ns=wrist_ns), since_ns=stamp_ns)
    assert stamp_of(chunk) in rig.feeder.sent


def test_steps_are_due_by_the_time_rule_and_past_ones_are_left_out(rig):
    old_ns = seconds(0.25)                                       # the first step is due at 0.2 s

    def each():
        rig.feeder.feed(stamp_ns=rig.feeder.now_ns() - old_ns)
        time.sleep(0.03)
    chunk = rig.chunk(each=each)
    times = times_ns(chunk)
    assert 1 <= len(times) < HORIZON
    assert times == RULE_NS[-len(times):]
    assert times[0] >= old_ns


def test_a_fresh_picture_gets_every_step(rig):
    until(lambda: RULE_NS in [times_ns(chunk) for chunk in list(rig.feeder.chunks)],
          'a whole chunk', each=rig.feeder.steadily())


def test_the_chunk_is_bit_by_bit_what_the_policy_says(rig, reference):
    assert rig.set_parameter('seed', 7).successful
    until(lambda: len(rig.feeder.chunks) >= 5, 'five chunks', each=rig.feeder.steadily())
    rig.settle()
    assert rig.set_parameter('seed', 0).successful
    for chunk in list(rig.feeder.chunks):
        assert_answers(chunk, reference, sent(rig, chunk), seed=7)
    with pytest.raises(AssertionError):
        assert_answers(chunk, reference, sent(rig, chunk), seed=8)


def test_sampler_steps_takes_effect_at_once(rig, reference):
    assert rig.set_parameter('sampler_steps', 3).successful
    chunk = rig.recovers()
    assert rig.values()['sampler_steps'] == '3'
    assert rig.set_parameter('sampler_steps', 0).successful
    assert_answers(chunk, reference, sent(rig, chunk), steps=3)
    with pytest.raises(AssertionError):
        assert_answers(chunk, reference, sent(rig, chunk), steps=1)


# Inputs


def encoded(feeder, encoding, padding=0):
    """Return a `picture` for Feeder.feed: the same RGB pixels in another encoding."""
    order = {'rgb8': [0, 1, 2], 'bgr8': [2, 1, 0], 'rgba8': [0, 1, 2, 3], 'bgra8': [2, 1, 0, 3]}

    def picture(name, pixels, stamp_ns):
        opaque = np.concatenate([pixels, np.full_like(pixels[..., :1], 77)], axis=2)
        data = pixels[..., 1] if encoding == 'mono8' else opaque[..., order[encoding]]
        message = feeder.image(np.ascontiguousarray(data), stamp_ns, encoding)
        rows = data.reshape(len(data), -1)
        message.data = np.pad(rows, ((0, 0), (0, padding)), constant_values=99).tobytes()
        message.step = rows.shape[1] + padding
        return message
    return picture


@pytest.mark.parametrize('encoding', ['rgb8', 'bgr8', 'rgba8', 'bgra8', 'mono8'])
def test_every_encoding_means_the_same_picture(rig, reference, encoding):
    chunk = rig.recovers(picture=encoded(rig.feeder, encoding, padding=5))
    observation = sent(rig, chunk)
    if encoding == 'mono8':
        observation = replace(observation, images={
            name: np.repeat(image[..., 1:2], 3, axis=2)
            for name, image in observation.images.items()})
    assert_answers(chunk, reference, observation)


@pytest.mark.parametrize('kind', ['png', 'jpeg'])
def test_compressed_pictures_are_decoded(micro_checkpoint, reference, kind):
    decoded = {}

    def picture(name, pixels, stamp_ns):
        data = cv2.imencode(f'.{kind}', pixels[..., ::-1])[1]
        decoded[name, stamp_ns] = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
        message = CompressedImage(format=kind, data=data.tobytes())
        message.header.stamp = to_messages.time(stamp_ns)
        return message

    with Rig(micro_checkpoint, parameters={'image_transport': 'compressed'}) as rig:
        chunk = rig.activate().recovers(picture=picture)
        images = {name: np.ascontiguousarray(decoded[name, stamp_of(chunk)]) for name in CAMERAS}
        assert_answers(chunk, reference, sent(rig, chunk, images=images))


def test_the_order_of_the_joints_does_not_matter(rig, reference):
    rig.feeder.joint_order = ['c', 'a', 'b']
    chunk = rig.recovers()
    rig.feeder.joint_order = ['a', 'b', 'c']
    assert_answers(chunk, reference, sent(rig, chunk))


def test_topics_can_be_remapped(micro_checkpoint):
    pairs = {'camera/static/image_raw': 'zed/left', 'joint_states': 'arm/state',
             'action_chunk': 'arm/chunk'}
    arguments = [word for pair in pairs.items() for word in ('-r', ':='.join(pair))]
    inputs = {'static': 'zed/left', 'joints': 'arm/state', 'chunks': 'arm/chunk'}
    with Rig(micro_checkpoint, arguments=arguments, inputs=inputs) as rig:
        rig.activate().recovers()


def asked(rig, topic):
    """Return the reliability and depth that the node asks for."""
    profile, = [subscription.qos_profile for subscription in rig.node.subscriptions
                if subscription.topic_name == f'{rig.namespace}/{topic}']
    return profile.reliability.name, profile.depth


def test_the_quality_of_service_of_one_camera_can_be_overridden(micro_checkpoint):
    override = 'qos_overrides.NAMESPACE/camera/static/image_raw.subscription.'
    parameters = {f'{override}reliability': 'reliable', f'{override}depth': 3}
    with Rig(micro_checkpoint, parameters=parameters) as rig:
        for _ in range(2):
            assert rig.transition('configure'), rig.log()
            assert asked(rig, 'camera/static/image_raw') == ('RELIABLE', 3)
            assert asked(rig, 'camera/wrist/image_raw') == ('BEST_EFFORT', 5)
            assert asked(rig, 'joint_states') == ('BEST_EFFORT', 5)
            assert rig.transition('cleanup')


def test_reliable_cameras_are_taken_reliably_and_an_override_wins(micro_checkpoint):
    override = 'qos_overrides.NAMESPACE/camera/static/image_raw.subscription.reliability'
    with Rig(micro_checkpoint, parameters={override: 'best_effort'}, reliable=True) as rig:
        rig.activate()
        until(lambda: asked(rig, 'camera/wrist/image_raw')[0] == 'RELIABLE', 'reliable delivery')
        assert asked(rig, 'camera/static/image_raw')[0] == 'BEST_EFFORT'
        rig.recovers()


@pytest.mark.parametrize('parameters, topics', [
    ({}, {'joint_states', 'camera/static/image_raw', 'camera/wrist/image_raw'}),
    ({'qos_overrides.NAMESPACE/camera/static/image_raw.subscription.depth': 3},
     {'joint_states', 'camera/wrist/image_raw'}),     # the executor hears of what does not fit
    ({'use_sim_time': True}, set())])                 # it keeps the order of /clock
def test_sensors_are_received_on_a_thread_of_their_own_with_two_exceptions(
        micro_checkpoint, parameters, topics):
    with Rig(micro_checkpoint, parameters=parameters) as rig:
        for _ in range(2):
            assert rig.transition('configure'), rig.log()
            receiver = rig.node._receiver
            received = set() if receiver is None else {
                subscription.topic_name for subscription in receiver._subscriptions}
            assert received == {f'{rig.namespace}/{topic}' for topic in topics}
            assert rig.transition('cleanup')
            assert rig.node._receiver is None
    assert receiver is None or not receiver._thread.is_alive()


# Instructions


def test_the_instruction_parameter_serves_until_the_topic_speaks(micro_checkpoint, reference):
    parameters = {'instruction': ' pull the lever '}
    with Rig(micro_checkpoint, instruction=None, parameters=parameters) as rig:
        chunk = rig.activate().recovers()
        assert_answers(chunk, reference, sent(rig, chunk, 'pull the lever'))
        rig.say('push the lever')
        chunk = rig.recovers()
        assert_answers(chunk, reference, sent(rig, chunk, 'push the lever'))
        with pytest.raises(AssertionError):
            assert_answers(chunk, reference, sent(rig, chunk, 'pull the lever'))


def test_an_instruction_from_before_the_node_started_is_received(micro_checkpoint, reference):
    with Rig(micro_checkpoint, instruction='turn it', parameters={'autostart': True}) as rig:
        chunk = rig.recovers()
        assert_answers(chunk, reference, sent(rig, chunk, 'turn it'))


def test_an_instruction_of_a_publisher_that_keeps_nothing_is_heard(micro_checkpoint):
    with Rig(micro_checkpoint, instruction=None, parameters={'autostart': True}) as rig:
        publisher = rig.feeder.node.create_publisher(String, 'instruction', 10)
        until(lambda: publisher.get_subscription_count(), 'a subscription')
        publisher.publish(String(data='lift it'))
        rig.logged("instruction: 'lift it'")


def test_a_bad_instruction_is_reported_once_though_two_subscriptions_hear_it(micro_checkpoint):
    with Rig(micro_checkpoint, instruction='lift it', parameters={'autostart': True}) as rig:
        rig.recovers()
        rig.feeder.instruction.publish(String(data=''))
        rig.logged('no chunk until a good instruction')
        rig.feeder.instruction.publish(String(data='turn it'))
        rig.logged("instruction: 'turn it'")
        rig.recovers()
        said = [text for text in rig.feeder.logs if 'good instruction arrives' in text
                or text.startswith("instruction: '")]
        assert len(said) in (2, 3), said   # the first was perhaps said before anyone listened


def test_without_any_instruction_there_is_no_chunk(micro_checkpoint):
    with Rig(micro_checkpoint, instruction=None) as rig:
        rig.activate().no_chunk('instruction: none has been received',
                                each=rig.feeder.steadily())
        rig.say('push the lever')
        rig.recovers()


def test_a_new_instruction_makes_the_chunk_in_flight_void(rig):
    gate = Gate()
    rig.act(gate)
    until(gate.entered.is_set, 'inference', each=rig.feeder.steadily())
    rig.act()
    rig.say('pull the lever')
    in_flight = rig.node._status.last_stamp_ns
    gate.opened.set()
    until(lambda: rig.node._status.discarded == 1, 'the end of the inference')
    rig.recovers()
    rig.say('push the lever')
    rig.settle()
    assert in_flight not in [stamp_of(chunk) for chunk in rig.feeder.chunks]


# Load


def test_a_slow_network_answers_the_newest_pictures_and_queues_nothing(rig):
    ages_s = []

    def slow(real, observation, **options):
        ages_s.append((rig.feeder.now_ns() - observation.stamp_ns) / 1e9)
        time.sleep(0.2)
        return real(observation, **options)
    rig.act(slow)
    each = rig.feeder.steadily()
    until(lambda: len(rig.feeder.chunks) >= 8, 'eight chunks', each=each)
    rig.act()
    stamps = [stamp_of(chunk) for chunk in rig.feeder.chunks]
    assert stamps == sorted(set(stamps))
    assert np.median(ages_s) < 0.15 and max(ages_s) < 0.5
    assert len(rig.feeder.sent) > 2 * len(stamps)            # most pictures were passed over
    assert all(len(stream.items) <= stream.items.maxlen
               for stream in rig.node._ingest._streams().values())


# Services and parameters


def test_reset_forgets_inputs_statistics_and_the_chunk_in_flight(rig):
    rig.recovers()
    gate = Gate()
    rig.act(gate)
    until(gate.entered.is_set, 'inference', each=rig.feeder.steadily())
    rig.act()
    in_flight = rig.node._status.last_stamp_ns
    assert rig.reset().success
    gate.opened.set()
    status = rig.no_chunk('nothing has been received')
    values = {value.key: value.value for value in status.values}
    assert values['age camera/static'] == values['age joint_states'] == 'never received'
    assert values['chunks'] == '0'
    rig.recovers()
    assert in_flight not in [stamp_of(chunk) for chunk in rig.feeder.chunks]


def test_what_takes_effect_at_configure_is_refused_while_active(rig, micro_checkpoint):
    result = rig.set_parameter('checkpoint', '/elsewhere')
    assert not result.successful
    assert 'checkpoint takes effect at configure' in result.reason
    assert rig.node.get_parameter('checkpoint').value == str(micro_checkpoint)
    result = rig.set_parameter('autostart', True)
    assert not result.successful and 'autostart' in result.reason


@pytest.mark.parametrize('name, value, limits', [
    ('sampler_steps', 65, ('0', '64')), ('sampler_steps', -1, ('0', '64')),
    ('seed', -1, ('0', '2147483647')), ('max_age_s', 0.0, ('0.001', '60')),
    ('max_age_s', float('nan'), ('0.001', '60')), ('max_skew_s', 61.0, ('0.0001', '60')),
    ('threads', 257, ('0', '256')), ('dtype', 'float16', ('bfloat16',)),
    ('device', 'cuda:x', ('auto|cpu|cuda',)), ('image_transport', 'theora', ('raw|compressed',))])
def test_a_value_out_of_range_is_refused_with_name_and_range(shared, name, value, limits):
    before = shared.node.get_parameter(name).value
    result = shared.set_parameter(name, value)
    assert not result.successful
    assert all(word in result.reason for word in (name, *limits)), result.reason
    assert shared.node.get_parameter(name).value == before


def test_values_of_the_wrong_type_are_refused_and_the_node_lives(rig):
    for name, value in [('device', 3), ('sampler_steps', 'four'), ('sampler_steps', 2.0),
                        ('max_age_s', 'old'), ('seed', None), ('device', None), ('dtype', [1, 2])]:
        before = rig.node.get_parameter(name).value
        assert not rig.set_parameter(name, value).successful
        assert rig.node.get_parameter(name).value == before
    rig.recovers()


def test_parameters_describe_themselves(shared):
    described = shared.describe('sampler_steps')
    assert 'NFE' in described.description
    assert (described.integer_range[0].from_value, described.integer_range[0].to_value) == (0, 64)


# Diagnostics and time


def test_diagnostics_come_once_a_second_and_tell_what_matters(micro_checkpoint):
    with Rig(micro_checkpoint, fast_diagnostics=False) as rig:
        rig.activate().recovers()
        rig.feeder.diagnostics.clear()
        until(lambda: len(rig.feeder.diagnostics) >= 2, 'diagnostics',
              each=rig.feeder.steadily())
        times, statuses = zip(*rig.feeder.diagnostics)
        assert np.allclose(np.diff(times), 1.0, atol=0.4)
        status = statuses[-1]
        values = {value.key: value.value for value in status.values}
        assert status.level == b'\0' and status.message.startswith('publishing chunks at ')
        assert status.hardware_id == 'cpu'
        assert values['state'] == 'active' and values['robot'] == 'micro_robot'
        for stream in ('camera/static', 'camera/wrist', 'joint_states'):
            assert 0 <= float(values[f'age {stream}'].removesuffix(' s')) < 1.0
        assert 0 < float(values['latency_p50_ms']) <= float(values['latency_p99_ms'])
        assert int(values['chunks']) > 0
        status = rig.diagnosed('no chunk', 's old')
        assert status.level == b'\1'


def test_simulated_time_is_used_and_a_jump_back_forgets_the_inputs(micro_checkpoint):
    with Rig(micro_checkpoint, parameters={'use_sim_time': True}) as rig:
        feeder = rig.feeder
        rig.activate().no_chunk('use_sim_time is set and nothing has been received')

        def at(clock_s, stamp_s):
            stamps = itertools.count(seconds(stamp_s))

            def each():
                feeder.tick(seconds(clock_s))
                feeder.feed(stamp_ns=next(stamps))
                time.sleep(0.03)
            return each
        assert 0 <= stamp_of(rig.chunk(each=at(100.0, 99.9))) - seconds(99.9) < 1000
        rig.no_chunk('s old', each=lambda: (feeder.tick(seconds(101.0)), time.sleep(0.03)))
        rig.settle()
        feeder.chunks.clear()
        rig.logged('the clock jumped back by 51.000 s: inputs forgotten',
                   each=lambda: (feeder.tick(seconds(50.0)), time.sleep(0.03)))
        rig.no_chunk('clock: it jumped back by 51.000 s, nothing of camera/static since')
        assert rig.values()['stopped, clock jump'] == '1'
        chunk = rig.chunk(each=at(50.25, 50.0))
        assert 0 <= stamp_of(chunk) - seconds(50.0) < 1000
        assert times_ns(chunk) == RULE_NS[1:]                    # 0.2 s is past at 50.25 s


def test_after_a_jump_of_the_clock_no_chunk_comes_until_it_has_gone_on(micro_checkpoint):
    with Rig(micro_checkpoint, parameters={'use_sim_time': True}) as rig:
        def running(from_s):
            begin_s = time.monotonic()

            def each():
                now_ns = seconds(from_s + time.monotonic() - begin_s)
                rig.feeder.tick(now_ns)
                rig.feeder.feed(stamp_ns=now_ns)
                time.sleep(0.02)
            return each
        rig.activate()
        rig.chunk(each=running(100.0))
        jumped_s = time.monotonic()
        until(lambda: any(stamp_of(chunk) < seconds(90.0) for chunk in list(rig.feeder.chunks)),
              'a chunk of the new time', each=running(50.0))
        assert time.monotonic() - jumped_s >= policy_node.CLOCK_SETTLES_S


# When the network fails


def test_an_error_of_the_network_is_told_and_the_node_recovers(rig):
    def fails(real, observation, **options):
        raise RuntimeError('CUDA out of memory')
    rig.act(fails)
    rig.no_chunk('inference failed: RuntimeError: CUDA out of memory',
                 each=rig.feeder.steadily())
    rig.act()
    rig.recovers()
    rig.logged('producing chunks again (was: inference failed')


@pytest.mark.parametrize('spoil, words', [
    (lambda actions: actions * np.nan, "'slide' is not finite at step 0"),
    (lambda actions: np.where(np.arange(3) == 2, np.inf, actions), "'pinch' is not finite"),
    (lambda actions: actions + [0, 60, 0], "'swivel' is "),
    (lambda actions: actions[:-1], 'has shape (7, 3)'),
    (lambda actions: actions[:, :2], 'has shape (8, 2)')])
def test_the_guard_stops_a_chunk_that_is_not_safe(rig, spoil, words):
    def spoilt(real, observation, **options):
        chunk = real(observation, **options)
        return ActionChunk(actions=spoil(chunk.actions), stamp_ns=chunk.stamp_ns,
                           period_s=chunk.period_s, first_step=chunk.first_step)
    rig.act(spoilt)
    rig.no_chunk('guard: ', words, each=rig.feeder.steadily())
    assert any(key.startswith('guard ') for key in rig.values())
    rig.act()
    rig.recovers()


def test_a_chunk_that_comes_too_late_is_not_published(micro_checkpoint):
    with Rig(micro_checkpoint, parameters={'max_age_s': 5.0}) as rig:
        rig.activate()

        def each():
            rig.feeder.feed(stamp_ns=rig.feeder.now_ns() - seconds(1.0))
            time.sleep(0.03)
        rig.no_chunk('guard: every step of the chunk was due before now', each=each)
        rig.recovers()


def test_what_rclpy_raises_for_a_negative_clock_does_not_end_a_node_on_simulated_time():
    class Executor:
        spins = 0

        def spin(self):
            self.spins += 1
            if self.spins < 3:
                Time.from_msg(TimeMessage(sec=-5))

    def node(simulated):
        return SimpleNamespace(get_parameter=lambda name: SimpleNamespace(value=simulated),
                               get_logger=lambda: SimpleNamespace(error=lambda *_, **__: None))
    executor = Executor()
    policy_node._spin(node(True), executor)
    assert executor.spins == 3
    with pytest.raises(ValueError, match='negative'):
        policy_node._spin(node(False), Executor())
