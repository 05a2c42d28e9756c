"""What the simulated robot can be told to do: tasks, their words, and groups of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meanflow_ros.core.schema import known_or_hint


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing that the robot can be told to do.

    scene: name of a Meta-World environment, or of a class in `multimodal`. goal_shown: the goal
    is a marker and nothing else shows it, so the marker is drawn. modes: how it can be done,
    where demonstrations choose among equals. noise: share of the demonstrations' disturbance
    that the expert bears; it is none during the first `quiet_steps`, nor while the fingers are
    closed if `steady_grasp`.
    """

    scene: str
    instruction: str
    goal_shown: bool = False
    modes: tuple[str, ...] = ()
    noise: float = 1.0
    quiet_steps: int = 0
    steady_grasp: bool = False


TASKS = {
    'faucet-open': Task(scene='faucet-open-v3', instruction='open the faucet'),
    'faucet-close': Task(scene='faucet-close-v3', instruction='close the faucet'),
    'drawer-open': Task(scene='drawer-open-v3', instruction='open the drawer'),
    'drawer-close': Task(scene='drawer-close-v3', instruction='close the drawer'),
    'window-open': Task(scene='window-open-v3', instruction='open the window'),
    'window-close': Task(scene='window-close-v3', instruction='close the window'),
    'button-press-topdown': Task(scene='button-press-topdown-v3',
                                 instruction='press the button'),
    'reach': Task(scene='reach-v3', instruction='reach the red ball', goal_shown=True),
    'push': Task(scene='push-v3', instruction='push the puck to the green ball',
                 goal_shown=True, noise=0.5, steady_grasp=True),
    'pick-place': Task(scene='pick-place-v3', instruction='lift the puck to the blue ball',
                       goal_shown=True, steady_grasp=True),
    'door-open': Task(scene='door-open-v3', instruction='open the door'),
    'peg-insert-side': Task(scene='peg-insert-side-v3',
                            instruction='insert the peg into the hole', steady_grasp=True),
    'pass-wall': Task(scene='PassWall', modes=('left', 'right'), noise=0.3, quiet_steps=4,
                      instruction='touch the ball behind the wall, not the wall'),
    'pass-block': Task(scene='PassBlock', modes=('near', 'far'), noise=0.3, quiet_steps=4,
                       instruction='touch the ball beyond the block, not the block'),
    'press-any': Task(scene='PressAny', modes=('left', 'right', 'far'), noise=0.3, quiet_steps=4,
                      instruction='press one of the three buttons'),
}
MT10 = ('reach', 'push', 'pick-place', 'door-open', 'drawer-open', 'drawer-close',
        'button-press-topdown', 'peg-insert-side', 'window-open', 'window-close')
SAME_PICTURE = ('faucet-open', 'faucet-close')
MULTIMODAL = tuple(name for name, task in TASKS.items() if task.modes)
GROUPS = {'mt10': MT10, 'same-picture': SAME_PICTURE, 'multimodal': MULTIMODAL,
          'all': tuple(TASKS)}
OPPOSITE = {'faucet-open': 'faucet-close', 'faucet-close': 'faucet-open',
            'drawer-open': 'drawer-close', 'drawer-close': 'drawer-open',
            'window-open': 'window-close', 'window-close': 'window-open'}


def check_task(task: str) -> str:
    """Return the task; ValueError with the known ones if there is no such task."""
    if task not in TASKS:
        raise ValueError(f'unknown task {task!r} ({known_or_hint(task, TASKS)}; '
                         f'tasks: {", ".join(TASKS)})')
    return task


def expand_tasks(names: Iterable[str]) -> tuple[str, ...]:
    """Return the tasks named, groups opened, each once; ValueError for an unknown name."""
    opened = (GROUPS[name] if name in GROUPS else (check_task(name),) for name in names)
    return tuple(dict.fromkeys(task for group in opened for task in group))
