"""The `demo` command: a sentence goes in, a robot in physics does the task, and you can watch."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from meanflow_ros.evaluation.episodes import EpisodeResult
from meanflow_ros.evaluation.evaluate import instruction_of
from meanflow_ros.evaluation.recording import RunRecorder, write_plot, write_strip, write_video
from meanflow_ros.evaluation.system import System, SystemFault
from meanflow_ros.paths import default_checkpoint
from meanflow_ros.ros.bag import BagWriter
from meanflow_ros.sim.metaworld_robot import EVALUATION_SEED_START
from meanflow_ros.sim.tasks import TASKS

LEFT = ('demo.mp4', 'motion.png', 'strip.png', 'bag')


def run(arguments: argparse.Namespace) -> list[EpisodeResult]:
    """Run the episodes and write video, plot and bag; print a line per episode."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name in LEFT:
        stale = out / name
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    results = []
    print('starting the simulated robot and the policy node (two processes, real DDS) ...',
          flush=True)
    policy = {'checkpoint': arguments.checkpoint or default_checkpoint(),
              'device': arguments.device, 'sampler_steps': arguments.sampler_steps}
    with System(out / 'logs', policy=policy, sim={}) as system, BagWriter(out / 'bag') as bag:
        recorder = RunRecorder(system.node, bag)
        wide = max(len(instruction_of(task)) for task in arguments.tasks[:arguments.episodes])
        print(f'{"":3} {"task":22} {"instruction":{wide}} {"result":8} {"steps":>5} '
              f'{"inference p50":>13} {"p99":>9}', flush=True)
        for number in range(arguments.episodes):
            task = arguments.tasks[number % len(arguments.tasks)]
            result = system.run_episode(task, arguments.first_seed + number, instruction_of(task))
            results.append(result)
            print(f'{number + 1:3} {task:22} {result.instruction:{wide}} '
                  f'{"success" if result.success else "failure":8} {result.steps:5} '
                  f'{result.latency_p50_ms:10.1f} ms {result.latency_p99_ms:6.1f} ms', flush=True)
    print('writing the video, the plot and the bag ...', flush=True)
    episodes = [episode for episode in recorder.episodes if episode.pictures['static']]
    write_video(out / 'demo.mp4', episodes)
    write_plot(out / 'motion.png', episodes)
    write_strip(out / 'strip.png', episodes[0])
    return results


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='demo', description='Start the simulated robot and the policy node, run episodes on '
        'seeds that training never saw, and leave a video, a plot and a rosbag2 to look at.')
    parser.add_argument('--out', type=Path, default=Path('demo_out'), help='default demo_out')
    parser.add_argument('--episodes', type=int, default=10, help='default 10')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS), metavar='TASK',
                        help=f'taken in turn; default: {", ".join(TASKS)}')
    parser.add_argument('--first-seed', type=int, default=EVALUATION_SEED_START + 500,
                        help=f'training used seeds below {EVALUATION_SEED_START}')
    parser.add_argument('--checkpoint', type=Path, help='default: the one that ships')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    parser.add_argument('--sampler-steps', type=int, default=0,
                        help="network evaluations per chunk; 0 takes the checkpoint's own")
    arguments = parser.parse_args(argv)
    if arguments.episodes < 1:
        parser.error(f'--episodes must be at least 1, got {arguments.episodes}')
    return arguments


def main(argv=None) -> int:
    """Run the `demo` command."""
    arguments, start = _parse(argv), time.monotonic()
    try:
        results = run(arguments)
    except (SystemFault, OSError, RuntimeError) as error:
        print(f'demo: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ndemo: interrupted, every process has been ended', file=sys.stderr)
        return 130
    successes = sum(result.success for result in results)
    p50 = np.median([result.latency_p50_ms for result in results])
    print(f'\n{successes} of {len(results)} episodes succeeded in {time.monotonic() - start:.0f} s'
          f'; inference takes {p50:.1f} ms at the median.\nLook at {arguments.out}/demo.mp4 (the '
          f'predicted chunk is drawn into the picture), {arguments.out}/motion.png (predicted '
          f'against executed motion) and {arguments.out}/bag (rosbag2, mcap).')
    return 0


if __name__ == '__main__':
    sys.exit(main())
