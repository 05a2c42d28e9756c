"""The `evaluate` command: what a checkpoint does, through the node that runs it on a robot."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from meanflow_ros.evaluation.system import EpisodeResult, System, SystemFault
from meanflow_ros.paths import default_checkpoint
from meanflow_ros.sim.metaworld_robot import EVALUATION_SEED_START, TASKS

OPPOSITE = {'faucet-open': 'faucet-close', 'faucet-close': 'faucet-open',
            'drawer-open': 'drawer-close', 'drawer-close': 'drawer-open',
            'window-open': 'window-close', 'window-close': 'window-open'}


def instruction_of(task: str) -> str:
    """Return the words that a task's demonstrations were recorded with."""
    return TASKS[task][1]


def success_interval(successes: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a success rate (Wilson 1927)."""
    z, share = 1.96, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total ** 2)) / (
        1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(results: list[EpisodeResult]) -> dict[str, dict[str, float]]:
    """Return per task the success rate, its interval, median steps and network latency."""
    summary = {}
    for task in dict.fromkeys(result.task for result in results):
        own = [result for result in results if result.task == task]
        successes = sum(result.success for result in own)
        low, high = success_interval(successes, len(own))
        summary[task] = {
            'episodes': len(own), 'successes': successes, 'rate': successes / len(own),
            'low': low, 'high': high, 'steps': float(np.median([r.steps for r in own])),
            'latency_p50_ms': float(np.median([r.latency_p50_ms for r in own]))}
    return summary


def print_summary(summary: dict[str, dict[str, float]]) -> None:
    """Print a table of what `summarize` returned."""
    print(f'{"task":22} {"success":>9} {"rate":>6}  {"95 % interval":15} {"steps":>6} '
          f'{"p50 ms":>7}')
    for task, row in summary.items():
        print(f'{task:22} {row["successes"]:>4}/{row["episodes"]:<4} {row["rate"]:6.1%}  '
              f'{row["low"]:6.1%} - {row["high"]:6.1%} {row["steps"]:6.0f} '
              f'{row["latency_p50_ms"]:7.1f}')


def evaluate_sim(arguments: argparse.Namespace) -> int:
    """Run episodes on unseen seeds through the node; print a table and write JSON."""
    results: list[EpisodeResult] = []
    checkpoint = arguments.checkpoint or default_checkpoint()
    told = OPPOSITE if arguments.swap_instructions else {}
    policy = {'checkpoint': checkpoint, 'device': arguments.device,
              'sampler_steps': arguments.sampler_steps, 'seed': arguments.seed}
    logs = Path(tempfile.mkdtemp(prefix='evaluate-'))
    jobs = [(task, EVALUATION_SEED_START + number) for number in range(arguments.episodes)
            for task in arguments.tasks]
    with System(logs, policy=policy, sim={'camera_period_s': arguments.camera_period}) as system:
        progress = tqdm(jobs, 'episodes', file=sys.stderr)
        for task, seed in progress:
            results.append(system.run_episode(task, seed, instruction_of(told.get(task, task))))
            progress.set_postfix_str(f'{sum(r.success for r in results)}/{len(results)} succeeded')
    summary = summarize(results)
    print_summary(summary)
    if arguments.out:
        document = {
            'checkpoint': str(checkpoint), 'sampler_steps': arguments.sampler_steps,
            'swap_instructions': arguments.swap_instructions, 'machine': platform.processor(),
            'torch': torch.__version__, 'summary': summary,
            'episodes': [asdict(result) for result in results]}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + '\n')
        print(f'written to {arguments.out}')
    return 0


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='evaluate', description='Measure what a checkpoint does, through the policy node.')
    commands = parser.add_subparsers(dest='command', required=True)
    sim = commands.add_parser(
        'sim', help='closed loop with the simulated robot',
        description='Run episodes of the simulated robot on seeds that training never saw, with '
        'the policy node in a process of its own.')
    sim.add_argument('--checkpoint', type=Path,
                     help='checkpoint directory (default: the one that ships)')
    sim.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS), metavar='TASK',
                     help=f'default all: {", ".join(TASKS)}')
    sim.add_argument('--episodes', type=int, default=50, help='per task (default 50)')
    sim.add_argument('--sampler-steps', type=int, default=0,
                     help="NFE; 0 takes the checkpoint's own (default 0)")
    sim.add_argument('--camera-period', type=float, default=0.1,
                     help='simulated seconds from picture to picture (default 0.1)')
    sim.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    sim.add_argument('--seed', type=int, default=0, help='seed of the sampler noise (default 0)')
    sim.add_argument('--swap-instructions', action='store_true',
                     help='tell the opposite of each task, to see that the words matter')
    sim.add_argument('--out', type=Path, help='JSON file for every episode and the summary')
    arguments = parser.parse_args(argv)
    if arguments.episodes < 1:
        parser.error(f'--episodes must be at least 1, got {arguments.episodes}')
    if arguments.swap_instructions:
        unpaired = [task for task in arguments.tasks if task not in OPPOSITE]
        if unpaired:
            arguments.tasks = [task for task in arguments.tasks if task in OPPOSITE]
            print(f'left out, having no opposite: {", ".join(unpaired)}', file=sys.stderr)
    return arguments


def main(argv=None) -> int:
    """Run the `evaluate` command."""
    arguments = _parse(argv)
    try:
        return evaluate_sim(arguments)
    except (SystemFault, OSError) as error:
        print(f'evaluate: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('evaluate: interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
