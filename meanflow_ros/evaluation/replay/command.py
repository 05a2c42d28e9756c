"""`evaluate replay`: the command line, from bags to what a run leaves.

Exit codes: 0 all is well, 1 nothing could be replayed or an argument is wrong, 2 the command line
cannot be read, 3 a --fail-if condition holds, 4 some recordings could not be replayed (and no
condition holds), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from meanflow_ros.core.policy import DTYPES
from meanflow_ros.evaluation.replay.comparison import FIELDS, compare
from meanflow_ros.evaluation.replay.driving import NO_URDF
from meanflow_ros.evaluation.replay.gate import Condition
from meanflow_ros.evaluation.replay.latency import MEASURED
from meanflow_ros.evaluation.replay.running import find_bags, replay
from meanflow_ros.evaluation.replay.settings import (
    BATCH, BATCH_ON_CPU, CHECKPOINT, POLICIES, RECEDING, ReplaySettings)
from meanflow_ros.ros.streams import PICTURE_SIZES

OK, WRONG, GATED, PARTIAL, INTERRUPTED = 0, 1, 3, 4, 130
DESCRIPTION = (
    'Replay rosbag2 recordings through the ingest, policy, guard and timeline of the node, on the '
    'time of the recording and with the latency of the robot, and compare with the recorded '
    'actions. No ROS installation is needed.')


def add_parser(commands) -> None:
    """Add the sub-command to the parser of `evaluate`."""
    parser = commands.add_parser(
        'replay', help='what a policy would have done on recorded bags',
        description=DESCRIPTION)
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a replay."""
    parser.add_argument('bags', nargs='+', type=Path, metavar='BAG',
                        help='rosbag2 directories, files of them, or folders of bags')
    parser.add_argument('--out', type=Path, required=True, help='directory of the results')
    parser.add_argument('--checkpoint', type=Path,
                        help='checkpoint directory (default: the one that ships)')
    parser.add_argument('--policy', choices=POLICIES, default=CHECKPOINT,
                        help='the checkpoint, or the recorded commands in its place, which must '
                        'score no error')
    where = parser.add_argument_group('where the recording keeps what')
    where.add_argument('--config', type=Path, metavar='YAML',
                       help='training configuration whose section data says it')
    where.add_argument('--data', action='append', default=[], metavar='FIELD=VALUE',
                       help='a field of that section, episodes=bag for example')
    where.add_argument('--topic', action='append', default=[], metavar='NAME:=TOPIC',
                       help="the bag's topic for a name of the policy's, "
                       'camera/static/image_raw:=/zed/left for example')
    where.add_argument('--instruction', default='', help='told in place of the recorded ones')
    part = parser.add_argument_group('which part')
    part.add_argument('--start', type=float, default=0.0, metavar='S',
                      help='seconds of each bag to leave out at its beginning')
    part.add_argument('--duration', type=float, default=0.0, metavar='S',
                      help='seconds of each bag to replay (default: all)')
    part.add_argument('--episodes', type=_ranges, default=(), metavar='N,N-N',
                      help='episodes of each bag, counted from 0 (default: all)')
    robot = parser.add_argument_group('as on the robot')
    robot.add_argument('--latency', default=MEASURED, metavar='TIME|FILE',
                       help='of an inference: 80ms, measured (on this machine, as the node runs '
                       'it; the default), or a file of latencies that bench has written')
    robot.add_argument('--sampler-steps', type=int, default=0,
                       help="NFE; 0 takes the checkpoint's own (default 0)")
    robot.add_argument('--seed', type=int, default=0, help='of the sampler noise (default 0)')
    robot.add_argument('--execution', default=RECEDING, metavar='MODE',
                       help=f"as the node's parameter (default {RECEDING})")
    robot.add_argument('--motion', type=Path, metavar='YAML',
                       help='the motion file that the node is started with: limits, remedies '
                       'and outputs of the robot')
    robot.add_argument('--urdf', default='', metavar='FILE',
                       help='robot description whose limits are kept (default: that of the '
                       f"recording's topic robot_description); {NO_URDF} for none")
    robot.add_argument('--as-driven', action='store_true',
                       help='this policy drove the recorded robot, by this motion file: look for '
                       'joints that are not where they were sent (astray)')
    robot.add_argument('--min-rate-hz', type=float, default=ReplaySettings.min_rate_hz)
    robot.add_argument('--frozen-pictures', type=int, default=ReplaySettings.frozen_pictures)
    robot.add_argument('--picture-size', choices=PICTURE_SIZES,
                       default=ReplaySettings.picture_size,
                       help="when an input counts as missing, as the node's parameters")
    robot.add_argument('--device', help="auto, cpu, cuda or cuda:N, as the node's parameter "
                       '(default: chunks on the CPU; a measured latency is that of auto)')
    robot.add_argument('--dtype', choices=('auto', *DTYPES),
                       help="as the node's parameter (default: chunks in float32, in which "
                       'batches change nothing; a measured latency is that of auto)')
    robot.add_argument('--batch', type=int, default=0,
                       help=f'observations that are inferred at a time (default {BATCH_ON_CPU} on '
                       f'a CPU, else {BATCH}); changes no result')
    robot.add_argument('--threads', type=int, default=0,
                       help="of a CPU, each with a batch of its own (default: PyTorch's choice)")
    probes = parser.add_argument_group('probes')
    probes.add_argument('--probe-every', type=float, default=2.0, metavar='S',
                        help='seconds from one observation that is asked again, with other noise '
                        'and changed inputs, to the next (default 2); 0 for none')
    probes.add_argument('--noise-seeds', type=int, default=4,
                        help='draws of noise for each of them (default 4)')
    probes.add_argument('--swapped-instruction', default='', metavar='TEXT',
                        help='what the probe says (default: another one of the recordings)')
    parser.add_argument('--compare', nargs=2, metavar=('A', 'B'),
                        help='replay twice and compare, paired by episode: two checkpoint '
                        f'directories, or settings such as sampler_steps=1 ({", ".join(FIELDS)}), '
                        'several joined by commas')
    live = parser.add_argument_group('through a running node')
    live.add_argument('--live', action='store_true',
                      help='play the bags over DDS, with /clock, to the policy node that runs, '
                      'and judge what comes back; needs ROS 2')
    live.add_argument('--namespace', default='', help='of the node (default: none)')
    many = parser.add_argument_group('many bags')
    many.add_argument('--jobs', type=int, default=1, help='processes (default 1)')
    many.add_argument('--ray', nargs='?', const='', metavar='ADDRESS',
                      help='spread the bags over a Ray cluster')
    parser.add_argument('--no-mcap', action='store_true', help='leave replay.mcap out')
    parser.add_argument('--fail-if', action='append', default=[], metavar='CONDITION',
                        help="exit with 3 if it holds: 'first_step_mae.x > 0.01'")


def _ranges(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(','):
        first, dash, last = part.partition('-')
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise argparse.ArgumentTypeError(f'write 0,3-5, got {text!r}')
        numbers += range(int(first), int(last or first) + 1)
    return tuple(sorted(set(numbers)))


def run(arguments: argparse.Namespace) -> int:
    """Replay, write, and return the exit code; ValueError for what a user must mend."""
    conditions = [Condition(text) for text in arguments.fail_if]
    if arguments.jobs < 1:
        raise ValueError(f'--jobs must be at least 1, got {arguments.jobs}')
    bags = find_bags(arguments.bags)
    done = compare(bags, arguments) if arguments.compare else replay(bags, arguments)
    if done.interrupted:
        print(f'replay: interrupted; what was done is in {arguments.out}, and the same command '
              f'goes on from there', file=sys.stderr)
        return INTERRUPTED
    return _exit_code(done.document, conditions, arguments.out)


def _exit_code(document: dict, conditions: Sequence[Condition], out: Path,
               say: Callable[[str], None] = print) -> int:
    for line in headline(document):
        say(line)
    say(f'written to {out}')
    broken = [each for each in document['recordings'] if each['error']]
    for each in broken:
        print(f'replay: {each["name"]}: {each["error"]}', file=sys.stderr)
    if 'executed' not in document and 'differences' not in document:
        return WRONG
    failed = [condition.text for condition in conditions if condition.holds(document)]
    for text in failed:
        print(f'replay: failed, since {text}', file=sys.stderr)
    if failed:
        return GATED
    return PARTIAL if broken else OK


def headline(document: dict) -> list[str]:
    """Return the verdict in a few lines for the terminal."""
    counts, verdict = document.get('counts'), document['verdict']
    lines = [f'{counts["episodes"]} episodes, {counts["seconds"]:.0f} s, '
             f'{counts["observations"]} observations'] if counts else []
    lines.append(verdict['headline'])
    lines += [f'  {"!" if each["level"] != "good" else "-"} {each["text"]}'
              for each in verdict['findings']]
    for each in document['recordings']:
        lines += [f'  {each["name"]}: lost: {what}' for what in each['lost']]
        lines += [f'  left out: {name}: {why}' for name, why in each['skipped']]
    return lines


def main(argv=None) -> int:
    """Run the `replay` command, which is `evaluate replay`."""
    parser = argparse.ArgumentParser(prog='replay', description=DESCRIPTION)
    add_arguments(parser)
    return guarded_run(parser.parse_args(argv))


def guarded_run(arguments: argparse.Namespace) -> int:
    """Run, and tell in one line what a user must mend."""
    try:
        return run(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        print(f'replay: {error}', file=sys.stderr)
        return WRONG


if __name__ == '__main__':
    sys.exit(main())
