"""Scenes with several equally good ways (modes), where the average of them fails.

Neither picture nor instruction tells which mode a demonstration takes. With M modes every layout
belongs to M seeds in a row and is shown once in each mode, in random order, so that what is seen
never tells the mode. Between the modes lies what ends the attempt: a wall, a block, or a slot.

With two modes any command in between has the same absolute error, and only the tails and the
network decide where a regression ends. With three modes around the start the median of every
dimension is that of none of them. Importing this file needs Meta-World.
"""

from __future__ import annotations

import mujoco
import numpy as np
from gymnasium.spaces import Box
from metaworld.asset_path_utils import full_V3_path_for
from metaworld.sawyer_xyz_env import SawyerXYZEnv

_MODE_STREAM = 2   # apart from the streams that draw the layout and the disturbance
_CLOSED = 1.0
_TIP = np.array([0.0, 0.0, -0.045])   # lower end of the fingers, m from the hand
_SOLID = {'contype': 0, 'conaffinity': 1, 'group': 1}   # stops the hand, not one another


class _ManyModes(SawyerXYZEnv):
    """A table with things of our own on it, and a scripted expert that does as was drawn.

    modes: name -> where it leads, (x, y) from the middle, in a unit of the scene's own. mode:
    what the expert of the seed does. mode_taken: what was done so far, '' before it shows.
    """

    modes: dict[str, tuple[float, float]]
    hand_start: tuple[float, float, float]
    layout_low: tuple[float, ...]
    layout_high: tuple[float, ...]

    def __init__(self, seed: int = 0):
        super().__init__(hand_low=(-0.4, 0.4, 0.05), hand_high=(0.4, 1.0, 0.5))
        self.hand_init_pos = np.array(self.hand_start)
        self.goal_space = Box(np.array([-0.5, 0.4, 0.0]), np.array([0.5, 1.0, 0.5]),
                              dtype=np.float64)
        self._target_pos = np.zeros(3)
        self._random_reset_space = Box(np.array(self.layout_low), np.array(self.layout_high),
                                       dtype=np.float64)
        self._partially_observable = False
        self._set_task_called = True
        self.seed(seed)

    @property
    def model_name(self) -> str:
        return full_V3_path_for('sawyer_xyz/sawyer_reach_v3.xml')

    def _initialize_simulation(self):
        spec = mujoco.MjSpec.from_file(self.fullpath)
        spec.detach_body(spec.body('obj'))
        self._furnish(spec.worldbody)
        model = spec.compile()
        return model, mujoco.MjData(model)

    def seed(self, seed: int) -> list[int]:
        """Seed the layout, the same for as many seeds as there are modes, and draw the mode."""
        layout, number = divmod(seed, len(self.modes))
        order = np.random.default_rng([layout, _MODE_STREAM]).permutation(list(self.modes))
        self.mode = str(order[number])
        return super().seed(layout)

    def reset_model(self) -> np.ndarray:
        self._arrange(self._get_state_rand_vec())
        self._reset_hand()
        self.mode_taken = ''
        self._failed = False
        return self._get_obs()

    def _reset_hand(self, steps: int = 50) -> None:
        """Start with the fingers closed and the arm at rest: its swing would favour a side."""
        self.data.mocap_pos[0] = self.hand_init_pos
        self.data.mocap_quat[0] = [1.0, 0.0, 1.0, 0.0]
        for _ in range(steps):
            self.do_simulation([_CLOSED, -_CLOSED], self.frame_skip)

    def evaluate_state(self, obs, action) -> tuple[float, dict]:
        del obs, action
        success = self._judge() and not self._failed
        return 10.0 * success, {'success': float(success)}

    def _get_pos_objects(self) -> np.ndarray:
        return np.zeros(3)   # the expert reads the scene itself

    def _get_quat_objects(self) -> np.ndarray:
        return np.array([0.0, 0.0, 0.0, 1.0])

    def _touched(self, geom: str) -> bool:
        return bool((self.data.contact.geom == self.model.geom(geom).id).any())

    def _furnish(self, world) -> None:
        raise NotImplementedError

    def _arrange(self, layout: np.ndarray) -> None:
        raise NotImplementedError

    def _judge(self) -> bool:
        """Note the mode taken, and what went wrong; return whether the goal is reached."""
        raise NotImplementedError

    def expert_action(self, mode: str) -> np.ndarray:
        """Return the action (4,) of -1 to 1 of an expert that goes `mode`."""
        raise NotImplementedError

    def _towards(self, target: np.ndarray) -> np.ndarray:
        """Return the action that leads the hand to `target` in a straight line."""
        offset = target - self.get_endeff_pos()
        return np.array([*offset / max(0.05, np.abs(offset).max()), _CLOSED])


class _PassBy(_ManyModes):
    """Touch a ball behind an obstacle; touching the obstacle fails.

    The hand goes along one axis of the table and passes the obstacle on either side, across.
    layout: where the obstacle is across, and where the ball is across and along. across: 0 for x,
    1 for y.
    """

    across: int
    _HALF: np.ndarray        # half sizes of the obstacle: across, along, up
    _AT: float               # of its middle, along
    _COLOUR: tuple[float, float, float, float]
    _BALL_RADIUS = 0.035
    _ASIDE = 0.16   # of the obstacle's middle, where the hand passes
    _PAST = 0.08    # of the obstacle's middle, where the hand may turn to the ball
    _BALL_HEIGHT = 0.08

    def _placed(self, across: float, along: float, height: float) -> np.ndarray:
        return np.array([across, along, height] if self.across == 0 else [along, across, height])

    def _furnish(self, world) -> None:
        wall = world.add_body(name='wall', pos=self._placed(0.0, self._AT, self._HALF[2]))
        wall.add_geom(name='wall', type=mujoco.mjtGeom.mjGEOM_BOX,
                      size=self._placed(*self._HALF), rgba=self._COLOUR, **_SOLID)
        ball = world.add_body(name='ball', pos=[0.0, 0.9, self._BALL_HEIGHT])
        ball.add_geom(name='ball', type=mujoco.mjtGeom.mjGEOM_SPHERE,
                      size=[self._BALL_RADIUS, 0.0, 0.0], rgba=[0.1, 0.3, 0.9, 1.0], **_SOLID)
        ball.add_geom(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[0.008, 0.04, 0.0],
                      pos=[0.0, 0.0, -0.04], rgba=[0.3, 0.3, 0.3, 1.0], **_SOLID)

    def _arrange(self, layout: np.ndarray) -> None:
        self._wall = layout[0]
        self._target_pos = self._placed(*layout[1:], self._BALL_HEIGHT)
        self.model.body('wall').pos[self.across] = self._wall
        self.model.body('ball').pos[:] = self._target_pos

    def _hand(self) -> tuple[float, float]:
        """Return where the hand is, across and along."""
        hand = self.get_endeff_pos()
        return hand[self.across], hand[1 - self.across]

    def _judge(self) -> bool:
        across, along = self._hand()
        if not self.mode_taken and along > self._AT:
            self.mode_taken = next(mode for mode, (side, _) in self.modes.items()
                                   if side * (across - self._wall) >= 0)
        self._failed = self._failed or self._touched('wall')
        return self._touched('ball')

    def expert_action(self, mode: str) -> np.ndarray:
        _, along = self._hand()
        height = self.hand_start[2]
        aside = self._wall + self.modes[mode][0] * self._ASIDE
        if along < self._AT - 0.02:
            return self._towards(self._placed(aside, self._AT + 0.01, height))
        if along < self._AT + self._PAST:
            return self._towards(self._placed(aside, self._AT + self._PAST + 0.05, height))
        if self._touched('ball'):
            return np.array([0.0, 0.0, 0.0, _CLOSED])
        return self._towards(np.array([*self._target_pos[:2], height]))


class PassWall(_PassBy):
    """Away from the robot, past a wall that is too tall to go over."""

    modes = {'left': (-1.0, 0.0), 'right': (1.0, 0.0)}   # as the robot sees them
    across = 0
    hand_start = (0.0, 0.59, 0.12)
    layout_low, layout_high = (-0.01, -0.05, 0.85), (0.01, 0.05, 0.88)
    _HALF, _AT = np.array([0.025, 0.01, 0.2]), 0.73
    _COLOUR = (0.75, 0.35, 0.2, 1.0)


class PassBlock(_PassBy):
    """From one side of the table to the other, past a low block: before it or behind it."""

    modes = {'near': (-1.0, 0.0), 'far': (1.0, 0.0)}
    across = 1
    hand_start = (-0.11, 0.7, 0.1)
    layout_low, layout_high = (0.69, 0.65, 0.12), (0.71, 0.75, 0.15)
    _HALF, _AT = np.array([0.035, 0.01, 0.06]), 0.0
    _COLOUR = (0.2, 0.6, 0.3, 1.0)


class PressAny(_ManyModes):
    """Press one of three equal buttons; between them is a slot that leads to none."""

    modes = {'left': (-1.0, 0.0), 'right': (1.0, 0.0), 'far': (0.0, 1.35)}
    hand_start = (0.0, 0.65, 0.27)
    layout_low, layout_high = (-0.01, 0.63), (0.01, 0.67)   # middle, between left and right
    _APART = 0.085   # of a button from the middle
    _RADIUS = 0.03
    _CHEEK = np.array([0.004, 0.035, 0.06])   # half sizes of the slot's sides
    _THICK = 0.018   # half size of the far one: the fingers give way in y, and would pass a plate
    _POST = 0.05    # half height
    _TRAVEL = 0.015
    _PRESSED = 0.01
    _BELOW, _OUTWARDS = 0.03, 0.01   # of the middle of the button's top, where the expert aims

    def _furnish(self, world) -> None:
        cylinder = mujoco.mjtGeom.mjGEOM_CYLINDER
        grey, red = [0.35, 0.35, 0.35, 1.0], [0.9, 0.1, 0.1, 1.0]
        smooth = [0.1, 0.0, 0.0]
        for name, (x, y) in self.modes.items():
            cheek = np.array([self._THICK, *self._CHEEK[1:]]) if y else self._CHEEK
            post = world.add_body(name=name, pos=[0.0, 0.0, self._POST],
                                  quat=_turned_about_z(np.arctan2(y, x)))
            post.add_geom(type=cylinder, size=[self._RADIUS, self._POST, 0.0], rgba=grey,
                          friction=smooth, **_SOLID)
            post.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=cheek, rgba=grey,
                          pos=[-self._RADIUS - cheek[0], 0.0, cheek[2] - self._POST],
                          friction=smooth, **_SOLID)
            button = post.add_body(name=f'{name}_button', pos=[0.0, 0.0, self._POST + 0.01],
                                   mass=0.05, inertia=[1e-5] * 3, explicitinertial=True)
            button.add_joint(name=f'{name}_button', type=mujoco.mjtJoint.mjJNT_SLIDE,
                             axis=[0.0, 0.0, -1.0], range=[0.0, self._TRAVEL], limited=True,
                             stiffness=100.0, damping=5.0, armature=0.01)
            button.add_geom(type=cylinder, size=[self._RADIUS, 0.01, 0.0], rgba=red,
                            friction=smooth, **_SOLID)

    def _arrange(self, layout: np.ndarray) -> None:
        self._buttons = {name: layout + self._APART * np.array(direction)
                         for name, direction in self.modes.items()}
        for name, xy in self._buttons.items():
            self.model.body(name).pos[:2] = xy

    def _judge(self) -> bool:
        for name in self.modes:
            if self.data.joint(f'{name}_button').qpos[0] > self._PRESSED:
                self.mode_taken = self.mode_taken or name
        return bool(self.mode_taken)

    def expert_action(self, mode: str) -> np.ndarray:
        top = 2 * self._POST + 0.02
        aim = self._buttons[mode] + self._OUTWARDS * np.sign(self.modes[mode])
        return self._towards(np.array([*aim, top - self._BELOW]) - _TIP)


def _turned_about_z(angle_rad: float) -> list[float]:
    return [np.cos(angle_rad / 2), 0.0, 0.0, np.sin(angle_rad / 2)]


SCENES = (PassWall, PassBlock, PressAny)
