"""What a bag gives to training is what the node sees live: the same messages, over DDS."""

from __future__ import annotations

import made_bags as made
import numpy as np
import pytest
import torch
from made_bags import MS, T0, Scene, text
from micro_policy import CAMERAS, DIMENSIONS, HEIGHT, JOINTS, WIDTH, make_policy
from node_rig import Rig, until
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from meanflow_ros.ros import to_messages
from meanflow_ros.ros.bag import read_messages
from meanflow_ros.ros.from_messages import time_ns
from meanflow_ros.training.bags import read_bag, read_bag_pairs
from meanflow_ros.training.data_config import DataConfig

LENGTH_MS = 420


def record(path, compressed: bool) -> None:
    """Record cameras at 30 and 20 Hz with delays and a skew, joints at 100 Hz, with faults.

    One picture comes twice, one is malformed, the joint states pause and, when they come again,
    complete an observation before the instruction changes.
    """
    scene, suffix = Scene(), '/compressed' if compressed else ''
    random = np.random.default_rng(11)
    make_picture = made.compressed if compressed else made.image
    scene.add('instruction', T0 - 5 * MS, text(' push the lever '))
    scene.add('instruction', T0 + 255 * MS, text('pull the lever'))
    for late in range(0, LENGTH_MS, 10):
        if not 140 <= late < 250:
            now_ns = T0 + late * MS
            scene.add('joint_states', now_ns + 31_000, made.joint_state(
                now_ns, c=late / 7, extra=1.0, a=0.3 - late / 911, b=0.5))
    for camera, every, skew, delay in (('static', 33, 0, 4), ('wrist', 50, 7, 11)):
        for number, late in enumerate(range(0, LENGTH_MS, every)):
            stamp_ns = T0 + (late + skew) * MS
            pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            message = make_picture(stamp_ns, pixels)
            received_ns = stamp_ns + delay * MS + int(random.integers(0, 900_000))
            if camera == 'static' and number == 3:
                scene.add(f'camera/static/image_raw{suffix}', received_ns + 1, message)
            if camera == 'wrist' and number == 5 and compressed:
                message.data = message.data[:40]
            elif camera == 'wrist' and number == 5:
                message.step = 7
            scene.add(f'camera/{camera}/image_raw{suffix}', received_ns, message)
    for late in range(0, LENGTH_MS + 100, 20):
        now_ns = T0 + late * MS
        scene.add('action', now_ns, made.trajectory(now_ns, DIMENSIONS, [[0.1, late / 30, 0.01]]))
    scene.write(path)


def as_live(message):
    """Turn a recorded message into the class that rclpy publishes."""
    if hasattr(message, 'position'):
        live = JointState(name=message.name, position=message.position.tolist())
    elif hasattr(message, 'format'):
        live = CompressedImage(format=message.format, data=message.data.tobytes())
    elif hasattr(message, 'encoding'):
        live = Image(height=message.height, width=message.width, encoding=message.encoding,
                     step=message.step, data=message.data.tobytes())
    else:
        return String(data=message.data)
    live.header.stamp = to_messages.time(time_ns(message.header.stamp))
    return live


def replay(rig: Rig, path) -> list:
    """Publish a bag's messages one by one, at its times; return what the node gave its policy."""
    seen, taken = [], []

    def note(real, observation, **options):
        seen.append(observation)
        return real(observation, **options)

    rig.act(note)
    node, feeder = rig.node, rig.feeder
    for name in ('_on_picture', '_on_joint_state', '_on_instruction'):
        count_calls(node, name, taken)
    for topic, received_ns, message in read_messages(path):
        if topic == '/action':
            continue
        feeder.tick(received_ns)
        until(lambda: node.get_clock().now().nanoseconds == received_ns, 'the time of the bag')
        before = len(taken)
        publisher = (feeder.joints if topic == '/joint_states' else
                     feeder.instruction if topic == '/instruction' else
                     feeder.pictures[topic.split('/')[2]])
        publisher.publish(as_live(message))
        until(lambda: len(taken) > before, f'the arrival of a message on {topic}')
        until(lambda: not rig._busy(), 'silence')
    return seen


def count_calls(node, name: str, taken: list) -> None:
    """Note each message that a callback of the node has stored."""
    ingest = node._ingest
    stores = {'_on_picture': 'add_serialized', '_on_joint_state': 'add_joint_state',
              '_on_instruction': 'set_instruction'}
    real = getattr(ingest, stores[name])

    def noted(*arguments, **options):
        try:
            return real(*arguments, **options)
        finally:
            taken.append(name)
    setattr(ingest, stores[name], noted)


@pytest.mark.parametrize('transport', ['raw', 'compressed'])
def test_a_bag_and_the_live_node_make_equal_observations(micro_checkpoint, tmp_path, transport):
    record(tmp_path / 'bag', transport == 'compressed')
    robot, data = make_policy().robot, DataConfig(episodes='bag')
    (recorded,) = read_bag(tmp_path / 'bag', robot, data, keep=dict)
    with Rig(micro_checkpoint, instruction=None, reliable=True, parameters={
            'use_sim_time': True, 'image_transport': transport}) as rig:
        rig.feeder.tick(T0 - 10 * MS)
        rig.activate()
        live = replay(rig, tmp_path / 'bag')
    assert [o.stamp_ns for o in recorded.observations] == [o.stamp_ns for o in live]
    assert 5 <= len(live) <= 11
    assert {o.instruction for o in live} == {'push the lever', 'pull the lever'}
    for from_bag, seen in zip(recorded.observations, live):
        assert from_bag.instruction == seen.instruction
        np.testing.assert_array_equal(from_bag.state, seen.state)
        assert len(seen.state) == len(JOINTS)
        for camera in CAMERAS:
            np.testing.assert_array_equal(from_bag.pictures[camera], seen.images[camera])


def test_a_policy_sees_the_pictures_that_it_was_trained_on(tmp_path):
    record(tmp_path / 'bag', False)
    policy, data = make_policy(), DataConfig(episodes='bag')
    size = policy.config.encoder.image_size
    (recorded,) = read_bag(tmp_path / 'bag', policy.robot, data, keep=dict)
    (pairs,) = read_bag_pairs(tmp_path / 'bag', policy.robot, data, size)
    encoder = policy.network.encoder
    assert len(pairs) > 5                    # the last ones have no action that was due after
    for row, seen in enumerate(recorded.observations[:len(pairs)]):
        for at, camera in enumerate(CAMERAS):
            live = encoder.preprocess(seen.pictures[camera])                # (3, S, S)
            trained = torch.tensor(pairs.pictures[row, at]).permute(2, 0, 1)
            assert (live - trained).abs().max() <= 0.5
