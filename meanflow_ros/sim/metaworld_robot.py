"""Meta-World's Sawyer as a robot: velocity commands in, pictures and joint states out.

Physics runs at 80 Hz; the robot takes a command every `PERIOD_S` and holds it for two physics
steps. Pictures never show the goal markers, so only the instruction tells what to do.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from meanflow_ros.core.contract import ActionSpace
from meanflow_ros.core.schema import known_or_hint

TASKS = {
    'faucet-open': ('faucet-open-v3', 'open the faucet'),
    'faucet-close': ('faucet-close-v3', 'close the faucet'),
    'drawer-open': ('drawer-open-v3', 'open the drawer'),
    'drawer-close': ('drawer-close-v3', 'close the drawer'),
    'window-open': ('window-open-v3', 'open the window'),
    'window-close': ('window-close-v3', 'close the window'),
    'button-press-topdown': ('button-press-topdown-v3', 'press the button'),
}
CAMERAS = ('static', 'wrist')
JOINTS = (*(f'right_j{i}' for i in range(7)), 'r_close', 'l_close')
PERIOD_S = 1 / 40
MAX_STEPS = 200
EVALUATION_SEED_START = 100_000
MAX_SPEED = 0.8   # m/s at Meta-World's action 1: 0.01 m in each physics step of 1/80 s
ACTION_SPACE = ActionSpace(
    name='eef_velocity',
    dimensions=('tool_vx', 'tool_vy', 'tool_vz', 'gripper'),
    units=('m/s', 'm/s', 'm/s', '1'),
    lower=(-MAX_SPEED, -MAX_SPEED, -MAX_SPEED, -1.0),
    upper=(MAX_SPEED, MAX_SPEED, MAX_SPEED, 1.0))

_PHYSICS_STEPS = 2
_TO_PHYSICS = 1 / ACTION_SPACE.upper
_MODEL_CAMERAS = {'static': 'corner2', 'wrist': 'gripperPOV'}
_STATIC_VIEW = ((1.0, -0.1, 1.0), (0.0, 0.66, 0.15))   # from, to: metres in the world
_STATIC_FOVY_DEG = 38.0
_WRIST_VIEW = ((0.14, -0.06, 0.03), (0.0, 0.04, -0.13))   # from, to: metres from the hand
_FAUCET_LOW, _FAUCET_HIGH = (-0.1, 0.8, 0.0), (0.1, 0.85, 0.0)
_SLOW_FLAGS = ('SHADOW', 'REFLECTION')
_EGL_PLATFORM_DEVICE = 0x313F
_NO_GRAPHICS = ('no offscreen OpenGL for the cameras: neither EGL nor OSMesa works here; on '
                'Debian or Ubuntu install libegl1 libgl1-mesa-dri libosmesa6')


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
    """What one control step gave: Meta-World's reward (0 to 10), and success so far."""

    reward: float
    success: bool


def check_task(task: str) -> str:
    """Return the task; ValueError with the known ones if there is no such task."""
    if task not in TASKS:
        raise ValueError(f'unknown task {task!r} ({known_or_hint(task, TASKS)}; '
                         f'tasks: {", ".join(TASKS)})')
    return task


def _egl_works() -> bool:
    """Whether any EGL device gives a display, asked as MuJoCo asks it."""
    try:
        egl = ctypes.CDLL('libEGL.so.1')
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        query = egl.eglGetProcAddress(b'eglQueryDevicesEXT')
        display_of = egl.eglGetProcAddress(b'eglGetPlatformDisplayEXT')
    except (OSError, AttributeError):
        return False
    if not query or not display_of:
        return False
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    query = ctypes.CFUNCTYPE(ctypes.c_uint, integer, ctypes.POINTER(pointer),
                             ctypes.POINTER(integer))(query)
    display_of = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(display_of)
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    egl.eglTerminate.argtypes = [pointer]
    devices, count = (pointer * 32)(), integer()
    if not query(32, devices, ctypes.byref(count)):
        return False
    for device in devices[:count.value]:
        display = display_of(_EGL_PLATFORM_DEVICE, device, None)
        if display and egl.eglInitialize(display, None, None):
            egl.eglTerminate(display)
            return True
    return False


def _osmesa_works() -> bool:
    for name in ('libOSMesa.so.8', 'libOSMesa.so.6', 'libOSMesa.so'):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _load_simulator() -> SimpleNamespace:
    """Import MuJoCo and Meta-World with an offscreen OpenGL; RuntimeError says what to install."""
    if not os.environ.get('MUJOCO_GL') and 'mujoco' not in sys.modules:
        if _egl_works():
            os.environ['MUJOCO_GL'] = 'egl'
        elif _osmesa_works():
            os.environ['MUJOCO_GL'] = 'osmesa'
        else:
            raise RuntimeError(_NO_GRAPHICS)
    try:
        import metaworld.policies
        import mujoco
        from metaworld import env_dict
    except ModuleNotFoundError as error:
        raise RuntimeError(f'the simulator needs the package {error.name!r}: '
                           f"pip install 'metaworld==3.1.1' packaging") from error
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f'{_NO_GRAPHICS} ({error})') from error
    return SimpleNamespace(mujoco=mujoco, policies=metaworld.policies.ENV_POLICY_MAP,
                           environments=env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE)


def _camera_axes(eye, target) -> np.ndarray:
    """Return (3, 3) with the camera's right, up and backward axes as columns; z is up."""
    backward = np.subtract(eye, target)
    backward = backward / np.linalg.norm(backward)
    right = np.cross((0.0, 0.0, 1.0), backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward], axis=1)


def project(points_xyz: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Return where points (N, 3) in m appear in a static picture: (N, 2) pixels x, y.

    Pixel (0, 0) is the centre of the upper left one; a point behind the camera gives nan.
    """
    relative = np.asarray(points_xyz, np.float64) - _STATIC_VIEW[0]
    right, up, backward = (relative @ _camera_axes(*_STATIC_VIEW)).T
    depth = np.where(backward < 0, -backward, np.nan)
    focal = height / 2 / np.tan(np.radians(_STATIC_FOVY_DEG) / 2)
    return np.stack([width / 2 - 0.5 + focal * right / depth,
                     height / 2 - 0.5 - focal * up / depth], axis=1)


class _Scene:
    """One task's environment with its renderer; built once, reset to the same bits each time."""

    def __init__(self, simulator: SimpleNamespace, task: str, width: int, height: int):
        self._mujoco = mujoco = simulator.mujoco
        name = TASKS[task][0]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            self.env = env = simulator.environments[f'{name}-goal-observable'](seed=0)
        self.make_expert = simulator.policies[name]
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.max_path_length = sys.maxsize
        if task.startswith('faucet'):
            low, high = np.array(_FAUCET_LOW), np.array(_FAUCET_HIGH)
            env._random_reset_space = type(env._random_reset_space)(low, high, dtype=np.float64)
        model = env.model
        self._place_cameras(model)
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = width
        model.vis.global_.offheight = height
        self.joints = [model.joint(name) for name in JOINTS]
        self._pristine = {field: getattr(model, field).copy()
                          for field in ('body_pos', 'body_quat', 'site_pos', 'site_quat')}
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise RuntimeError(f'{_NO_GRAPHICS} ({error})') from error
        self._options = mujoco.MjvOption()
        self._options.sitegroup[:] = 0
        for flag in _SLOW_FLAGS:
            self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, f'mjRND_{flag}')] = 0

    def _place_cameras(self, model) -> None:
        static = model.camera(_MODEL_CAMERAS['static']).id
        axes = _camera_axes(*_STATIC_VIEW)
        model.cam_pos[static] = _STATIC_VIEW[0]
        self._mujoco.mju_mat2Quat(model.cam_quat[static], axes.ravel())
        model.cam_fovy[static] = _STATIC_FOVY_DEG
        # A tracking camera: it moves with the hand and keeps its direction in the world.
        wrist = model.camera(_MODEL_CAMERAS['wrist']).id
        model.cam_pos0[wrist] = _WRIST_VIEW[0]
        model.cam_mat0[wrist] = _camera_axes(*_WRIST_VIEW).ravel()

    def reset(self, seed: int) -> np.ndarray:
        """Return Meta-World's observation (39,) after a reset that depends on `seed` alone."""
        env = self.env
        for field, values in self._pristine.items():
            getattr(env.model, field)[:] = values
        self._mujoco.mj_resetData(env.model, env.data)
        env.seed(seed)
        env.reset()
        self._mujoco.mj_forward(env.model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        return env._get_obs()

    def render(self, camera: str) -> np.ndarray:
        """Return the picture (H, W, 3) uint8 RGB of one camera."""
        self._renderer.update_scene(self.env.data, _MODEL_CAMERAS[camera], self._options)
        return self._renderer.render()

    def close(self) -> None:
        """Free the renderer and the environment."""
        self._renderer.close()
        self.env.close()


class MetaWorldRobot:
    """A simulated Sawyer that does one task at a time; use it from one thread only.

    image_width, image_height: pixels of both cameras.
    """

    def __init__(self, *, image_width: int = 224, image_height: int = 224):
        if not (16 <= image_width <= 1920 and 16 <= image_height <= 1920):
            raise ValueError(f'image size must be 16 to 1920 pixels, '
                             f'got {image_width}x{image_height}')
        self._simulator = _load_simulator()
        self._size = image_width, image_height
        self._scenes: dict[str, _Scene] = {}
        self._scene: _Scene | None = None
        self._sensed = np.zeros(0)
        self._success = False

    def reset(self, task: str, seed: int) -> None:
        """Begin an episode. The same task and seed give the same bits, whatever ran before."""
        check_task(task)
        if not 0 <= seed < 2**32:
            raise ValueError(f'seed must be 0 to 2^32 - 1, got {seed}')
        if task not in self._scenes:
            self._scenes[task] = _Scene(self._simulator, task, *self._size)
            # Before MuJoCo's own exit handler, which ends the graphics under the renderer.
            atexit.register(self._scenes[task].close)
        self._scene = self._scenes[task]
        self._expert = self._scene.make_expert()
        self._sensed = self._scene.reset(seed)
        self._success = False

    def observe(self, cameras: Sequence[str] = CAMERAS) -> RobotObservation:
        """Read the sensors; only the cameras named are rendered."""
        scene = self._require_scene()
        data = scene.env.data
        return RobotObservation(
            images={camera: scene.render(camera) for camera in cameras},
            joint_positions=np.array([data.qpos[j.qposadr[0]] for j in scene.joints]),
            joint_velocities=np.array([data.qvel[j.dofadr[0]] for j in scene.joints]),
            tool_position=np.array(scene.env.tcp_center),
            tool_quaternion=np.array(data.body('hand').xquat))

    def step(self, command: np.ndarray) -> StepResult:
        """Execute a command (4,) in `ACTION_SPACE` units, clipped to its limits, for PERIOD_S.

        ValueError if it is not 4 finite numbers. The reward is that of the last physics step.
        """
        env = self._require_scene().env
        command = np.asarray(command, np.float64)
        if command.shape != (ACTION_SPACE.size,) or not np.isfinite(command).all():
            raise ValueError(f'a command is {ACTION_SPACE.size} finite numbers, got {command}')
        action = np.clip(command * _TO_PHYSICS, -1.0, 1.0)
        for _ in range(_PHYSICS_STEPS):
            self._sensed, reward, _, _, info = env.step(action)
            self._success = self._success or bool(info['success'])
        return StepResult(reward=float(reward), success=self._success)

    def expert_action(self) -> np.ndarray:
        """Return the scripted expert's command (4,) at the present state, within the limits."""
        self._require_scene()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            action = np.asarray(self._expert.get_action(self._sensed), np.float64)
        return np.clip(action, -1.0, 1.0) / _TO_PHYSICS

    def close(self) -> None:
        """Free the renderers; the robot needs a reset before it can be used again."""
        for scene in self._scenes.values():
            atexit.unregister(scene.close)
            scene.close()
        self._scenes.clear()
        self._scene = None

    def _require_scene(self) -> _Scene:
        if self._scene is None:
            raise RuntimeError('reset the robot first')
        return self._scene
