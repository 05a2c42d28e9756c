"""One bag through the player: its messages in, its episodes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from meanflow_ros.core.contract import NANOSECONDS
from meanflow_ros.evaluation.replay.driving import NO_URDF, limits_of_bag
from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.replay.player import Player
from meanflow_ros.evaluation.replay.probes import Prober, other_instruction
from meanflow_ros.evaluation.replay.settings import LIVE, ReplaySettings
from meanflow_ros.evaluation.replay.topics import topics_of
from meanflow_ros.ros.bag_files import Bag
from meanflow_ros.training.episode import Skipped


@dataclass
class BagReport:
    """What is known of a bag beside its episodes.

    seconds, messages: that were read. lost: what could not be read. skipped: (episode, why).
    error: why it could not be replayed at all. inference_s, inferred: time and chunks. urdf: the
    topic or the file of the robot description whose limits were kept, '' for none. node: what a
    node that was played to says in /diagnostics at the end.
    """

    name: str
    seconds: float = 0.0
    messages: int = 0
    distribution: str = ''
    lost: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    error: str = ''
    inference_s: float = 0.0
    inferred: int = 0
    urdf: str = ''
    node: dict[str, str] = field(default_factory=dict)


def replay_bag(path: Path, settings: ReplaySettings, acting, report: BagReport, *,
               progress: Callable[[float], None] = lambda seconds: None,
               done: Callable[[int], bool] = lambda number: False) -> Iterator[EpisodeReplay]:
    """Yield the episodes of a bag; `report` is filled on the way.

    acting: see make_acting. progress: told the seconds of the recording that have been read.
    done: whether the n-th episode is there already. ValueError if the bag has not what the
    policy needs, or nothing of it can be read.
    """
    with Bag(path) as bag:
        report.distribution, report.lost = bag.distribution, bag.lost
        if not bag.topics or bag.start_ns is None:
            raise ValueError(f'{path} is empty: there is no message in it'
                             + (f' ({"; ".join(bag.lost)})' if bag.lost else ''))
        topics, instructions = topics_of(bag, settings)
        described = None if settings.urdf else limits_of_bag(bag, topics.description,
                                                             settings.robot)
        driving = settings.driving(described)
        report.urdf = settings.urdf.removesuffix(NO_URDF) if settings.urdf else (
            topics.description if described else '')
        start_ns, stop_ns = settings.part_of(bag)
        answers = None
        if settings.policy == LIVE:
            answers, report.node = acting.play(bag, topics, start_ns, stop_ns, instructions)
        player = Player(
            bag.name, driving, settings.data, topics, answers=answers,
            limits=settings.limits,
            latency=settings.latency, seed=settings.seed, batch=settings.at_a_time,
            instructions=instructions,
            infer=acting.infer if acting else lambda queue: None,
            settle=acting.settle if acting else lambda: None, prober=_prober(settings, acting),
            wanted=lambda number: not done(number) and (not settings.episodes
                                                        or number in settings.episodes))
        if settings.start_s:
            for raw in bag.messages(topics.latched(), None, start_ns):
                for _ in player.take(raw):
                    pass
        for raw in bag.messages(topics.all(), start_ns, stop_ns):
            report.messages += 1
            seconds = (raw.stamp_ns - start_ns) / NANOSECONDS
            if seconds - report.seconds > 0.5:
                progress(seconds - report.seconds)
                report.seconds = seconds
            yield from _kept(player.take(raw), report)
        yield from _kept(player.end(), report)


def _prober(settings: ReplaySettings, acting) -> Prober | None:
    if settings.policy == LIVE or acting is None or not settings.probe_every_s:
        return None
    swap = other_instruction(settings.known_instructions)
    if settings.swapped_instruction:
        swap = other_instruction([settings.swapped_instruction])
    return Prober(acting, every_s=settings.probe_every_s, seed=settings.seed,
                  noise_seeds=settings.noise_seeds, swap=swap, flow=acting.flow)


def _kept(results: Iterator[EpisodeReplay | Skipped],
          report: BagReport) -> Iterator[EpisodeReplay]:
    for result in results:
        if isinstance(result, Skipped):
            report.skipped.append((result.name, result.reason))
        else:
            yield result
