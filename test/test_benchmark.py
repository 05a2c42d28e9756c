"""Comparing recipes: what is trained on stored features, what is run, and the table of it."""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import training_rig

from meanflow_ros.core.policy import Policy
from meanflow_ros.training.heads import encode, train_heads
from meanflow_ros.training.train import train

if importlib.util.find_spec('metaworld') is None:
    pytest.skip('metaworld is missing: install .[sim]', allow_module_level=True)

from meanflow_ros.evaluation import benchmark  # noqa: E402
from meanflow_ros.evaluation.benchmark import (  # noqa: E402
    CEILING, PROBED, RECIPES, Trial, counts, evaluate, jobs_of, table, table_by_task,
    trials_of)
from meanflow_ros.evaluation.episodes import EpisodeResult  # noqa: E402
from meanflow_ros.sim.tasks import MT10, TASKS  # noqa: E402

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def encoded(tmp_path_factory):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp('benchmark')
    data = training_rig.make_data(directory)
    with pytest.MonkeyPatch.context() as patch:
        training_rig.make_networks_small(patch)
        config = training_rig.config(loss='rf', steps=2)
        encoder = Policy.load(train(config, data, directory / 'run',
                                    training_rig.ALONE))
    return data, encoder


def test_stored_features_are_what_the_encoder_says_in_every_view(encoded):
    data, encoder = encoded
    plain = training_rig.config(shift_pixels=0.0, colour=0.0)
    rows = np.array([3, 0, 7])
    features = encode(encoder, data, rows, 2, plain, CPU)
    batch = data.gather(rows)
    ids, mask = encoder.network.encoder.tokenize(data.instructions)
    with torch.no_grad():
        context, own_mask = encoder.network.encoder(
            batch.pictures.movedim(-1, -3).float(), ids[batch.instruction],
            None if mask is None else mask[batch.instruction])
    assert features.context.shape == (2, *context.shape)
    for view in features.context:
        torch.testing.assert_close(view, context, atol=1e-4, rtol=1e-4)
    if own_mask is not None:
        assert torch.equal(features.mask[batch.instruction], own_mask)
    torch.testing.assert_close(features.chunk, batch.chunk)
    moved = encode(encoder, data, rows, 2, training_rig.config(), CPU)
    assert (moved.context[0] - moved.context[1]).abs().max() > 1e-3


def test_each_recipe_gets_its_own_network_on_the_same_encoder(encoded, monkeypatch):
    training_rig.make_networks_small(monkeypatch)
    data, encoder = encoded
    config = training_rig.config(freeze='encoder', steps=3)
    features = encode(encoder, data, np.arange(len(data)), 2, config, CPU)
    policies = train_heads({
        'l1': dataclasses.replace(config, loss='l1'), 'a': config,
        'b': dataclasses.replace(config, seed=1), 'again': config}, encoder, data, features, CPU)
    assert {name: policy.config.sampler for name, policy in policies.items()} == {
        'l1': 'regression', 'a': 'average', 'b': 'average', 'again': 'average'}

    def weights(name):
        return torch.cat([p.flatten() for p in policies[name].network.dit.parameters()])

    assert torch.equal(weights('a'), weights('again'))
    assert not torch.equal(weights('a'), weights('b'))
    for policy in policies.values():
        assert policy.network.encoder is encoder.network.encoder


def test_main_recipes_run_from_every_seed_and_extra_ones_from_the_first():
    trials = trials_of(['rf', 'rf-beta', PROBED], 3)
    assert [(t.seed, t.nfe) for t in trials if t.recipe == 'rf'] == [
        (seed, nfe) for seed in range(3) for nfe in (1, 2, 4)]
    assert {t.seed for t in trials if t.recipe == 'rf-beta'} == {0}
    assert [t.condition for t in trials if t.recipe == PROBED] == [
        *['normal'] * 6, 'swapped', 'blanked']
    assert len({t.policy for t in trials}) == 9 + 2 + 6


def test_a_swapped_trial_says_the_opposite_and_a_blanked_one_shows_nothing():
    swapped = jobs_of(Trial(recipe='rf', seed=0, nfe=1, condition='swapped'), tuple(TASKS), 2)
    assert len(swapped) == 12
    for job in swapped:
        assert job.instruction != TASKS[job.task].instruction
    blanked = jobs_of(Trial(recipe='rf', seed=0, nfe=1, condition='blanked'), MT10, 5, 3)
    assert [job.blank_cameras for job in blanked] == [('static', 'wrist')] * 20
    assert {job.seed for job in blanked} == {100_003, 100_004}


def test_episodes_that_were_run_elsewhere_are_read_once_and_not_run_again(tmp_path):
    own = Trial(recipe='rf', seed=0, nfe=1)
    lines = [json.dumps({'trial': dataclasses.asdict(each), 'result': dataclasses.asdict(
        EpisodeResult(task='reach', seed=100_000 + number, instruction='', success=number == 0,
                      steps=9, starved_steps=0, chunks=2, latency_p50_ms=1.0,
                      latency_p99_ms=2.0))}) for each in (own, CEILING) for number in range(2)]
    (tmp_path / 'episodes.jsonl').write_text('\n'.join(lines + lines[2:]) + '\n')
    arguments = argparse.Namespace(out=tmp_path, episodes=2, robots=1, camera_every=4)
    results = evaluate(None, [own], ['reach'], arguments)
    assert {each: counts(own) for each, own in results.items()} == {
        each: {'reach': {'episodes': 2, 'successes': 1}} for each in (own, CEILING)}


def trial(recipe, seed, nfe, reach, wall, modes, condition='normal'):
    return {'recipe': recipe, 'seed': seed, 'nfe': nfe, 'condition': condition, 'tasks': {
        'reach': {'episodes': 10, 'successes': reach},
        'pass-wall': {'episodes': 10, 'successes': wall, 'modes': modes}}}


MEASURED = {'trials': [
    trial('rf', 0, 4, 7, 9, {'left': 3, 'right': 6}),
    trial('rf', 1, 4, 9, 8, {'left': 4, 'right': 4}),
    trial('l1', 0, 1, 5, 0, {}), trial('expert', 0, 0, 10, 10, {'left': 5, 'right': 5})]}


def cells_of(text):
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()]


def test_an_episode_is_on_disk_as_soon_as_it_is_done(tmp_path, monkeypatch):
    """What ends the process with a SIGKILL afterwards takes none away."""
    path, found = tmp_path / 'episodes.jsonl', []

    def run_episodes(acts, jobs, robots, *, camera_every, progress):
        for job in jobs:
            progress(job, EpisodeResult(
                task=job.task, seed=job.seed, instruction='', success=True, steps=1,
                starved_steps=0, chunks=0, latency_p50_ms=0.0, latency_p99_ms=0.0))
            found.append([json.loads(line)['result']['seed']
                          for line in path.read_text().splitlines()])

    monkeypatch.setattr(benchmark, 'run_episodes', run_episodes)
    benchmark.evaluate(None, [], ['reach'], argparse.Namespace(
        out=tmp_path, episodes=2, robots=1, camera_every=4))
    assert found == [[100_000], [100_000, 100_001]]


def test_the_table_has_means_over_seeds_their_spread_and_the_modes():
    lines = cells_of(table(MEASURED))
    assert lines[0] == ['recipe', 'NFE', 'MT10', 'pass-wall', 'all', 'modes of successes', 'seeds']
    assert lines[2] == ['rf', '4', '80.0% ± 14.1', '85.0% ± 7.1', '82.5% ± 3.5',
                        'left 41%, right 59%', '2']
    assert lines[3][:4] == ['l1', '1', '50.0%', '0.0%']
    assert lines[4][:2] == ['expert', '']
    assert {len(line) for line in lines} == {7}


def test_the_second_table_has_every_task_that_was_run_and_their_mean():
    only = {'recipe': 'dpm', 'seed': 0, 'nfe': 2, 'condition': 'blanked', 'tasks': {
        'pass-block': {'episodes': 3, 'successes': 2}}}
    lines = cells_of(table_by_task({'trials': [*MEASURED['trials'], only]}))
    assert lines[0] == ['recipe', 'NFE', 'reach', 'pass-wall', 'pass-block', 'mean']
    assert lines[2] == ['rf', '4', '80% ± 14', '85% ± 7', '', '82% ± 4']
    assert lines[3:] == [['l1', '1', '50%', '0%', '', '25%'],
                         ['expert', '', '100%', '100%', '', '100%'],
                         ['dpm, blanked', '2', '', '', '67%', '67%']]
    names = cells_of(table_by_task({'trials': [{**only, 'tasks': {
        task: {'episodes': 3, 'successes': 2} for task in TASKS}}]}))[0]
    assert sorted(names[2:-1]) == sorted(TASKS) and names[2:12] == list(MT10)


def test_the_tables_by_task_in_the_results_are_those_of_the_stored_counts():
    docs = Path(__file__).parent.parent / 'docs'
    if not (docs / 'results.md').is_file():
        pytest.skip('there is no docs/results.md beside the tests')
    stored = json.loads((docs / 'data' / 'benchmark.json').read_text())
    assert table_by_task(stored) in (docs / 'results.md').read_text()


def test_every_average_velocity_is_run_with_one_and_with_two_evaluations():
    main = {name for name, recipe in RECIPES.items()
            if recipe.rank == 'main' and recipe.changes['loss'] not in ('rf', 'l1')}
    assert main >= {'meanflow', 'central', 'improved', 'dpm', 'dpm-stop', 'partial-t'}
    assert {RECIPES[name].nfe for name in main} == {(1, 2)}


def test_every_recipe_is_a_configuration_that_can_be_trained():
    for recipe in RECIPES.values():
        dataclasses.replace(training_rig.config(), freeze='encoder', **recipe.changes)
    assert CEILING.policy == 'scripted expert'
    assert json.dumps(dataclasses.asdict(CEILING))
