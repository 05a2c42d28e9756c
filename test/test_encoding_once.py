"""Questions that share pictures and words: the chunks of the policy, with less work."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import micro_policy
import numpy as np
import pytest

from meanflow_ros.core.contract import Observation
from meanflow_ros.core.encoding_once import EncodingOnce, Question
from meanflow_ros.core.runtime import FastPolicy


@pytest.fixture(scope='module')
def policy():
    return micro_policy.make_policy()


def observations(count: int) -> list[Observation]:
    random = np.random.default_rng(3)
    return [Observation(
        stamp_ns=1_000_003 * (number + 1),
        instruction=('push the lever', 'pull it', 'push')[number % 3],
        state=random.normal(size=len(micro_policy.JOINTS)),
        images={camera: random.integers(0, 256, size, np.uint8) for camera, size in zip(
            micro_policy.CAMERAS, ((48, 64, 3), (48 + number % 2, 64, 3)))})
        for number in range(count)]


def questions() -> list[Question]:
    """Return all that probes ask: noise, NFE, words, pictures that others show, poses."""
    seen = observations(5)
    first, found = seen[0].images['static'], []
    for number, each in enumerate(seen):
        found += [Question(each, 0, 1), Question(each, 1, 1), Question(each, 0, 4)]
        found += [Question(dataclasses.replace(each, **changed), 0, 1) for changed in (
            {'instruction': 'pull the lever'}, {'state': seen[(number + 2) % 5].state},
            {'images': {**each.images, 'static': first}})]
    return found


def largest_difference(policy, asked, chunks) -> float:
    """Return it to the policy's own chunks, one by one, in shares of the range."""
    span = micro_policy.UPPER - micro_policy.LOWER
    own = [policy.act(each.observation, seed=each.seed, steps=each.steps) for each in asked]
    assert [chunk.stamp_ns for chunk in chunks] == [chunk.stamp_ns for chunk in own]
    return max((np.abs(a.actions - b.actions) / span).max() for a, b in zip(own, chunks))


@pytest.mark.parametrize('batch', [1, 3, 64])
def test_answers_are_the_policys_own_in_any_batch(policy, batch):
    asked = questions()
    assert largest_difference(
        policy, asked, EncodingOnce(FastPolicy(policy), batch=batch)(asked)) < 1e-5


def test_several_threads_get_the_answers_of_one(policy):
    asked = questions()
    answer = EncodingOnce(FastPolicy(policy), batch=4)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(answer, [asked[start::4] for start in range(4)]))
    for start, part in enumerate(parts):
        assert largest_difference(policy, asked[start::4], part) < 1e-5


def test_a_picture_is_seen_once_and_an_instruction_is_embedded_once(policy, monkeypatch):
    fast = FastPolicy(policy)
    seen, read = [], []
    each, embed = fast.fused.see.each, fast.fused.embed_prompts
    monkeypatch.setattr(fast.fused.see, 'each', lambda x: (seen.append(len(x)), each(x))[1])
    monkeypatch.setattr(fast.fused, 'embed_prompts',
                        lambda x: (read.append(len(x)), embed(x))[1])
    EncodingOnce(fast, batch=64)(questions())
    assert sum(seen) == 5 * 2           # the frozen picture is the first one's own
    assert read == [4]


def test_no_question_has_no_answer(policy):
    assert EncodingOnce(FastPolicy(policy), batch=4)([]) == []
