"""The launch files; they need launch_ros, which comes with a full ROS 2 and not as a wheel."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip('launch_ros', reason='launch_ros is missing: it comes with a full ROS 2')

from ament_index_python.packages import (  # noqa: E402, I001
    PackageNotFoundError, get_package_share_directory)
from launch import LaunchContext  # noqa: E402
from launch.launch_description_sources import (  # noqa: E402
    get_launch_description_from_python_launch_file)

try:
    LAUNCH = Path(get_package_share_directory('meanflow_ros')) / 'launch'
except PackageNotFoundError:
    pytest.skip('meanflow_ros is not built and sourced: colcon build, . install/setup.sh',
                allow_module_level=True)

POLICY_ARGUMENTS = {'parameters', 'checkpoint', 'device', 'instruction', 'motion', 'namespace',
                    'use_sim_time', 'autostart', 'remappings', 'log_level'}
DEMO_ARGUMENTS = {'task', 'seed', 'lockstep', 'checkpoint', 'device', 'namespace', 'parameters'}
TIMEOUT_S = 90.0
ACTIVE = 'active: publishing action chunks'
RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
path, *arguments = sys.argv[1:]
service = LaunchService(noninteractive=True)
service.include_launch_description(LaunchDescription([IncludeLaunchDescription(
    path, launch_arguments=[argument.split(':=', 1) for argument in arguments])]))
sys.exit(service.run())
"""


def description(name):
    return get_launch_description_from_python_launch_file(str(LAUNCH / f'{name}.launch.py'))


def visit(name, **arguments):
    context = LaunchContext()
    context.launch_configurations.update(arguments)
    return list(itertools.chain.from_iterable(
        entity.visit(context) or [] for entity in description(name).entities))


@pytest.mark.parametrize(('name', 'expected'), [('policy', POLICY_ARGUMENTS),
                                                ('demo', DEMO_ARGUMENTS)])
def test_a_launch_file_declares_and_describes_its_arguments(name, expected):
    arguments = {argument.name: argument for argument in description(name).get_launch_arguments()}
    assert expected <= set(arguments) <= POLICY_ARGUMENTS | DEMO_ARGUMENTS
    for argument in arguments.values():
        assert argument.default_value is not None
        assert argument.description


def test_no_argument_is_needed_to_start_the_node():
    node, = visit('policy')
    assert (node.node_package, node.node_executable) == ('meanflow_ros', 'policy_node')


@pytest.mark.parametrize(('name', 'given', 'words'), [
    ('policy', 'checkpont:=x', "unknown argument 'checkpont' .did you mean 'checkpoint'"),
    ('policy', 'remapping:=a:=b', "did you mean 'remappings'"),
    ('demo', 'use_sim_time:=false', "unknown argument 'use_sim_time' .known: .*task"),
    ('demo', 'tsk:=reach', "did you mean 'task'")])
def test_a_misspelled_argument_is_refused(monkeypatch, name, given, words):
    monkeypatch.setattr(
        sys, 'argv', ['ros2', 'launch', 'meanflow_ros', f'{name}.launch.py', given])
    with pytest.raises(ValueError, match=words):
        visit(name)


@pytest.mark.parametrize(('argument', 'value'), [('seed', 'first'), ('lockstep', 'maybe')])
def test_a_bad_argument_of_the_demo_is_refused_with_its_name(argument, value):
    with pytest.raises(ValueError, match=f'{argument} must be .*{value}'):
        visit('demo', **{argument: value})


@pytest.mark.parametrize(('argument', 'value'), [
    ('remappings', 'joint_states'), ('remappings', 'a:=b:=c'), ('remappings', 'a:='),
    ('autostart', 'yes'), ('use_sim_time', ''), ('log_level', 'loud'),
    ('parameters', '/nowhere/policy.yaml')])
def test_a_bad_argument_is_refused_with_its_name(argument, value):
    with pytest.raises((ValueError, RuntimeError), match=argument):
        visit('policy', **{argument: value})


def test_the_policy_becomes_active_and_an_interrupt_ends_it_cleanly(tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-c', RUN, str(LAUNCH / 'policy.launch.py'), 'namespace:=launch_test',
         'device:=cpu', 'remappings:=joint_states:=/somewhere'],
        env=os.environ | {'ROS_LOG_DIR': str(tmp_path)}, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    watchdog = threading.Timer(TIMEOUT_S, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if ACTIVE in line and ACTIVE not in ''.join(lines[:-1]):  # launch may repeat a line
                process.send_signal(signal.SIGINT)
        process.wait()
    finally:
        watchdog.cancel()
    text = ''.join(lines)
    assert ACTIVE in text
    assert 'process has finished cleanly' in text
    assert 'Traceback' not in text
    assert process.returncode == 0
