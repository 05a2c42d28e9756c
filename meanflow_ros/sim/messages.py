"""What the simulated robot senses, as messages.

`make(kind, **fields)` builds one message of a kind such as 'sensor_msgs/Image': `recorded` for
bags and wherever there is no ROS; the node has one of its own for rclpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS
from meanflow_ros.ros.bag import TYPES
from meanflow_ros.sim.metaworld_robot import RobotObservation
from meanflow_ros.sim.scene import JOINTS

Make = Callable[..., object]


def recorded(kind: str, **fields):
    """Return a message as `rosbags` has it: a dataclass, its numbers in arrays."""
    package, name = kind.split('/')
    return TYPES.types[f'{package}/msg/{name}'](**fields)


def header(make: Make, stamp_ns: int, frame: str):
    """Return a std_msgs/Header."""
    stamp = make('builtin_interfaces/Time', sec=stamp_ns // NANOSECONDS,
                 nanosec=stamp_ns % NANOSECONDS)
    return make('std_msgs/Header', stamp=stamp, frame_id=frame)


def joint_state(make: Make, observed: RobotObservation, stamp_ns: int):
    """Return the joints as a sensor_msgs/JointState."""
    return make('sensor_msgs/JointState', header=header(make, stamp_ns, ''), name=list(JOINTS),
                position=observed.joint_positions, velocity=observed.joint_velocities,
                effort=np.zeros(0))


def tool_pose(make: Make, observed: RobotObservation, stamp_ns: int):
    """Return the tool in the world as a geometry_msgs/PoseStamped."""
    x, y, z = observed.tool_position.tolist()
    qw, qx, qy, qz = observed.tool_quaternion.tolist()
    return make('geometry_msgs/PoseStamped', header=header(make, stamp_ns, 'world'), pose=make(
        'geometry_msgs/Pose', position=make('geometry_msgs/Point', x=x, y=y, z=z),
        orientation=make('geometry_msgs/Quaternion', x=qx, y=qy, z=qz, w=qw)))


def image(make: Make, camera: str, pixels: np.ndarray, stamp_ns: int):
    """Return a picture (H, W, 3) uint8 RGB as a sensor_msgs/Image; its data is not copied here."""
    height, width, channels = pixels.shape
    return make('sensor_msgs/Image', header=header(make, stamp_ns, f'camera_{camera}'),
                height=height, width=width, encoding='rgb8', is_bigendian=0,
                step=width * channels, data=pixels.reshape(-1))


def sensed(make: Make, observed: RobotObservation, stamp_ns: int) -> Iterator[tuple[str, object]]:
    """Yield topic and message of everything that was sensed at `stamp_ns`."""
    yield 'joint_states', joint_state(make, observed, stamp_ns)
    yield 'tool_pose', tool_pose(make, observed, stamp_ns)
    for camera, pixels in observed.images.items():
        yield f'camera/{camera}/image_raw', image(make, camera, pixels, stamp_ns)
