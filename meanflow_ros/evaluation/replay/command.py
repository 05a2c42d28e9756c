"""`evaluate replay`: the command line, from bags to what a run leaves.

Exit codes: 0 all is well, 1 nothing could be replayed or an argument is wrong, 2 the command line
cannot be read, 3 a --fail-if condition holds, 4 some recordings could not be replayed (and no
condition holds), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from meanflow_ros.evaluation.replay import jobs, latency
from meanflow_ros.evaluation.replay.acting import Acting, make_acting
from meanflow_ros.evaluation.replay.gate import Condition
from meanflow_ros.evaluation.replay.latency import MEASURED, Latency
from meanflow_ros.evaluation.replay.pages import write_report
from meanflow_ros.evaluation.replay.parts import Parts
from meanflow_ros.evaluation.replay.settings import (
    CHECKPOINT, POLICIES, RECEDING, RECORDED, ReplaySettings, read_robot_and_data)
from meanflow_ros.evaluation.replay.summary import summarize, write_json
from meanflow_ros.evaluation.replay.topics import find_topics, parse_remappings
from meanflow_ros.paths import default_checkpoint
from meanflow_ros.ros.bag import deserialize
from meanflow_ros.ros.bag_files import Bag, METADATA, is_bag

OK, WRONG, GATED, PARTIAL, INTERRUPTED = 0, 1, 3, 4, 130
DESCRIPTION = (
    'Replay rosbag2 recordings through the ingest, policy, guard and timeline of the node, on the '
    'time of the recording and with the latency of the robot, and compare with the recorded '
    'actions. No ROS installation is needed.')
PARTS, METRICS, LATENCY, REPORT = 'parts', 'metrics.json', 'latency.json', 'report.html'


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
                       help='of an inference: 80ms, measured (on this machine, the default), or '
                       'a file of latencies that bench has written')
    robot.add_argument('--sampler-steps', type=int, default=0,
                       help="NFE; 0 takes the checkpoint's own (default 0)")
    robot.add_argument('--seed', type=int, default=0, help='of the sampler noise (default 0)')
    robot.add_argument('--execution', default=RECEDING, metavar='MODE',
                       help=f"as the node's parameter (default {RECEDING})")
    robot.add_argument('--motion', type=Path, metavar='YAML',
                       help='motion file whose limits the guard applies')
    robot.add_argument('--device', default='cpu', help='auto, cpu, cuda or cuda:N (default cpu)')
    robot.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    robot.add_argument('--batch', type=int, default=16,
                       help='observations that are inferred at a time (default 16); changes no '
                       'result')
    probes = parser.add_argument_group('probes')
    probes.add_argument('--probe-every', type=float, default=2.0, metavar='S',
                        help='seconds from one observation that is asked again, with other noise '
                        'and changed inputs, to the next (default 2); 0 for none')
    probes.add_argument('--noise-seeds', type=int, default=4,
                        help='draws of noise for each of them (default 4)')
    probes.add_argument('--swapped-instruction', default='', metavar='TEXT',
                        help='what the probe says (default: another one of the recordings)')
    many = parser.add_argument_group('many bags')
    many.add_argument('--jobs', type=int, default=1, help='processes (default 1)')
    many.add_argument('--ray', nargs='?', const='', metavar='ADDRESS',
                      help='spread the bags over a Ray cluster')
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
    settings, acting = make_settings(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings, seconds, reports = look_at(bags, settings)
    todo = [bag for bag in bags if bag not in reports]
    try:
        _replay_all(todo, settings, arguments, acting, seconds, reports)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    document = write_results(bags, settings, reports, arguments.out)
    if interrupted:
        print(f'replay: interrupted; what was done is in {arguments.out}, and the same command '
              f'goes on from there', file=sys.stderr)
        return INTERRUPTED
    return _exit_code(document, conditions, arguments.out)


def find_bags(paths: Sequence[Path]) -> list[Path]:
    """Return every rosbag2 at or below the paths, sorted, each once; ValueError if none is."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f'there is no bag at {path}')
        inside = _bags_below(path)
        if not inside:
            raise ValueError(f'{path} is not a rosbag2 and holds none: a bag is a directory with '
                             f'{METADATA}, or with .mcap or .db3 files')
        found.update(dict.fromkeys(inside))
    return list(found)


def _bags_below(path: Path) -> list[Path]:
    if is_bag(path) or (path / METADATA).is_file():
        return [path]
    return [bag for child in (sorted(path.iterdir()) if path.is_dir() else [])
            if child.is_dir() for bag in _bags_below(child)]


def make_settings(arguments: argparse.Namespace) -> tuple[ReplaySettings, Acting | None]:
    """Return the settings, and the policy, loaded, if it was needed to measure its latency."""
    checkpoint = arguments.checkpoint
    if checkpoint is None and not (arguments.policy == RECORDED and arguments.config):
        checkpoint = default_checkpoint()
    robot, data = read_robot_and_data(checkpoint, arguments.config, arguments.data)
    settings = ReplaySettings(
        robot=robot, data=data, latency=Latency(values_s=(0.0,), source='not yet known'),
        policy=arguments.policy, checkpoint=str(checkpoint or ''),
        sampler_steps=arguments.sampler_steps, seed=arguments.seed, device=arguments.device,
        dtype=arguments.dtype, batch=arguments.batch, remaps=parse_remappings(arguments.topic),
        start_s=arguments.start, duration_s=arguments.duration, episodes=arguments.episodes,
        instruction=arguments.instruction, probe_every_s=arguments.probe_every,
        noise_seeds=arguments.noise_seeds, swapped_instruction=arguments.swapped_instruction,
        execution=arguments.execution, motion=str(arguments.motion or ''))
    acting = make_acting(settings)
    times = _latency(arguments, settings, acting)
    return dataclasses.replace(settings, latency=times), acting


def _latency(arguments: argparse.Namespace, settings: ReplaySettings,
             acting: Acting | None) -> Latency:
    if arguments.latency != MEASURED:
        return latency.fixed(arguments.latency) or latency.from_file(Path(arguments.latency))
    if acting is None:
        return Latency(values_s=(0.0,), source='none: the recorded commands need no inference')
    kept = arguments.out / LATENCY
    if kept.is_file():    # an interrupted run goes on with the latencies that it began with
        document = json.loads(kept.read_text())
        if document.get('of') == settings.fingerprint():
            return Latency(values_s=tuple(document['values_s']), source=document['source'])
    found = latency.measured(acting, settings.robot, settings.instruction)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(kept, {'of': settings.fingerprint(), 'values_s': found.values_s,
                      'source': found.source,
                      'latencies_ms': [1e3 * value for value in found.values_s]})
    return found


def look_at(bags: Sequence[Path], settings: ReplaySettings,
            ) -> tuple[ReplaySettings, float, dict[Path, dict]]:
    """Open every bag before any is replayed: its length, its topics, its instructions.

    Return the settings with the instructions, the seconds in all, and a report for each bag that
    cannot be replayed. ValueError if none can.
    """
    seconds, texts, reports = 0.0, [], {}
    listens = settings.policy == CHECKPOINT and settings.probe_every_s and not (
        settings.swapped_instruction)
    for path in bags:
        try:
            with Bag(path) as bag:
                told = settings.instruction or settings.data.instructions_of(path)
                topics = find_topics(bag.topics, settings.robot, settings.data, settings.remaps,
                                     told=told is not None)
                if bag.start_ns is not None:
                    seconds += (bag.end_ns - bag.start_ns) / 1e9
                if listens and topics.instruction:
                    texts += [text for raw in bag.messages({topics.instruction})
                              if (text := _text(raw))]
        except (ValueError, OSError) as error:
            if len(bags) == 1:
                raise
            reports[path] = jobs.failed(path, str(error))
    if len(reports) == len(bags):
        raise ValueError('none of the recordings can be replayed: ' + '; '.join(
            f'{path.name}: {report["error"]}' for path, report in list(reports.items())[:3]))
    return jobs.with_instructions(settings, texts), seconds, reports


def _text(raw) -> str:
    try:
        return deserialize(raw.data, raw.type).data.strip()
    except ValueError:
        return ''


def _replay_all(bags: Sequence[Path], settings: ReplaySettings, arguments: argparse.Namespace,
                acting: Acting | None, seconds: float, reports: dict[Path, dict]) -> None:
    directory = arguments.out / PARTS
    with tqdm(total=round(seconds, 1), unit='s', desc='replayed', file=sys.stderr,
              bar_format='{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s of recording '
                         '[{elapsed}<{remaining}]{postfix}') as bar:
        def done(bag: Path, report: dict) -> None:
            reports[bag] = report
            if arguments.jobs > 1 or arguments.ray is not None:
                bar.update(report['seconds'])
            bar.set_postfix_str(f' {len(reports)} bags')

        if arguments.ray is not None:
            jobs.run_with_ray(bags, settings, directory, done=done,
                              address=arguments.ray or None)
        elif arguments.jobs > 1 and len(bags) > 1:
            jobs.run_in_processes(bags, settings, directory, arguments.jobs, done=done)
        else:
            jobs.run_here(bags, settings, directory, acting, progress=bar.update, done=done)


def write_results(bags: Sequence[Path], settings: ReplaySettings, reports: dict[Path, dict],
                  out: Path) -> dict:
    """Write what a run leaves and return the content of metrics.json."""
    fingerprint = settings.fingerprint()
    parts = [Parts(out / PARTS, bag, fingerprint) for bag in bags]
    episodes = [episode for each in parts for episode in each.episodes()]
    recordings = [{'path': str(bag), **reports.get(bag, jobs.failed(bag, 'not replayed yet'))}
                  for bag in bags]
    document = summarize(episodes, recordings, settings)
    write_json(out / METRICS, document)
    places = [(each, number) for each in parts for number in each.numbers()]
    write_report(out / REPORT, document, episodes,
                 lambda index: places[index][0].episode(places[index][1]))
    return document


def _exit_code(document: dict, conditions: Sequence[Condition], out: Path,
               say: Callable[[str], None] = print) -> int:
    for line in headline(document):
        say(line)
    say(f'written to {out}')
    if 'executed' not in document:
        return WRONG
    failed = [condition.text for condition in conditions if condition.holds(document)]
    for text in failed:
        print(f'replay: failed, since {text}', file=sys.stderr)
    if failed:
        return GATED
    broken = [each for each in document['recordings'] if each['error']]
    for each in broken:
        print(f'replay: {each["name"]}: {each["error"]}', file=sys.stderr)
    return PARTIAL if broken else OK


def headline(document: dict) -> list[str]:
    """Return the verdict in a few lines for the terminal."""
    counts, verdict = document['counts'], document['verdict']
    lines = [f'{counts["episodes"]} episodes, {counts["seconds"]:.0f} s, '
             f'{counts["observations"]} observations', verdict['headline']]
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
