"""The core, and what the training needs of the edge, run where no ROS is installed."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import meanflow_ros.core
import meanflow_ros.evaluation.replay
import meanflow_ros.training

ROOT = Path(meanflow_ros.core.__file__).parents[2]
ROS = ('rclpy', 'rosidl_runtime_py', 'rosidl_parser', 'rpyutils', 'ament_index_python',
       'builtin_interfaces', 'rcl_interfaces', 'sensor_msgs', 'std_msgs', 'std_srvs',
       'geometry_msgs', 'trajectory_msgs', 'diagnostic_msgs', 'lifecycle_msgs',
       'visualization_msgs', 'rosgraph_msgs')
EDGE = ['meanflow_ros.ros.from_messages', 'meanflow_ros.ros.ingest', 'meanflow_ros.ros.bag']
NEEDS_ROS = 'meanflow_ros.evaluation.replay.live'


def modules_of(package):
    return [f'{package.__name__}.{module.name}' for module in pkgutil.iter_modules(
        package.__path__)]


def run_without_ros(code):
    """Run Python code in a process where importing any ROS package fails."""
    block = f'import sys\nfor name in {ROS}: sys.modules[name] = None\n'
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', block + code], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope='module')
def imported():
    """Import the core, say what that loaded, then import the rest."""
    core, rest = modules_of(meanflow_ros.core), EDGE + modules_of(meanflow_ros.training) + [
        name for name in modules_of(meanflow_ros.evaluation.replay) if name != NEEDS_ROS]
    assert 'meanflow_ros.core.policy' in core and 'meanflow_ros.training.train' in rest
    done = run_without_ros(
        f'import importlib, json\n'
        f'for name in {core}: importlib.import_module(name)\n'
        f"print(json.dumps([n for n in sys.modules if n.startswith('meanflow_ros.')]))\n"
        f'for name in {rest}: importlib.import_module(name)\n'
        f"print('all imported')\n")
    return core, done.stdout.splitlines(), done.stderr


def test_every_module_of_the_core_imports_without_ros_and_without_the_edge(imported):
    core, lines, errors = imported
    assert lines, errors
    loaded = json.loads(lines[0])
    assert [name for name in loaded if not name.startswith('meanflow_ros.core')] == []
    assert set(core) <= set(loaded)


def test_messages_bags_training_and_replay_import_without_ros(imported):
    _, lines, errors = imported
    assert lines[1:] == ['all imported'], errors


def test_what_drives_every_controller_is_replayed_without_ros():
    done = run_without_ros(
        'import numpy as np\n'
        'from meanflow_ros.core.contract import ActionSpace\n'
        'from meanflow_ros.ros import motion_config as c\n'
        'from meanflow_ros.ros.outputs import make_output\n'
        "space = ActionSpace(name='s', dimensions=('a',), units=('1',), lower=[0], upper=[1])\n"
        "for each in (c.JointTrajectoryOutput(topic='t', dimensions=('a',)),\n"
        "             c.ForwardCommandOutput(topic='t', dimensions=('a',)),\n"
        "             c.TwistOutput(topic='t', axes={'linear.x': 'a'}, frame_id='f'),\n"
        "             c.JointJogOutput(topic='t', dimensions=('a',)),\n"
        "             c.GripperOutput(topic='t', dimension='a', binary=True)):\n"
        '    output = make_output(None, each, space)\n'
        '    if output.streams: output.send_command(None)\n'
        "    print(each.topic, output.publisher)\n")
    assert done.stdout.splitlines() == ['t None'] * 5, done.stderr


def test_a_live_replay_without_ros_says_what_it_needs():
    done = run_without_ros('import meanflow_ros.evaluation.replay.live')
    assert '--live needs ROS 2: source one' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('module', ['rclpy', 'sensor_msgs'])
def test_the_block_would_show_an_import_of_ros(module):
    done = run_without_ros(f'import {module}')
    assert done.returncode != 0 and 'ModuleNotFoundError' in done.stderr
