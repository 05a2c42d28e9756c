"""One task's physics with its cameras."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import numpy as np

from meanflow_ros.sim.graphics import NO_GRAPHICS
from meanflow_ros.sim.tasks import TASKS

CAMERAS = ('static', 'wrist')
JOINTS = (*(f'right_j{i}' for i in range(7)), 'r_close', 'l_close')

_MODEL_CAMERAS = {'static': 'corner2', 'wrist': 'gripperPOV'}
_STATIC_VIEW = ((1.0, -0.1, 1.0), (0.0, 0.66, 0.15))   # from, to: metres in the world
_STATIC_FOVY_DEG = 38.0
_WRIST_VIEW = ((0.14, -0.06, 0.03), (0.0, 0.04, -0.13))   # from, to: metres from the hand
_FAUCET_LOW, _FAUCET_HIGH = (-0.1, 0.8, 0.0), (0.1, 0.85, 0.0)
_SLOW_FLAGS = ('SHADOW', 'REFLECTION')
_GOAL_GROUP = 5   # of the sites; all others stay hidden
_PEG_GAIN = 15.0


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


class _PegExpert:
    """Meta-World's expert for the peg, slow enough for 40 commands a second.

    Its own gain of 25 swings about the grasp when it is asked at every other physics step.
    """

    def __init__(self):
        from metaworld.policies import SawyerPegInsertionSideV3Policy
        self._expert = SawyerPegInsertionSideV3Policy()

    def get_action(self, sensed: np.ndarray) -> np.ndarray:
        parsed = self._expert._parse_obs(sensed)
        offset = self._expert._desired_pos(parsed) - sensed[:3]
        return np.array([*_PEG_GAIN * offset, self._expert._grab_effort(parsed)])


_EXPERTS = {'peg-insert-side-v3': _PegExpert}


class Scene:
    """One task's environment with its renderer; built once, reset to the same bits each time.

    env: the Meta-World environment. joint_at, velocity_at: (9,) where `JOINTS` are in qpos and
    qvel.
    """

    def __init__(self, simulator: SimpleNamespace, task: str, width: int, height: int):
        self._mujoco = mujoco = simulator.mujoco
        name = TASKS[task].scene
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            self.env = env = simulator.environments[name](seed=0)
        self._make_expert = _EXPERTS.get(name, simulator.policies.get(name))
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env.max_path_length = sys.maxsize
        env.touching_object = self._touching_object
        if task.startswith('faucet'):
            low, high = np.array(_FAUCET_LOW), np.array(_FAUCET_HIGH)
            env._random_reset_space = type(env._random_reset_space)(low, high, dtype=np.float64)
        model = env.model
        self._pads = [model.geom(name).id for name in ('leftpad_geom', 'rightpad_geom')]
        self._place_cameras(model)
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = width
        model.vis.global_.offheight = height
        joints = [model.joint(name) for name in JOINTS]
        self.joint_at = np.array([joint.qposadr[0] for joint in joints])
        self.velocity_at = np.array([joint.dofadr[0] for joint in joints])
        self._pristine = {field: getattr(model, field).copy()
                          for field in ('body_pos', 'body_quat', 'site_pos', 'site_quat')}
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise RuntimeError(f'{NO_GRAPHICS} ({error})') from error
        self._options = mujoco.MjvOption()
        self._options.sitegroup[:] = 0
        if TASKS[task].goal_shown:
            model.site('goal').group = _GOAL_GROUP
            self._options.sitegroup[_GOAL_GROUP] = 1
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
        self._expert = self._make_expert and self._make_expert()
        self._mujoco.mj_forward(env.model, env.data)
        env._prev_obs = env._get_curr_obs_combined_no_goal()
        return env._get_obs()

    @property
    def expert_mode(self) -> str:
        """Return the way that the expert of this episode goes, '' where there is only one."""
        return getattr(self.env, 'mode', '')

    @property
    def mode_taken(self) -> str:
        """Return the way that was gone in this episode, '' where there is only one."""
        return getattr(self.env, 'mode_taken', '')

    def expert_action(self, sensed: np.ndarray) -> np.ndarray:
        """Return the expert's action (4,) for Meta-World's observation (39,), before limits."""
        if self._expert is None:
            return self.env.expert_action(self.env.mode)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return np.asarray(self._expert.get_action(sensed), np.float64)

    def _touching_object(self, geom: int) -> bool:
        """Return whether both pads press on a geom: Meta-World's own test, without a loop."""
        data = self.env.data
        pairs = data.contact.geom
        of_object = (pairs == geom).any(axis=1)
        forces = [data.efc_force[data.contact.efc_address[of_object & (pairs == pad).any(axis=1)]]
                  for pad in self._pads]
        return all(force.sum() > 0 for force in forces)

    def render(self, camera: str) -> np.ndarray:
        """Return the picture (H, W, 3) uint8 RGB of one camera."""
        self._renderer.update_scene(self.env.data, _MODEL_CAMERAS[camera], self._options)
        return self._renderer.render()

    def close(self) -> None:
        """Free the renderer and the environment."""
        self._renderer.close()
        self.env.close()


