"""A replay from the command line's arguments to what it leaves in its directory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from meanflow_ros.core.loading import choose_device, choose_dtype
from meanflow_ros.evaluation.replay import jobs, latency
from meanflow_ros.evaluation.replay.acting import Acting, make_acting
from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.replay.latency import MEASURED, Latency
from meanflow_ros.evaluation.replay.pages import write_report
from meanflow_ros.evaluation.replay.parts import Parts, key_of
from meanflow_ros.evaluation.replay.replay_mcap import write_mcap
from meanflow_ros.evaluation.replay.settings import (
    CHECKPOINT, LIVE, RECORDED, ReplaySettings, read_robot_and_data)
from meanflow_ros.evaluation.replay.summary import summarize, write_json
from meanflow_ros.evaluation.replay.topics import parse_remappings, topics_of
from meanflow_ros.paths import default_checkpoint
from meanflow_ros.ros.bag import deserialize
from meanflow_ros.ros.bag_files import METADATA, Bag, is_bag

PARTS, METRICS, LATENCY, REPORT = 'parts', 'metrics.json', 'latency.json', 'report.html'
MCAP, MCAPS = 'replay.mcap', 'replays'


@dataclass
class Replayed:
    """What a replay came to. document: the content of metrics.json."""

    document: dict
    episodes: list[EpisodeReplay]
    interrupted: bool


def replay(bags: Sequence[Path], arguments: argparse.Namespace) -> Replayed:
    """Replay the bags and write the results to `arguments.out`; ValueError for what to mend."""
    if arguments.live and (arguments.jobs > 1 or arguments.ray is not None):
        raise ValueError('--live plays to one node: leave --jobs and --ray out')
    given = None if arguments.latency == MEASURED else (
        latency.fixed(arguments.latency) or latency.from_file(Path(arguments.latency)))
    settings, seconds, reports = look_at(bags, make_settings(arguments))
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(settings, latency=given or _latency(
        arguments.out, settings, arguments.device or 'auto', arguments.dtype or 'auto'))
    acting = make_acting(settings)
    todo = [bag for bag in bags if bag not in reports]
    interrupted = False
    try:
        _replay_all(todo, settings, arguments, acting, seconds, reports)
    except KeyboardInterrupt:
        interrupted = True
    return _write_results(bags, settings, reports, arguments, interrupted)


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


def make_settings(arguments: argparse.Namespace) -> ReplaySettings:
    """Return the settings, all but the latency."""
    checkpoint = arguments.checkpoint
    if checkpoint is None and not (arguments.policy == RECORDED and arguments.config):
        checkpoint = default_checkpoint()
    robot, data = read_robot_and_data(checkpoint, arguments.config, arguments.data)
    device = choose_device(arguments.device or 'cpu')
    return ReplaySettings(
        robot=robot, data=data, latency=Latency(values_s=(0.0,), source='not yet known'),
        policy=LIVE if arguments.live else arguments.policy, checkpoint=str(checkpoint or ''),
        namespace=arguments.namespace,
        sampler_steps=arguments.sampler_steps, seed=arguments.seed, device=str(device),
        dtype=str(choose_dtype(arguments.dtype or 'float32', device)).removeprefix('torch.'),
        batch=arguments.batch, threads=arguments.threads,
        remaps=parse_remappings(arguments.topic),
        start_s=arguments.start, duration_s=arguments.duration, episodes=arguments.episodes,
        instruction=arguments.instruction, probe_every_s=arguments.probe_every,
        noise_seeds=arguments.noise_seeds, swapped_instruction=arguments.swapped_instruction,
        execution=arguments.execution, motion=str(arguments.motion or ''),
        urdf=arguments.urdf, as_driven=arguments.as_driven,
        min_rate_hz=arguments.min_rate_hz, frozen_pictures=arguments.frozen_pictures,
        picture_size=arguments.picture_size)


def _latency(out: Path, settings: ReplaySettings, device: str, dtype: str) -> Latency:
    """Return the latency that is not given. device, dtype: what the node would be told."""
    if settings.policy == LIVE:
        return Latency(values_s=(0.0,), source='live: from a complete observation to its chunk')
    if settings.policy == RECORDED:
        return Latency(values_s=(0.0,), source='none: the recorded commands need no inference')
    kept, of = out / LATENCY, f'{settings.fingerprint()} {device} {dtype}'
    if kept.is_file():    # an interrupted run goes on with the latencies that it began with
        document = json.loads(kept.read_text())
        if document.get('of') == of:
            return Latency(values_s=tuple(document['values_s']), source=document['source'],
                           runtime=document['runtime'])
    found = latency.measured(
        settings.checkpoint, device=device, dtype=dtype, threads=settings.threads,
        steps=settings.sampler_steps, instruction=settings.instruction)
    write_json(kept, {'of': of, 'values_s': found.values_s, 'source': found.source,
                      'runtime': dict(found.runtime),
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
                topics, _ = topics_of(bag, settings)
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


def _write_results(bags: Sequence[Path], settings: ReplaySettings, reports: dict[Path, dict],
                   arguments: argparse.Namespace, interrupted: bool) -> Replayed:
    out, fingerprint = arguments.out, settings.fingerprint()
    parts = [Parts(out / PARTS, bag, fingerprint) for bag in bags]
    episodes = [episode for each in parts for episode in each.episodes()]
    recordings = [{'path': str(bag), **reports.get(bag, jobs.failed(bag, 'not replayed yet'))}
                  for bag in bags]
    document = summarize(episodes, recordings, settings)
    write_json(out / METRICS, document)
    places = [(each, number) for each in parts for number in each.numbers()]
    write_report(out / REPORT, document, episodes,
                 lambda index: places[index][0].episode(places[index][1]))
    if not (interrupted or arguments.no_mcap):
        of = dict(zip(bags, parts))
        for bag in (bag for bag in bags if of[bag].numbers()):
            path = out / MCAP if len(bags) == 1 else out / MCAPS / f'{key_of(bag)}.mcap'
            path.parent.mkdir(exist_ok=True)
            write_mcap(path, bag, settings, of[bag].episodes())
    return Replayed(document, episodes, interrupted)
