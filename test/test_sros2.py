"""The policy files of SROS 2 allow what the nodes do, and nothing that they do not."""

import fnmatch
import importlib.util
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

pytest.importorskip('rclpy', reason='rclpy is missing: source a ROS 2, or install its wheels')

import rclpy  # noqa: E402, I001
from rclpy.parameter import Parameter  # noqa: E402

from meanflow_ros.ros.policy_node import PolicyNode  # noqa: E402
from node_rig import until  # noqa: E402
from reliability.checkpoint import write_checkpoint  # noqa: E402

CONFIG = Path(__file__).parents[1] / 'config'
POLICY = CONFIG / 'sros2' / 'meanflow.policy.xml'
OF_RCLPY = {'/rosout', '/parameter_events', '/clock'}


def rules(node: str) -> dict[str, set[str]]:
    """Return kind (publish, subscribe, reply, request) -> names of the profile of a node."""
    (profile,) = (profile for profile in ElementTree.parse(POLICY).iter('profile')
                  if profile.get('node') == node)
    found: dict[str, set[str]] = {}
    for group in profile:
        for kind, qualifier in group.attrib.items():
            assert qualifier == 'ALLOW'
            found.setdefault(kind, set()).update(
                item.text if item.text.startswith('/') else
                item.text.replace('~', f'/{node}') if item.text.startswith('~') else
                f'/{item.text}' for item in group)
    return found


def of_the_policy_node(tmp_path) -> dict[str, set[str]]:
    """Return what a configured node really has, with raw and with compressed pictures."""
    found = {kind: set() for kind in ('publish', 'subscribe', 'reply')}
    checkpoint = write_checkpoint(tmp_path / 'policy')
    for number, transport in enumerate(('raw', 'compressed')):
        context = rclpy.Context()      # where no other node has had this name
        context.init(domain_id=(int(os.environ['ROS_DOMAIN_ID']) + 57 + number) % 101 + 1)
        node = PolicyNode(context=context, parameter_overrides=[
            Parameter('checkpoint', value=str(checkpoint)),
            Parameter('image_transport', value=transport)])
        try:
            assert node.trigger_configure() == rclpy.lifecycle.TransitionCallbackReturn.SUCCESS
            suffix = {'raw': 'image_raw', 'compressed': 'image_raw/compressed'}[transport]
            until(lambda: any(name.endswith(suffix) for name, _ in
                              node.get_subscriber_names_and_types_by_node('meanflow_policy', '/')),
                  'discovery')
            for kind, ask in (('publish', node.get_publisher_names_and_types_by_node),
                              ('subscribe', node.get_subscriber_names_and_types_by_node),
                              ('reply', node.get_service_names_and_types_by_node)):
                found[kind] |= {name for name, _ in ask('meanflow_policy', '/')}
        finally:
            node._release()
            node.destroy_node()
            context.try_shutdown()
    return found


def test_the_policy_node_is_allowed_what_it_does_and_nothing_else(tmp_path):
    real, allowed = of_the_policy_node(tmp_path), rules('meanflow_policy')
    assert {'/meanflow_policy/estop', '/meanflow_policy/set_parameters'} <= real['reply']
    for kind, names in real.items():
        refused = {name for name in names
                   if not any(fnmatch.fnmatchcase(name, rule) for rule in allowed[kind])}
        assert refused == set(), f'{kind} is not allowed'
    commands = {output['topic'] for path in CONFIG.glob('motion_*.yaml')
                for output in yaml.safe_load(path.read_text())['outputs']}
    assert len(commands) == 8 and commands <= allowed['publish']
    for kind, names in allowed.items():
        needless = {rule for rule in names - OF_RCLPY - commands
                    if not any(fnmatch.fnmatchcase(name, rule) for name in real.get(kind, ()))}
        if kind == 'reply':   # from Iron on, where the distribution has it
            needless -= {'/meanflow_policy/get_type_description'}
        assert needless == set(), f'{kind} is allowed and never done'


def test_between_enclaves_stands_no_comment_which_the_tools_would_take_for_an_enclave():
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    (enclaves,) = ElementTree.parse(POLICY, parser).getroot().iter('enclaves')
    assert [element.get('path') for element in enclaves] == [
        '/meanflow/policy', '/meanflow/sim', '/meanflow/operator']


def test_the_operator_may_call_every_service_of_the_policy_node_and_command_nothing():
    policy, operator = rules('meanflow_policy'), rules('operator')
    assert operator['request'] == policy['reply'] and 'reply' not in operator
    assert operator['publish'] - OF_RCLPY == {'/instruction'}
    assert 'request' not in policy


def test_the_simulated_robot_is_allowed_what_it_does(tmp_path):
    if importlib.util.find_spec('metaworld') is None:     # importing it would choose an OpenGL
        pytest.skip('metaworld is missing')
    from meanflow_ros.sim import sim_node
    from meanflow_ros.sim.metaworld_robot import CAMERAS
    allowed = rules('sim_robot')
    source = Path(sim_node.__file__).read_text()
    for kind in ('publish', 'subscribe'):
        names = allowed[kind] - OF_RCLPY
        assert names and all(name.split('*')[0].strip('/').split('/')[0] in source
                             for name in names)
    assert all(any(fnmatch.fnmatchcase(f'/camera/{camera}/image_raw', rule)
                   for rule in allowed['publish']) for camera in CAMERAS)
