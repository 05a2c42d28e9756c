"""The `evaluate` command: what a checkpoint does, in closed loop and on recorded bags."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from meanflow_ros.core.policy import Policy
from meanflow_ros.evaluation.delays import cells_of, rows_of, table
from meanflow_ros.evaluation.episodes import EpisodeResult, print_summary, summarize
from meanflow_ros.evaluation.execution import EXECUTIONS
from meanflow_ros.evaluation.replay import command as replay
from meanflow_ros.paths import default_checkpoint
from meanflow_ros.sim.metaworld_robot import EVALUATION_SEED_START, PERIOD_S
from meanflow_ros.sim.scene import CAMERAS
from meanflow_ros.sim.tasks import GROUPS, OPPOSITE, TASKS, expand_tasks

EXECUTION = 'receding_horizon'   # the node's default


def instruction_of(task: str) -> str:
    """Return the words that a task's demonstrations were recorded with."""
    return TASKS[task].instruction


def _through_the_node(arguments: argparse.Namespace, checkpoint: Path, jobs,
                      progress: Callable[[EpisodeResult], None]) -> list[EpisodeResult]:
    """Return the result of each job: the node and the robot are processes of their own."""
    from meanflow_ros.evaluation.system import System
    policy = {'checkpoint': checkpoint, 'device': arguments.device,
              'sampler_steps': arguments.sampler_steps, 'seed': arguments.seed}
    logs = Path(tempfile.mkdtemp(prefix='evaluate-'))
    with System(logs, policy=policy, sim={'camera_period_s': arguments.camera_period}) as system:
        results = []
        for job in jobs:
            results.append(system.run_episode(*job))
            progress(results[-1])
    return results


def _without_ros(arguments: argparse.Namespace, checkpoint: Path, jobs,
                 progress: Callable[[EpisodeResult], None]) -> list[EpisodeResult]:
    """Return the result of each job: many robots, one policy, and its guard and timeline.

    With several ways to follow chunks, of each job in each of them.
    """
    from meanflow_ros.evaluation.closed_loop import Job, make_act, run_episodes
    device = arguments.device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    policy = Policy.load(checkpoint, device=device)
    cells = cells_of(arguments.execution, arguments.delay_steps, policy.robot,
                     policy.config.max_prefix)
    jobs = [Job(policy='policy', task=task, seed=seed, instruction=instruction,
                noise_seed=arguments.seed + seed - EVALUATION_SEED_START,
                blank_cameras=tuple(arguments.blank_camera), execution=cell.execution,
                delay_steps=cell.delay_steps, smoothness=True)
            for task, seed, instruction in jobs for cell in cells]
    return run_episodes({'policy': make_act(policy, arguments.sampler_steps)}, jobs,
                        arguments.workers, progress=lambda _, result: progress(result),
                        camera_every=max(1, round(arguments.camera_period / PERIOD_S)))


def _write_report(arguments: argparse.Namespace, checkpoint: Path,
                  results: list[EpisodeResult]) -> None:
    """Write report.html, with videos of episodes that are run again in this process."""
    from meanflow_ros.evaluation.closed_loop import Job, make_act
    from meanflow_ros.evaluation.sim_report import write_sim_report
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    write_sim_report(
        arguments.report, results, lambda result: Job(
            policy='policy', task=result.task, seed=result.seed,
            noise_seed=arguments.seed + result.seed - EVALUATION_SEED_START,
            instruction=result.instruction, blank_cameras=tuple(arguments.blank_camera),
            execution=arguments.execution[0], delay_steps=arguments.delay_steps[0]),
        make_act(Policy.load(checkpoint), arguments.sampler_steps),
        checkpoint=str(checkpoint), videos=arguments.videos,
        camera_every=max(1, round(arguments.camera_period / PERIOD_S)),
        settings={'in_process': arguments.in_process, 'sampler_steps': arguments.sampler_steps,
                  'seed': arguments.seed, 'camera_period_s': arguments.camera_period,
                  'swap_instructions': arguments.swap_instructions,
                  'blank_cameras': arguments.blank_camera})
    print(f'written to {arguments.report}')


def evaluate_sim(arguments: argparse.Namespace) -> int:
    """Run episodes on unseen seeds; print a table and write JSON."""
    checkpoint = arguments.checkpoint or default_checkpoint()
    told = OPPOSITE if arguments.swap_instructions else {}
    jobs = [(task, EVALUATION_SEED_START + number, instruction_of(told.get(task, task)))
            for number in range(arguments.episodes) for task in arguments.tasks]
    run = _without_ros if arguments.in_process else _through_the_node
    several = len(arguments.execution) * len(arguments.delay_steps)
    successes = 0
    with tqdm(total=several * len(jobs), desc='episodes', file=sys.stderr) as bar:
        def progress(result: EpisodeResult) -> None:
            nonlocal successes
            successes += result.success
            bar.update()
            bar.set_postfix_str(f'{successes}/{bar.n} succeeded')

        results = run(arguments, checkpoint, jobs, progress)
    summary = summarize(results)
    rows = rows_of(results) if arguments.in_process else []
    if several == 1:
        print_summary(summary)
    if several > 1 or arguments.in_process and (rows[0]['execution'], rows[0]['delay_steps']) \
            != (EXECUTION, 0):
        print(table(rows))
    if arguments.report:
        _write_report(arguments, checkpoint, results)
    if arguments.out:
        document = {
            'checkpoint': str(checkpoint), 'in_process': arguments.in_process,
            'sampler_steps': arguments.sampler_steps, 'camera_period_s': arguments.camera_period,
            'swap_instructions': arguments.swap_instructions,
            'blank_cameras': arguments.blank_camera, 'machine': platform.processor(),
            'torch': torch.__version__, 'rows': rows}
        if several == 1:
            document |= {'summary': summary, 'episodes': [
                {name: value for name, value in asdict(result).items() if name != 'smoothness'}
                for result in results]}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + '\n')
        print(f'written to {arguments.out}')
    return 0


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='evaluate',
        description='Measure what a checkpoint does: the ingest, policy and guard of the node.')
    commands = parser.add_subparsers(dest='command', required=True)
    replay.add_parser(commands)
    sim = commands.add_parser(
        'sim', help='closed loop with the simulated robot',
        description='Run episodes of the simulated robot on seeds that training never saw, with '
        'the policy node in a process of its own.')
    sim.add_argument('--checkpoint', type=Path,
                     help='checkpoint directory (default: the one that ships)')
    sim.add_argument('--tasks', nargs='+', choices=[*TASKS, *GROUPS], default=['all'],
                     metavar='TASK', help=f'of {", ".join(TASKS)}; or groups: '
                     f'{", ".join(GROUPS)} (default all)')
    sim.add_argument('--episodes', type=int, default=50, help='per task (default 50)')
    sim.add_argument('--sampler-steps', type=int, default=0,
                     help="NFE; 0 takes the checkpoint's own (default 0)")
    sim.add_argument('--camera-period', type=float, default=0.1,
                     help='simulated seconds from picture to picture (default 0.1)')
    sim.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    sim.add_argument('--seed', type=int, default=0, help='seed of the sampler noise (default 0)')
    sim.add_argument('--swap-instructions', action='store_true',
                     help='tell the opposite of each task, to see that the words matter')
    sim.add_argument('--in-process', action='store_true',
                     help='without ROS: the same ingest, policy, guard and timeline, for many '
                     'robots at a time')
    sim.add_argument('--workers', type=int, default=2 * (os.cpu_count() or 1),
                     help='robots at a time with --in-process (default: twice the cores)')
    sim.add_argument('--blank-camera', action='append', choices=CAMERAS, default=[],
                     metavar='NAME', help='show grey in place of this camera, to see that the '
                     'policy looks; with --in-process')
    sim.add_argument('--execution', nargs='+', default=[EXECUTION], metavar='MODE',
                     help=f'how chunks are followed, with --in-process: {EXECUTIONS} '
                     f'(default {EXECUTION})')
    sim.add_argument('--delay-steps', nargs='+', type=int, default=[0], metavar='N',
                     help='control steps of 25 ms from a picture to its chunk, with --in-process '
                     '(default 0); of several modes and delays every pair is run')
    sim.add_argument('--out', type=Path, help='JSON file for every episode and the summary')
    sim.add_argument('--report', type=Path, metavar='HTML', help='report.html to look at, with '
                     'videos of episodes that are run again without ROS')
    sim.add_argument('--videos', type=int, default=1, help='of each task in the report, failures '
                     'first (default 1)')
    arguments = parser.parse_args(argv)
    if arguments.command == 'replay':
        return arguments
    if arguments.report and len(arguments.execution) * len(arguments.delay_steps) > 1:
        parser.error('--report shows one mode and one delay')
    if arguments.episodes < 1:
        parser.error(f'--episodes must be at least 1, got {arguments.episodes}')
    if arguments.blank_camera and not arguments.in_process:
        parser.error('--blank-camera needs --in-process')
    if not arguments.in_process and (arguments.execution, arguments.delay_steps) != (
            [EXECUTION], [0]):
        parser.error('--execution and --delay-steps need --in-process; of a node, `execution` is '
                     'a parameter')
    arguments.tasks = list(expand_tasks(arguments.tasks))
    if arguments.swap_instructions:
        unpaired = [task for task in arguments.tasks if task not in OPPOSITE]
        if unpaired:
            arguments.tasks = [task for task in arguments.tasks if task in OPPOSITE]
            print(f'left out, having no opposite: {", ".join(unpaired)}', file=sys.stderr)
    return arguments


def main(argv=None) -> int:
    """Run the `evaluate` command."""
    arguments = _parse(argv)
    if arguments.command == 'replay':
        return replay.guarded_run(arguments)
    try:
        return evaluate_sim(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        print(f'evaluate: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('evaluate: interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
