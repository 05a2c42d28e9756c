"""What the README and config/policy.yaml say is what the node has."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

import rclpy  # noqa: E402, I001
from rclpy.parameter import Parameter  # noqa: E402

from meanflow_ros.core.meanflow import LOSSES  # noqa: E402
from meanflow_ros.paths import share_directory  # noqa: E402
from meanflow_ros.ros.motion_config import OUTPUTS, MotionConfig  # noqa: E402
from meanflow_ros.ros.parameters import DECLARATIONS  # noqa: E402
from meanflow_ros.ros.policy_node import PolicyNode  # noqa: E402
from meanflow_ros.ros.streams import KINDS  # noqa: E402
from meanflow_ros.training.config import options  # noqa: E402
from meanflow_ros.training.data_config import DataConfig  # noqa: E402
from micro_policy import CAMERAS  # noqa: E402

README = Path(__file__).parent.parent / 'README.md'
TRAINING = README.parent / 'docs' / 'training.md'
MOTION = README.parent / 'docs' / 'motion.md'
CONFIG = share_directory() / 'config' / 'policy.yaml'
OF_EVERY_NODE = {'/rosout', '/parameter_events', '/clock', '/meanflow_policy/transition_event'}


def rows(marker: str, document: Path = README) -> list[list[str]]:
    """Return the cells of a table between <!-- marker --> and <!-- /marker -->."""
    if not document.is_file():
        pytest.skip(f'there is no {document.name} beside the tests')
    table = re.search(f'<!-- {marker} -->(.*?)<!-- /{marker} -->', document.read_text(), re.DOTALL)
    assert table, f'{document.name} has no <!-- {marker} --> ... <!-- /{marker} -->'
    lines = [line.strip() for line in table[1].splitlines() if line.strip().startswith('| `')]
    return [[cell.strip().strip('`') for cell in line.strip('|').split('|')] for line in lines]


def test_the_readme_names_every_parameter_with_its_default_and_effect():
    written = [(name, default, effect) for name, default, effect, *_ in rows('parameters')]
    assert written == [(d.name, repr(d.default), d.takes_effect) for d in DECLARATIONS]


def test_training_md_names_every_option_with_its_default():
    written = [(name, default) for name, default, *_ in rows('options', TRAINING)]
    assert written == [(option.name, repr(option.default)) for option in options()]


def test_training_md_names_every_field_of_the_section_data():
    defaults = DataConfig()
    assert rows('data', TRAINING) == [[field.name, repr(getattr(defaults, field.name))]
                                      for field in dataclasses.fields(DataConfig)]


def test_motion_md_names_every_field_of_a_motion_file_with_its_default():
    defaults = MotionConfig()
    assert [row[:2] for row in rows('motion', MOTION)] == [
        [field.name, repr(getattr(defaults, field.name))]
        for field in dataclasses.fields(MotionConfig)]


def test_motion_md_names_every_output_and_every_kind_of_missing_input():
    assert [row[0] for row in rows('outputs', MOTION)] == list(OUTPUTS)
    assert [row[0] for row in rows('kinds', MOTION)] == list(KINDS)


def test_training_md_names_every_loss():
    text = TRAINING.read_text() if TRAINING.is_file() else pytest.skip('no training.md here')
    assert all(f'| `{name}` |' in text for name in LOSSES)


def test_policy_yaml_holds_every_parameter_with_its_default():
    document = yaml.safe_load(CONFIG.read_text())
    assert list(document) == ['/**'] and list(document['/**']) == ['ros__parameters']
    values = document['/**']['ros__parameters']
    assert [(name, type(value), value) for name, value in values.items()] == [
        (d.name, type(d.default), d.default) for d in DECLARATIONS]


def test_policy_yaml_says_when_each_parameter_takes_effect():
    written = re.findall(r'^    (\w+):.*# \[(\w+)\]', CONFIG.read_text(), re.MULTILINE)
    assert written == [(d.name, d.takes_effect) for d in DECLARATIONS]


def topics_of_the_node(checkpoint, transport: str) -> dict[str, tuple[str, str]]:
    """Return topic -> (type, direction) of a configured node."""
    context = rclpy.Context()
    context.init()
    node = PolicyNode(context=context, parameter_overrides=[
        Parameter('checkpoint', value=str(checkpoint)),
        Parameter('image_transport', value=transport)])
    try:
        assert node.trigger_configure() == rclpy.lifecycle.TransitionCallbackReturn.SUCCESS
        found = {endpoint.topic_name: (endpoint.msg_type, direction)
                 for direction, endpoints in (('in', node.subscriptions), ('out', node.publishers))
                 for endpoint in endpoints if endpoint.topic_name not in OF_EVERY_NODE}
    finally:
        node._release()
        node.destroy_node()
        context.try_shutdown()
    return {topic: (f'{kind.__module__.split(".")[0]}/{kind.__name__}', direction)
            for topic, (kind, direction) in found.items()}


def test_the_readme_names_every_topic_with_its_type(micro_checkpoint):
    found = {}
    for transport in ('raw', 'compressed'):
        found |= topics_of_the_node(micro_checkpoint, transport)
    written = {}
    for name, kind, direction, *_ in rows('topics'):
        for camera in CAMERAS:
            topic = '/' + name.replace('<key>', camera).replace('~', 'meanflow_policy').lstrip('/')
            written[topic] = (kind, direction)
    # Only where actions are positions of measured joints, which is not so for this policy.
    assert written.pop('/robot_description') == ('std_msgs/String', 'in')
    assert written == found
