"""Start the policy node; with no argument at all it runs the checkpoint that ships.

ros2 launch meanflow_ros policy.launch.py checkpoint:=/path/to/checkpoint
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.substitutions import FindPackageShare

from meanflow_ros import launch_arguments

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


def _node(context) -> list[LifecycleNode]:
    names = ('parameters', *ARGUMENTS, 'log_level')
    launch_arguments.refuse_unknown(__file__, names)
    value = {name: LaunchConfiguration(name).perform(context) for name in names}
    for name in ('parameters', 'checkpoint', 'motion'):
        value[name] = launch_arguments.path(value[name])
    if not Path(value['parameters']).is_file():
        raise ValueError(f"there is no parameters file {value['parameters']}")
    parameters = {name: value[name] for name in ('checkpoint', 'device', 'instruction', 'motion')
                  if value[name]}
    parameters |= {name: launch_arguments.flag(name, value[name])
                   for name in ('use_sim_time', 'autostart')}
    return [LifecycleNode(
        package='meanflow_ros', executable='policy_node', name='meanflow_policy',
        namespace=value['namespace'], output='screen', emulate_tty=True,
        parameters=[value['parameters'], parameters],
        remappings=launch_arguments.remappings(value['remappings']),
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
