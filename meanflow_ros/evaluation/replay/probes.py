"""Questions to a policy beside the replay: is it sure, does it look, does it listen, does it feel.

Some observations are asked again: with other noise, with more network evaluations, and with one
input changed. Every answer uses the noise of the replay, so that only what is named differs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, ActionChunk, Observation

BLANK = 128                   # grey, as the closed loop blanks cameras
EVALUATIONS = (1, 2, 4, 8)
AT_A_TIME = 16                # probed observations that are held
FIRST_NS = 300_000_000        # the first probe comes at most so long after the first observation
AS_IS = 'as it is'
Variant = tuple[str, list[Observation], list[int], int | None]


class Prober:
    """Chooses observations and asks the variants; `answers` gives variant -> chunks (Q, T, A).

    act(observations, seeds, steps): the policy; steps: NFE of each, None for its own. every_s:
    from one probed observation to the next.
    swap: instruction -> what is said in its place, '' if there is nothing else to say. flow:
    whether the policy starts from noise at all.
    """

    def __init__(self, act: Callable[..., list[ActionChunk]], *, every_s: float, seed: int,
                 noise_seeds: int, swap: Callable[[str], str],
                 flow: bool = True):
        self._act, self._every_ns = act, round(every_s * NANOSECONDS)
        self._seed, self._noise_seeds = seed, noise_seeds
        self._swap, self._flow = swap, flow
        self.begin()

    def begin(self) -> None:
        """Start with another episode."""
        self._first: Observation | None = None
        self._next_ns: int | None = None
        self._waiting: list[Observation] = []
        self._rows: list[int] = []
        self._found: dict[str, list[np.ndarray]] = {}

    def offer(self, observation: Observation, row: int) -> None:
        """Take the row-th observation of the episode, if it is time for one."""
        if self._first is None:
            self._first = observation
            self._next_ns = observation.stamp_ns + min(self._every_ns // 2, FIRST_NS)
        if observation.stamp_ns >= self._next_ns:
            self._next_ns = observation.stamp_ns + self._every_ns
            self._rows.append(row)
            self._waiting.append(observation)
            if len(self._waiting) >= AT_A_TIME:
                self._ask()

    def answers(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the probed rows (Q,) and variant -> chunks (Q, T, A), NaN where not asked."""
        self._ask()
        return np.array(self._rows, np.int64), {
            name: np.concatenate(parts) for name, parts in self._found.items()}

    def _ask(self) -> None:
        if not self._waiting:
            return
        variants = self._variants()
        # What shows the same pictures is asked together, so that it is encoded once.
        asked = [(row, name, observations[row], seeds[row], steps)
                 for row in range(len(self._waiting))
                 for name, observations, seeds, steps in variants if observations[row] is not None]
        _, _, *questions = zip(*asked)
        chunks = self._act(*questions)
        answers = {name: np.full((len(self._waiting), *chunks[0].actions.shape), np.nan)
                   for name, *_ in variants}
        for (row, name, *_), chunk in zip(asked, chunks, strict=True):
            answers[name][row] = chunk.actions
        for name, answer in answers.items():
            self._found.setdefault(name, []).append(answer)
        self._waiting = []

    def _variants(self) -> list[Variant]:
        plain, same = self._waiting, [self._seed] * len(self._waiting)
        variants: list[Variant] = [(AS_IS, plain, same, None)]
        if self._flow:
            variants += [(f'seed {number}', plain, [self._seed + number] * len(plain), None)
                         for number in range(1, self._noise_seeds)]
            variants += [(f'nfe {steps}', plain, same, steps) for steps in EVALUATIONS]
        changes = {'swapped instruction': self._told_otherwise}
        for camera in self._first.images:
            changes[f'blanked {camera}'] = _changing(camera, _blank)
            changes[f'frozen {camera}'] = _changing(camera, self._frozen)
        variants += [(name, [change(each) for each in plain], same, None)
                     for name, change in changes.items()]
        if plain[0].state is not None and plain[0].state.size:
            variants.append(('shuffled proprioception', self._states_of_others(), same, None))
        return variants

    def _states_of_others(self) -> list[Observation | None]:
        """Give each the state of the one half a round further; a lone one that of the first."""
        count = len(self._waiting)
        if count == 1:
            (lone,) = self._waiting
            return [None if lone is self._first
                    else dataclasses.replace(lone, state=self._first.state)]
        return [dataclasses.replace(
            each, state=self._waiting[(index + count // 2) % count].state)
            for index, each in enumerate(self._waiting)]

    def _told_otherwise(self, observation: Observation) -> Observation | None:
        text = self._swap(observation.instruction)
        return dataclasses.replace(observation, instruction=text) if text else None

    def _frozen(self, image: np.ndarray, camera: str) -> np.ndarray | None:
        first = self._first.images[camera]
        return first if first is not image and first.shape == image.shape else None


def _blank(image: np.ndarray, camera: str) -> np.ndarray:
    return _grey(image.shape)


@functools.lru_cache(4)
def _grey(shape: tuple[int, ...]) -> np.ndarray:
    """Return one array for all pictures of a shape, so that it is encoded once."""
    return np.full(shape, BLANK, np.uint8)


def _changing(camera: str, change: Callable) -> Callable[[Observation], Observation | None]:
    def changed(observation: Observation) -> Observation | None:
        image = change(observation.images[camera], camera)
        return None if image is None else dataclasses.replace(
            observation, images={**observation.images, camera: image})
    return changed



def other_instruction(texts: Sequence[str]) -> Callable[[str], str]:
    """Return a function: an instruction -> the next different one of the recordings, or ''."""
    known = sorted(set(texts))

    def swap(text: str) -> str:
        others = [each for each in known if each != text]
        following = [each for each in others if each > text]
        return (following or others or [''])[0]
    return swap
