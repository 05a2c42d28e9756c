"""Start the policy node; with no argument at all it runs the checkpoint that ships.

ros2 launch meanflow_ros policy.launch.py checkpoint:=/path/to/checkpoint
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.substitutions import FindPackageShare

ARGUMENTS = {
    'checkpoint': ('', 'checkpoint directory; empty for the one in the parameters file, or the '
                       'one that ships'),
    'device': ('', 'auto, cpu, cuda or cuda:N; empty for the one in the parameters file'),
    'instruction': ('', 'instruction until one arrives on the topic'),
    'motion': ('', 'file that says how the robot is driven, see config/motion_*.yaml; empty for '
                   'the one in the parameters file, or chunks alone'),
    'namespace': ('', 'namespace of the node and its topics'),
    'use_sim_time': ('false', 'take the time from /clock'),
    'autostart': ('true', 'configure and activate without a lifecycle manager'),
    'remappings': ('', "pairs such as 'camera/static/image_raw:=/zed/left/image_rect_color "
                       "joint_states:=/robot/joint_states'"),
}
LOG_LEVELS = ['debug', 'info', 'warn', 'error']


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(':=')) for pair in text.split()]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"remappings must be 'from:=to' pairs separated by spaces, "
                             f'got {text!r}')
    return pairs


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ('true', 'false', '1', '0'):
        raise ValueError(f'{name} must be true or false, got {text!r}')
    return text.lower() in ('true', '1')


def _node(context) -> list[LifecycleNode]:
    value = {name: LaunchConfiguration(name).perform(context)
             for name in ('parameters', *ARGUMENTS, 'log_level')}
    if not Path(value['parameters']).is_file():
        raise ValueError(f"there is no parameters file {value['parameters']}")
    parameters = {name: value[name] for name in ('checkpoint', 'device', 'instruction', 'motion')
                  if value[name]}
    parameters |= {name: _flag(name, value[name]) for name in ('use_sim_time', 'autostart')}
    return [LifecycleNode(
        package='meanflow_ros', executable='policy_node', name='meanflow_policy',
        namespace=value['namespace'], output='screen', emulate_tty=True,
        parameters=[value['parameters'], parameters],
        remappings=_pairs(value['remappings']),
        arguments=['--ros-args', '--log-level', value['log_level']])]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and start the node."""
    defaults = PathJoinSubstitution([FindPackageShare('meanflow_ros'), 'config', 'policy.yaml'])
    return LaunchDescription([
        DeclareLaunchArgument('parameters', default_value=defaults,
                              description='parameters file, see config/policy.yaml'),
        *(DeclareLaunchArgument(name, default_value=default, description=description)
          for name, (default, description) in ARGUMENTS.items()),
        DeclareLaunchArgument('log_level', default_value='info', choices=LOG_LEVELS,
                              description='of the node; debug includes ROS itself'),
        OpaqueFunction(function=_node),
    ])
