"""Start the simulated robot and the policy node; episodes run one after another.

ros2 launch meanflow_ros demo.launch.py task:=drawer-open
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

ARGUMENTS = {
    'task': ('faucet-open', 'task of every episode; the README lists them'),
    'seed': ('100000', 'seed of the first episode; the next takes the next seed'),
    'lockstep': ('true', 'simulated time waits for the policy; false: it runs in real time'),
    'checkpoint': ('', 'checkpoint directory; empty for the one that ships'),
    'device': ('', 'auto, cpu, cuda or cuda:N; empty for the one in the parameters file'),
    'namespace': ('', 'namespace of both nodes and their topics'),
}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start the robot and include the policy's launch file."""
    def typed(name, kind):
        return ParameterValue(LaunchConfiguration(name), value_type=kind)

    robot = Node(
        package='meanflow_ros', executable='sim_node', name='sim_robot', output='screen',
        namespace=LaunchConfiguration('namespace'), emulate_tty=True,
        on_exit=lambda _, context: None if context.is_shutdown else [Shutdown()],
        parameters=[{'task': typed('task', str), 'seed': typed('seed', int),
                     'lockstep': typed('lockstep', bool), 'auto_reset': True}])
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution(
            [FindPackageShare('meanflow_ros'), 'launch', 'policy.launch.py'])),
        launch_arguments={'use_sim_time': 'true', 'parameters': PathJoinSubstitution(
            [FindPackageShare('meanflow_ros'), 'config', 'simulation.yaml']),
                          **{name: LaunchConfiguration(name)
                             for name in ('checkpoint', 'device', 'namespace')}}.items())
    return LaunchDescription([
        *(DeclareLaunchArgument(name, default_value=default, description=description)
          for name, (default, description) in ARGUMENTS.items()),
        robot, policy])
