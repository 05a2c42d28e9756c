"""Answers to many questions at once, where what they share is computed once.

Questions about one observation (other noise, other NFE, other words, another pose) show the same
pictures. Every picture is seen once, whichever observations hold it, and every set of pictures
with an instruction is read once. Chunks are those of the Policy, up to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meanflow_ros.core.contract import ActionChunk, Observation, clean_instruction
from meanflow_ros.core.fused_dit import Schedule
from meanflow_ros.core.runtime import FastPolicy


@dataclass(frozen=True)
class Question:
    """One observation, the seed of its noise, and the NFE."""

    observation: Observation
    seed: int
    steps: int


class EncodingOnce:
    """Answers questions with the network of a FastPolicy; on a CPU from any number of threads.

    batch: observations that go through the network at a time.
    """

    def __init__(self, policy: FastPolicy, *, batch: int):
        self._policy, self._batch = policy, batch
        self._cameras = policy.robot.camera_names
        self._schedules: dict[int, Schedule] = {}
        self._making = threading.Lock()

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[ActionChunk]:
        """Return the chunk of each question. Pictures are the same if they are one array."""
        if not questions:
            return []
        pictures, scenes, scene_of = self._shared(questions)
        tokens = self._seen(pictures)                                       # (N, tokens, D)
        answers: list[ActionChunk | None] = [None] * len(questions)
        for start in range(0, len(scenes), self._batch):
            some = scenes[start:start + self._batch]
            keys, values, bias = self._read(tokens, some)
            for steps, rows in self._alike(questions, scene_of, start, start + len(some)):
                of = [scene_of[row] - start for row in rows]
                chunks = self._decided([questions[row] for row in rows], steps,
                                       _rows(keys, 1, of), _rows(values, 1, of),
                                       None if bias is None else _rows(bias, 0, of))
                for row, chunk in zip(rows, chunks, strict=True):
                    answers[row] = chunk
        return answers

    def _shared(self, questions: Sequence[Question]) -> tuple[list, list, list[int]]:
        """Return pictures, scenes (places of pictures, and words), and the scene of each."""
        places: dict[int, int] = {}
        pictures: list[np.ndarray] = []
        scenes: dict[tuple, int] = {}
        scene_of = []
        for question in questions:
            shown = [question.observation.images[name] for name in self._cameras]
            for picture in shown:
                if places.setdefault(id(picture), len(pictures)) == len(pictures):
                    pictures.append(picture)
            key = (*(places[id(picture)] for picture in shown),
                   clean_instruction(question.observation.instruction))
            scene_of.append(scenes.setdefault(key, len(scenes)))
        return pictures, list(scenes), scene_of

    def _alike(self, questions: Sequence[Question], scene_of: Sequence[int], first: int,
               last: int) -> Iterator[tuple[int, list[int]]]:
        """Yield NFE and at most `batch` rows of it, of scenes from `first` to before `last`."""
        groups: dict[int, list[int]] = {}
        for row, (question, scene) in enumerate(zip(questions, scene_of)):
            if first <= scene < last:
                groups.setdefault(question.steps, []).append(row)
        for steps, rows in groups.items():
            for start in range(0, len(rows), self._batch):
                yield steps, rows[start:start + self._batch]

    def _seen(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Return the visual tokens (N, tokens, D) of pictures (H, W, 3), of any sizes."""
        see, most = self._policy.fused.see, self._batch * len(self._cameras)
        parts = [see.each(torch.cat([self._prepared(one) for one in pictures[start:start + most]]))
                 for start in range(0, len(pictures), most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prepared(self, picture: np.ndarray) -> Tensor:
        """Return a picture (1, S, S, 3); one at a time, since it is large before it is resized."""
        one = torch.tensor(picture)[None, None].to(self._policy.device)
        return self._policy.fused.prepare([one])[0]

    def _read(self, tokens: Tensor, scenes: Sequence[tuple]) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values (blocks, B, heads, S, d) of scenes, and what masks them."""
        network = self._policy.fused
        prompt, bias = self._embedded(tuple(words for *_, words in scenes))
        places = [place for *shown, _ in scenes for place in shown]
        visual = _rows(tokens, 0, places).unflatten(0, (len(scenes), -1))
        context = network.read(network.see.together(visual), prompt, bias)
        return *network.dit.keys_and_values(context), bias

    def _decided(self, questions: Sequence[Question], steps: int, keys: Tensor, values: Tensor,
                 bias: Tensor | None) -> list[ActionChunk]:
        policy = self._policy
        seen = [question.observation for question in questions]
        state = torch.from_numpy(policy.states(seen)).to(policy.device)
        noise = torch.cat([policy.noise(question.observation.stamp_ns, question.seed)
                           for question in questions])
        schedule = self._schedule(steps)
        modulations = policy.fused.dit.modulations(schedule, state if state.numel() else None)
        actions = policy.fused.sample(keys, values, bias, modulations, noise.to(policy.device),
                                      schedule, steps).double().cpu().numpy()
        return [policy.chunk(row, observation) for row, observation in zip(actions, seen)]

    def _embedded(self, instructions: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        policy, known = self._policy, list(dict.fromkeys(instructions))
        with self._making:
            prompt, bias = policy.fused.embed_prompts([
                policy.config.prompt.format(instruction=words) for words in known])
        rows = [known.index(words) for words in instructions]
        return _rows(prompt, 0, rows), None if bias is None else _rows(bias, 0, rows)

    def _schedule(self, steps: int) -> Schedule:
        with self._making:
            if steps not in self._schedules:
                self._schedules[steps] = self._policy.fused.schedule(steps)
            return self._schedules[steps]


def _rows(value: Tensor, dim: int, rows: list[int]) -> Tensor:
    """Return these rows of a dimension; the value itself if they are all, in order."""
    if rows == list(range(value.shape[dim])):
        return value
    return value.index_select(dim, torch.tensor(rows, device=value.device))
