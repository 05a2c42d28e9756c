"""Small bags made by hand, with cameras, states and commands at rates and stamps of their own."""

from __future__ import annotations

import cv2
import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, ActionSpace, CameraSpec, RobotSpec
from meanflow_ros.ros.bag import TYPES, BagWriter

T0 = 1_700_000_000_123_456_789
MS = 1_000_000
ROBOT = RobotSpec(
    robot='arm', state_names=('elbow', 'base'), horizon=5, period_s=0.02,
    cameras=tuple(CameraSpec(name=name, width=20, height=16) for name in ('front', 'wrist')),
    action_space=ActionSpace(name='joints', dimensions=('base', 'elbow', 'gripper'),
                             units=('rad', 'rad', '1'), lower=[-3.1, -0.4, 0.07],
                             upper=[2.9, 1.8, 0.93]))


def make(kind: str, **fields):
    """Return a message of 'package/Name'."""
    package, name = kind.split('/')
    return TYPES.types[f'{package}/msg/{name}'](**fields)


def header(stamp_ns: int, frame: str = ''):
    return make('std_msgs/Header', frame_id=frame, stamp=make(
        'builtin_interfaces/Time', sec=stamp_ns // NANOSECONDS, nanosec=stamp_ns % NANOSECONDS))


def duration(length_ns: int):
    return make('builtin_interfaces/Duration', sec=length_ns // NANOSECONDS,
                nanosec=length_ns % NANOSECONDS)


def image(stamp_ns: int, pixels: np.ndarray):
    height, width, _ = pixels.shape
    return make('sensor_msgs/Image', header=header(stamp_ns), height=height, width=width,
                encoding='rgb8', is_bigendian=0, step=width * 3, data=pixels.reshape(-1))


def compressed(stamp_ns: int, pixels: np.ndarray):
    data = cv2.imencode('.png', cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1]
    return make('sensor_msgs/CompressedImage', header=header(stamp_ns), format='png',
                data=data.reshape(-1))


def joint_state(stamp_ns: int, **positions: float):
    return make('sensor_msgs/JointState', header=header(stamp_ns), name=list(positions),
                position=np.array([*positions.values()]), velocity=np.zeros(0),
                effort=np.zeros(0))


def trajectory(stamp_ns: int, names, points, step_ns: int = 0):
    none = np.zeros(0)
    return make('trajectory_msgs/JointTrajectory', header=header(stamp_ns),
                joint_names=list(names), points=[
                    make('trajectory_msgs/JointTrajectoryPoint', velocities=none,
                         positions=np.array(point, float), accelerations=none, effort=none,
                         time_from_start=duration(i * step_ns)) for i, point in enumerate(points)])


def numbers(values):
    return make('std_msgs/Float32MultiArray', data=np.array(values, np.float32), layout=make(
        'std_msgs/MultiArrayLayout', dim=[], data_offset=0))


def twist(stamp_ns: int, values):
    return make('geometry_msgs/TwistStamped', header=header(stamp_ns), twist=make(
        'geometry_msgs/Twist',
        linear=make('geometry_msgs/Vector3', **dict(zip('xyz', map(float, values[:3])))),
        angular=make('geometry_msgs/Vector3', **dict(zip('xyz', map(float, values[3:]))))))


def status(text: str, number: int | None = None):
    pairs = [] if number is None else [
        make('diagnostic_msgs/KeyValue', key='episode', value=str(number))]
    return make('diagnostic_msgs/DiagnosticStatus', level=0, name='task', message=text,
                hardware_id='', values=pairs)


def text(words: str):
    return make('std_msgs/String', data=words)


def command(time_ns: int) -> np.ndarray:
    """Return the made-up command (3,) of this time: a function of it, so that it can be checked.

    The values are exact in float32.
    """
    tick = (time_ns - T0) // MS
    return np.array([tick / 1024 - 0.5, 0.25 - tick / 4096, (tick % 64) / 128 + 0.125])


def pose(time_ns: int) -> dict[str, float]:
    tick = (time_ns - T0) / MS
    return {'base': tick / 777 - 0.3, 'elbow': 1.7 - tick / 991, 'unused': 9.25}


def pixels(camera: str, number: int, height: int = 16, width: int = 20) -> np.ndarray:
    """Return smooth pixels (H, W, 3) whose brightness tells camera and number."""
    rows, columns = np.mgrid[:height, :width]
    brightness = number * 7 % 147 + (20 if camera == 'wrist' else 3)
    return np.stack([brightness + rows, brightness + columns, np.full_like(rows, brightness + 5)],
                    axis=-1).astype(np.uint8)


class Scene:
    """Collects messages and writes them in the order of their times."""

    def __init__(self):
        self.messages = []

    def add(self, topic: str, time_ns: int, message) -> None:
        self.messages.append((time_ns, topic, message))

    def robot(self, start_ns: int, length_ns: int, *, camera_ns: int = 33 * MS,
              state_ns: int = 10 * MS, action_ns: int = 20 * MS, delay_ns: int = 2 * MS,
              picture=image, suffix: str = '', action=None, action_topic: str = 'action',
              without=()) -> int:
        """Add what a robot publishes; return its end. Pictures arrive `delay_ns` late.

        action(time_ns) makes the command messages, a trajectory of `command` by default.
        """
        end_ns = start_ns + length_ns
        if 'states' not in without:
            for now_ns in range(start_ns, end_ns, state_ns):
                self.add('joint_states', now_ns, joint_state(now_ns, **pose(now_ns)))
        for number, now_ns in enumerate(range(start_ns, end_ns, camera_ns)):
            for camera, late_ns in (('front', 0), ('wrist', MS)):
                if camera not in without:
                    self.add(f'camera/{camera}/image_raw{suffix}', now_ns + late_ns + delay_ns,
                             picture(now_ns + late_ns, pixels(camera, number)))
        if 'actions' not in without:
            for now_ns in range(start_ns, end_ns, action_ns):
                self.add(action_topic, now_ns, (action or plain_action)(now_ns))
        return end_ns

    def write(self, path, order=None, **changes) -> None:
        self.messages.sort(key=lambda entry: entry[0])
        with BagWriter(path) as bag:
            for time_ns, topic, message in self.messages:
                bag.write(topic, message, time_ns)


def plain_action(time_ns: int):
    return trajectory(time_ns, ROBOT.action_space.dimensions, [command(time_ns)])


def simple_bag(path, episodes: int = 2, length_ns: int = 400 * MS, **changes) -> None:
    """Write a bag of successful episodes, cut by a topic; see `Scene.robot` for the changes."""
    scene, now_ns = Scene(), T0
    for number in range(episodes):
        scene.add('episode', now_ns, status('start', number))
        scene.add('instruction', now_ns, text(f'pick up block {number % 2}'))
        now_ns = scene.robot(now_ns, length_ns + 20 * MS * number, **changes)
        scene.add('episode', now_ns + 3 * MS, status('success', number))
        now_ns += 700 * MS
    scene.write(path)
