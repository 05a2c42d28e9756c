"""The `benchmark` command: which objective is best, measured in closed loop.

One encoder is trained end to end with the rectified-flow baseline. On its frozen output every
recipe trains an action network of its own, from several seeds, and each network then runs
episodes on seeds that no training saw. What is compared is therefore the objective and the action
network; what a recipe would have done for the encoder is not part of the comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from meanflow_ros.core.policy import Policy
from meanflow_ros.evaluation.captured_acts import CapturedActs
from meanflow_ros.evaluation.closed_loop import ActBatch, PolicyActs, run_episodes
from meanflow_ros.evaluation.episode_worker import EXPERT, Job
from meanflow_ros.evaluation.episodes import EpisodeResult, summarize
from meanflow_ros.sim.metaworld_robot import EVALUATION_SEED_START
from meanflow_ros.sim.scene import CAMERAS
from meanflow_ros.sim.tasks import (
    MT10, MULTIMODAL, OPPOSITE, SAME_PICTURE, TASKS, expand_tasks)
from meanflow_ros.training.config import TrainConfig, add_overrides, read_train_config
from meanflow_ros.training.distributed import join_group
from meanflow_ros.training.heads import encode, train_heads
from meanflow_ros.training.pairs import PairDataset
from meanflow_ros.training.policy import make_policy
from meanflow_ros.training.train import decode, train

log = logging.getLogger('meanflow_ros.benchmark')
MAIN, EXTRA = 'main', 'extra'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A row of the table: what it changes in the training, and the NFE that it is run with.

    rank: `main` recipes are trained from every seed, `extra` ones from the first alone.
    """

    changes: dict
    nfe: tuple[int, ...] = (1,)
    rank: str = MAIN


RECIPES = {
    'l1': Recipe(changes={'loss': 'l1'}),
    'rf': Recipe(changes={'loss': 'rf'}, nfe=(1, 2, 4)),
    'rf-high-noise': Recipe(changes={'loss': 'rf', 'time_sampling': 'high_noise'}),
    'meanflow': Recipe(changes={'loss': 'meanflow'}, nfe=(1, 2)),
    'central': Recipe(changes={'loss': 'central'}, nfe=(1, 2)),
    'improved': Recipe(changes={'loss': 'improved'}, nfe=(1, 2)),
    'dpm': Recipe(changes={'loss': 'dpm'}, nfe=(1, 2)),
    'dpm-stop': Recipe(changes={'loss': 'dpm', 'stop_target': True, 'stop_weight': True},
                       nfe=(1, 2)),
    'partial-t': Recipe(changes={'loss': 'meanflow_partial_t'}, nfe=(1, 2)),
    'meanflow-one-step': Recipe(changes={'loss': 'meanflow', 'one_step_proportion': 0.1,
                                         'data_proportion': 0.5}, nfe=(1, 2)),
    'meanflow-h-decoder': Recipe(changes={'loss': 'meanflow', 'h_in': 'decoder'}, rank=EXTRA),
    'meanflow-h-last-third': Recipe(changes={'loss': 'meanflow', 'h_in': 'adaln_last_third'},
                                    rank=EXTRA),
    'meanflow-frequency-1000': Recipe(changes={'loss': 'meanflow', 'max_frequency': 1000.0},
                                      rank=EXTRA),
    'rf-frequency-1000': Recipe(changes={'loss': 'rf', 'max_frequency': 1000.0}, nfe=(1, 4),
                                rank=EXTRA),
    'rf-beta': Recipe(changes={'loss': 'rf', 'time_sampling': 'beta'}, nfe=(1, 4), rank=EXTRA),
    'meanflow-v1': Recipe(changes={'loss': 'meanflow', 'time_sampling': 'v1'}, rank=EXTRA),
    'meanflow-guided': Recipe(changes={'loss': 'meanflow', 'guidance': 1.5,
                                       'condition_dropout': 0.1}, rank=EXTRA),
    'meanflow-dispersive': Recipe(changes={'loss': 'meanflow', 'dispersive': 0.1}, rank=EXTRA),
}
BLOCK = 10
PROBED = 'meanflow-one-step'   # the recipe that is also run with wrong words and without pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One network under one condition: a group of episodes."""

    recipe: str
    seed: int
    nfe: int
    condition: str = 'normal'

    @property
    def policy(self) -> str:
        """Return the key of its policy."""
        if self == CEILING:
            return EXPERT
        return f'{self.recipe}/{self.seed}/{self.nfe}'


CEILING = Trial(recipe='expert', seed=0, nfe=0)


def trials_of(recipes: Sequence[str], seeds: int) -> list[Trial]:
    """Return everything that is to be run."""
    trials = [Trial(recipe=name, seed=seed, nfe=nfe) for name in recipes
              for seed in range(seeds if RECIPES[name].rank == MAIN else 1)
              for nfe in RECIPES[name].nfe]
    if PROBED in recipes:
        trials += [Trial(recipe=PROBED, seed=0, nfe=1, condition=condition)
                   for condition in ('swapped', 'blanked')]
    return trials


def jobs_of(trial: Trial, tasks: Sequence[str], end: int, start: int = 0) -> list[Job]:
    """Return a trial's episodes start .. end - 1 of each task.

    Every episode has noise of its own, the same for all trials of one training seed. With swapped
    instructions only those tasks that have another.
    """
    told = OPPOSITE if trial.condition == 'swapped' else {task: task for task in tasks}
    blank = CAMERAS if trial.condition == 'blanked' else ()
    return [Job(policy=trial.policy, task=task, seed=EVALUATION_SEED_START + number,
                noise_seed=1000 * trial.seed + number, instruction=TASKS[told[task]].instruction,
                blank_cameras=tuple(blank))
            for task in tasks if task in told for number in range(start, end)]


def run(config: TrainConfig, arguments: argparse.Namespace) -> dict:
    """Train and evaluate all recipes; return what was measured, as it is written to JSON."""
    tasks = expand_tasks(arguments.tasks)
    group = join_group(arguments.device)
    device = group.device
    data = decode(arguments.data, config, arguments.out / 'cache', arguments.workers)
    rows, _ = data.split(config.validation)
    trained = arguments.encoder
    if not trained:
        encoder_config = dataclasses.replace(config, loss='rf', steps=arguments.encoder_steps,
                                             time_sampling='', guidance=1.0, condition_dropout=0.0)
        trained = train(encoder_config, data, arguments.out / 'encoder', group,
                        weights_dtype=torch.float32)
    encoder = Policy.load(trained, device=device)
    trials = trials_of(arguments.recipes, arguments.seeds)
    configs = {f'{trial.recipe}/{trial.seed}': dataclasses.replace(
        config, seed=trial.seed, freeze='encoder', **RECIPES[trial.recipe].changes)
        for trial in trials}
    policies = trained_heads(configs, encoder, data, rows, config, arguments, device)
    prompts = sorted({task.instruction for task in TASKS.values()})

    def make_act(trial: Trial) -> ActBatch:
        policy = policies[f'{trial.recipe}/{trial.seed}']
        return (CapturedActs(policy, trial.nfe, prompts) if device.type == 'cuda'
                else PolicyActs(policy, trial.nfe))

    episodes = evaluate(make_act, trials, tasks, arguments)
    return {'arguments': {key: str(value) for key, value in vars(arguments).items()
                          if value is not None},
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
            'torch': torch.__version__, 'observations': len(rows),
            'parameters': sum(p.numel() for p in encoder.network.parameters()),
            'trials': [{**dataclasses.asdict(trial), 'tasks': counts(episodes[trial])}
                       for trial in [*trials, CEILING] if episodes[trial]]}


def trained_heads(configs: Mapping[str, TrainConfig], encoder: Policy, data: PairDataset,
                  rows: np.ndarray, config: TrainConfig, arguments: argparse.Namespace,
                  device: torch.device) -> dict[str, Policy]:
    """Return the policy of every configuration; those trained in an earlier call are read."""
    folder = arguments.out / 'heads'
    folder.mkdir(exist_ok=True)
    files = {name: folder / f'{name.replace("/", "_")}.safetensors' for name in configs}
    missing = {name: configs[name] for name in configs if not files[name].exists()}
    policies = {}
    if missing:
        features = encode(encoder, data, rows, arguments.views, config, device)
        policies = train_heads(missing, encoder, data, features, device)
        for name, policy in policies.items():
            save_file(policy.network.dit.state_dict(), f'{files[name]}.partial')
            Path(f'{files[name]}.partial').rename(files[name])
    for name in configs.keys() - missing.keys():
        policy = make_policy(configs[name], data)
        policy.network.dit.load_state_dict(load_file(files[name]))
        policy.network.to(device).encoder = encoder.network.encoder
        policies[name] = policy
    return policies


def evaluate(make_act: Callable[[Trial], ActBatch], trials: Sequence[Trial],
             tasks: Sequence[str], arguments: argparse.Namespace,
             ) -> dict[Trial, list[EpisodeResult]]:
    """Run the episodes that `episodes.jsonl` does not hold yet; return all of them by trial.

    They run in blocks of a few seeds of every trial, so that what is there after an interruption
    compares all trials. The file may be several joined ones: an episode counts once.
    """
    path = arguments.out / 'episodes.jsonl'
    results: dict[Trial, list[EpisodeResult]] = defaultdict(list)
    done = set()
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        trial, result = Trial(**entry['trial']), EpisodeResult(**entry['result'])
        if (trial, result.task, result.seed) not in done:
            results[trial].append(result)
        done.add((trial, result.task, result.seed))
    trial_of = {(job.policy, job.instruction, job.blank_cameras, job.task, job.seed): trial
                for trial in [*trials, CEILING]
                for job in jobs_of(trial, tasks, arguments.episodes)}
    jobs = [job for start in range(0, arguments.episodes, BLOCK) for trial in [CEILING, *trials]
            for job in jobs_of(trial, tasks, min(start + BLOCK, arguments.episodes), start)
            if (trial, job.task, job.seed) not in done]
    asked = {job.policy for job in jobs}
    acts = {trial.policy: make_act(trial) for trial in trials if trial.policy in asked}
    with (open(path, 'a', encoding='utf-8', buffering=1) as file,
          tqdm(total=len(jobs), desc='episodes', file=sys.stderr, mininterval=2.0) as bar):
        def note(job: Job, result: EpisodeResult) -> None:
            trial = trial_of[job.policy, job.instruction, job.blank_cameras, job.task, job.seed]
            results[trial].append(result)
            file.write(json.dumps({'trial': dataclasses.asdict(trial),
                                   'result': dataclasses.asdict(result)}) + '\n')
            bar.update()

        run_episodes(acts, jobs, arguments.robots, camera_every=arguments.camera_every,
                     progress=note)
    return results


def counts(results: Sequence[EpisodeResult]) -> dict[str, dict]:
    """Return per task how many episodes there were, how many succeeded, and in which mode."""
    return {task: {key: row[key] for key in ('episodes', 'successes', 'modes') if key in row}
            for task, row in summarize(list(results)).items()}


def table(document: dict) -> str:
    """Return the results as a Markdown table: a row per recipe, NFE and condition.

    Means over groups of tasks, for the groups of which any task was run.
    """
    groups = {'MT10': MT10, 'same picture': SAME_PICTURE,
              **{task: (task,) for task in MULTIMODAL}, 'all': tuple(TASKS)}
    return _table(document, groups, 1, {'modes of successes': _modes,
                                        'seeds': lambda records: str(len(records))})


def table_by_task(document: dict) -> str:
    """Return the success on each task that was run, and their mean, with the rows of `table`."""
    tasks = dict.fromkeys((*MT10, *SAME_PICTURE, *MULTIMODAL))
    return _table(document, {**{task: (task,) for task in tasks}, 'mean': tuple(TASKS)}, 0, {})


def _table(document: dict, groups: Mapping[str, Sequence[str]], digits: int,
           others: Mapping[str, Callable[[Sequence[dict]], str]]) -> str:
    """Return a Markdown table: a column per group of tasks with any result, and the others."""
    rows = defaultdict(list)
    for record in document['trials']:
        rows[record['recipe'], record['nfe'], record['condition']].append(record)
    was_run = {task for record in document['trials'] for task in record['tasks']}
    groups = {name: tasks for name, tasks in groups.items() if was_run.intersection(tasks)}
    lines = [' | '.join(['| recipe | NFE', *groups, *others]) + ' |',
             '|' + '---|' * (2 + len(groups) + len(others))]
    for (recipe, nfe, condition), records in rows.items():
        name = recipe if condition == 'normal' else f'{recipe}, {condition}'
        cells = [*(_spread(records, tasks, digits) for tasks in groups.values()),
                 *(describe(records) for describe in others.values())]
        lines.append(' | '.join([f'| {name} | {nfe or ""}', *cells]) + ' |')
    return '\n'.join(lines) + '\n'


def _modes(records: Sequence[dict]) -> str:
    """Return how often each way of a task with several ways was taken, in %."""
    shares = []
    for task in MULTIMODAL:
        modes = Counter()
        for record in records:
            modes.update(record['tasks'].get(task, {}).get('modes', {}))
        shares += [', '.join(f'{mode} {count / modes.total():.0%}'
                             for mode, count in sorted(modes.items()))] if modes else []
    return '; '.join(shares)


def _spread(records: Sequence[dict], tasks: Sequence[str], digits: int) -> str:
    """Return the mean success over tasks in %, and its deviation over training seeds."""
    rates = [np.mean([row['successes'] / row['episodes'] for task in tasks
                      if (row := record['tasks'].get(task))]) for record in records
             if any(task in record['tasks'] for task in tasks)]
    if not rates:
        return ''
    spread = f' ± {100 * np.std(rates, ddof=1):.{digits}f}' if len(rates) > 1 else ''
    return f'{np.mean(rates):.{digits}%}{spread}'


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='benchmark', description='Train every recipe on demonstrations of the simulated '
        'robot and compare them in closed loop, on seeds that training never saw.')
    parser.add_argument('config', type=Path, help='training YAML, see config/train_metaworld.yaml')
    parser.add_argument('--data', type=Path, required=True,
                        help='demonstrations, as record_demonstrations writes them')
    parser.add_argument('--out', type=Path, required=True, help='directory for everything')
    parser.add_argument('--recipes', nargs='+', choices=RECIPES, default=list(RECIPES),
                        metavar='RECIPE', help=f'default all: {", ".join(RECIPES)}')
    parser.add_argument('--tasks', nargs='+', default=['all'], help='tasks or groups of them')
    parser.add_argument('--seeds', type=int, default=3, help='training seeds of the main recipes')
    parser.add_argument('--episodes', type=int, default=50,
                        help='of each task and trial; 0 only trains (default 50)')
    parser.add_argument('--encoder-steps', type=int, default=2000,
                        help='steps of the encoder, which all recipes share')
    parser.add_argument('--encoder', type=Path, metavar='CHECKPOINT',
                        help='take the encoder of this checkpoint and train none')
    parser.add_argument('--views', type=int, default=6,
                        help='random shifts and colours in which each picture is stored')
    parser.add_argument('--camera-every', type=int, default=4,
                        help='control steps from picture to picture')
    parser.add_argument('--workers', type=int, default=2, help='processes that read recordings')
    parser.add_argument('--robots', type=int, default=4, help='simulated robots at a time')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    add_overrides(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run the `benchmark` command."""
    logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')
    arguments = _parse(argv)
    try:
        document = run(read_train_config(arguments.config, arguments), arguments)
    except (OSError, RuntimeError, ValueError, FloatingPointError) as error:
        print(f'benchmark: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('benchmark: interrupted', file=sys.stderr)
        return 130
    (arguments.out / 'benchmark.json').write_text(json.dumps(document, indent=1) + '\n')
    text = f'{table(document)}\n{table_by_task(document)}'
    (arguments.out / 'table.md').write_text(text)
    print(text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
