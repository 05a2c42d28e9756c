"""Meta-World's Sawyer as a robot: velocity commands in, pictures and joint states out.

Physics runs at 80 Hz; the robot takes a command every `PERIOD_S` and holds it for two physics
steps. Pictures show a goal marker only where nothing else shows the goal, so the instruction
tells what to do.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meanflow_ros.core.contract import ActionSpace
from meanflow_ros.sim.graphics import load_simulator
from meanflow_ros.sim.scene import CAMERAS, Scene
from meanflow_ros.sim.tasks import check_task

PERIOD_S = 1 / 40
MAX_STEPS = 200
EVALUATION_SEED_START = 100_000
MAX_SPEED = 0.8   # m/s at Meta-World's action 1: 0.01 m in each physics step of 1/80 s
ACTION_SPACE = ActionSpace(
    name='eef_velocity',
    dimensions=('tool_vx', 'tool_vy', 'tool_vz', 'gripper'),
    units=('m/s', 'm/s', 'm/s', '1'),
    lower=(-MAX_SPEED, -MAX_SPEED, -MAX_SPEED, -1.0),
    upper=(MAX_SPEED, MAX_SPEED, MAX_SPEED, 1.0),
    rates=('tool_vx', 'tool_vy', 'tool_vz'), gripper=('gripper',))

_PHYSICS_STEPS = 2
_TO_PHYSICS = 1 / ACTION_SPACE.upper


@dataclass(frozen=True, kw_only=True)
class RobotObservation:
    """What the sensors say at one time.

    images: camera name -> (H, W, 3) uint8 RGB. joint_positions, joint_velocities: (9,) float64
    in the order of `JOINTS`, rad and rad/s (fingers: m and m/s). tool_position: (3,) m and
    tool_quaternion: (4,) w, x, y, z, both in the world.
    """

    images: dict[str, np.ndarray]
    joint_positions: np.ndarray
    joint_velocities: np.ndarray
    tool_position: np.ndarray
    tool_quaternion: np.ndarray


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one control step gave: Meta-World's reward (0 to 10), and success so far.

    mode: how it was done, of the task's `modes`; '' before that shows, or where there is one only.
    """

    reward: float
    success: bool
    mode: str = ''


class MetaWorldRobot:
    """A simulated Sawyer that does one task at a time; use it from one thread only.

    image_width, image_height: pixels of both cameras.
    """

    def __init__(self, *, image_width: int = 224, image_height: int = 224):
        if not (16 <= image_width <= 1920 and 16 <= image_height <= 1920):
            raise ValueError(f'image size must be 16 to 1920 pixels, '
                             f'got {image_width}x{image_height}')
        self._simulator = load_simulator()
        self._size = image_width, image_height
        self._scenes: dict[str, Scene] = {}
        self._scene: Scene | None = None
        self._sensed = np.zeros(0)
        self._success = False

    def reset(self, task: str, seed: int) -> None:
        """Begin an episode. The same task and seed give the same bits, whatever ran before."""
        check_task(task)
        if not 0 <= seed < 2**32:
            raise ValueError(f'seed must be 0 to 2^32 - 1, got {seed}')
        if task not in self._scenes:
            self._scenes[task] = Scene(self._simulator, task, *self._size)
            # Before MuJoCo's own exit handler, which ends the graphics under the renderer.
            atexit.register(self._scenes[task].close)
        self._scene = self._scenes[task]
        self._sensed = self._scene.reset(seed)
        self._success = False

    def observe(self, cameras: Sequence[str] = CAMERAS) -> RobotObservation:
        """Read the sensors; only the cameras named are rendered."""
        scene = self._require_scene()
        data = scene.env.data
        return RobotObservation(
            images={camera: scene.render(camera) for camera in cameras},
            joint_positions=data.qpos[scene.joint_at],
            joint_velocities=data.qvel[scene.velocity_at],
            tool_position=np.array(scene.env.tcp_center),
            tool_quaternion=np.array(data.body('hand').xquat))

    def step(self, command: np.ndarray) -> StepResult:
        """Execute a command (4,) in `ACTION_SPACE` units, clipped to its limits, for PERIOD_S.

        ValueError if it is not 4 finite numbers. The reward is that of the last physics step.
        """
        scene = self._require_scene()
        command = np.asarray(command, np.float64)
        if command.shape != (ACTION_SPACE.size,) or not np.isfinite(command).all():
            raise ValueError(f'a command is {ACTION_SPACE.size} finite numbers, got {command}')
        action = np.clip(command * _TO_PHYSICS, -1.0, 1.0)
        for _ in range(_PHYSICS_STEPS):
            self._sensed, reward, _, _, info = scene.env.step(action)
            self._success = self._success or bool(info['success'])
        return StepResult(reward=float(reward), success=self._success,
                          mode=scene.mode_taken)

    def expert_action(self) -> np.ndarray:
        """Return the scripted expert's command (4,) at the present state, within the limits."""
        action = self._require_scene().expert_action(self._sensed)
        return np.clip(action, -1.0, 1.0) / _TO_PHYSICS

    @property
    def expert_mode(self) -> str:
        """Return which of its task's `modes` the expert goes now, '' if there are none."""
        return self._require_scene().expert_mode

    def close(self) -> None:
        """Free the renderers; the robot needs a reset before it can be used again."""
        for scene in self._scenes.values():
            atexit.unregister(scene.close)
            scene.close()
        self._scenes.clear()
        self._scene = None

    def _require_scene(self) -> Scene:
        if self._scene is None:
            raise RuntimeError('reset the robot first')
        return self._scene
