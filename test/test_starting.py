"""How the nodes start, and what the launch files read; neither needs launch itself."""

import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip('rclpy')

from meanflow_ros import launch_arguments  # noqa: E402

RUN = 'import sys; from meanflow_ros.ros import starting; print("up", flush=True); ' \
      'sys.exit(starting.{}())'


def run(node, *arguments):
    return subprocess.run([sys.executable, '-c', RUN.format(node), *arguments], timeout=90,
                          text=True, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('after_s', [0.05, 0.6])
def test_an_interrupt_while_the_node_starts_ends_it_cleanly(number, after_s):
    process = subprocess.Popen([sys.executable, '-c', RUN.format('policy_node')], text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == 'up\n'
    time.sleep(after_s)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, '')


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--checkpoint', '/run/policy'],
     'unknown arguments: --checkpoint /run/policy; a parameter is given by --ros-args -p'),
    (['--ros-args', '--bad'], "unknown arguments after --ros-args: ['--bad']"),
    (['--ros-args', '--params-file', '/nowhere'], "params file: '--params-file /nowhere'")])
def test_arguments_that_cannot_be_read_are_refused_in_one_line(arguments, words):
    pytest.importorskip('metaworld', reason='the simulated robot starts faster than the policy')
    done = run('sim_node', *arguments)
    said = [line for line in done.stderr.splitlines() if '[rcl]' not in line]
    assert done.returncode == 1
    assert len(said) == 1 and said[0].startswith('sim_robot: ') and words in said[0]


@pytest.mark.parametrize('command', [['ros2', 'launch', 'meanflow_ros', 'policy.launch.py'],
                                     ['ros2', 'launch', 'launch/policy.launch.py']])
def test_a_misspelled_launch_argument_is_refused_with_a_hint(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path / 'launch/policy.launch.py')
    known = ('checkpoint', 'remappings')
    launch_arguments.refuse_unknown(file, known, [*command, 'remappings:=a:=b'])
    with pytest.raises(ValueError, match="'checkpont' .did you mean 'checkpoint'"):
        launch_arguments.refuse_unknown(file, known, [*command, 'checkpont:=x'])


def test_the_arguments_of_a_launch_file_that_includes_ours_are_its_own():
    for command in (['meanflow_robot', 'policy.launch.py'], ['/robot/policy.launch.py']):
        launch_arguments.refuse_unknown('/share/meanflow_ros/launch/policy.launch.py',
                                        ('checkpoint',), ['ros2', 'launch', *command, 'arm:=x'])


def test_a_home_directory_is_found_though_the_shell_leaves_it(monkeypatch):
    monkeypatch.setenv('HOME', '/home/her')
    assert launch_arguments.path('~/run/policy') == '/home/her/run/policy'
