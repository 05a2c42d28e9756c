"""Start the simulated robot and the policy node; episodes run one after another.

ros2 launch meanflow_ros demo.launch.py task:=drawer-open
"""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction, Shutdown)
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

from meanflow_ros import launch_arguments

ARGUMENTS = {
    'task': ('faucet-open',
             'task of every episode; an unknown one is refused with a list of all'),
    'seed': ('100000', 'seed of the first episode; the next takes the next seed'),
    'lockstep': ('true', 'simulated time waits for the policy; false: it runs in real time'),
    'checkpoint': ('', 'checkpoint directory; empty for the one that ships'),
    'device': ('', 'auto, cpu, cuda or cuda:N; empty for the one in the parameters file'),
    'namespace': ('', 'namespace of both nodes and their topics'),
}


# Of the policy's launch file, beside those above that it has too.
PASSED_ON = ('instruction', 'motion', 'autostart', 'remappings', 'log_level')


def _robot(context) -> list[Node]:
    launch_arguments.refuse_unknown(__file__, ('parameters', *ARGUMENTS, *PASSED_ON))
    value = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    return [Node(
        package='meanflow_ros', executable='sim_node', name='sim_robot', output='screen',
        namespace=value['namespace'], emulate_tty=True,
        on_exit=lambda _, context: None if context.is_shutdown else [Shutdown()],
        parameters=[{'task': ParameterValue(value['task'], value_type=str),
                     'seed': launch_arguments.whole_number('seed', value['seed']),
                     'lockstep': launch_arguments.flag('lockstep', value['lockstep']),
                     'auto_reset': True}])]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start the robot and include the policy's launch file."""
    share = FindPackageShare('meanflow_ros')
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution(
            [share, 'launch', 'policy.launch.py'])),
        launch_arguments={'use_sim_time': 'true', **{
            name: LaunchConfiguration(name)
            for name in ('parameters', 'checkpoint', 'device', 'namespace')}}.items())
    return LaunchDescription([
        *(DeclareLaunchArgument(name, default_value=default, description=description)
          for name, (default, description) in ARGUMENTS.items()),
        DeclareLaunchArgument(
            'parameters', description="the policy's parameters file, see config/simulation.yaml",
            default_value=PathJoinSubstitution([share, 'config', 'simulation.yaml'])),
        OpaqueFunction(function=_robot), policy])
