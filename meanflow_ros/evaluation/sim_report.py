"""report.html of a closed loop: success per task, and a grid of videos of episodes run again.

The simulator gives the same bits for the same seed, so an episode that is shown is run again, in
this process, and not recorded while many run at a time.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np


from meanflow_ros.evaluation.closed_loop import run_episode
from meanflow_ros.evaluation.episode_worker import Job
from meanflow_ros.evaluation.episodes import EpisodeResult, success_interval, summarize
from meanflow_ros.evaluation.replay.summary import environment
from meanflow_ros.evaluation.replay.verdict import GOOD, LOOK, STOP
from meanflow_ros.evaluation.report import Media, write_page
from meanflow_ros.sim.metaworld_robot import PERIOD_S, MetaWorldRobot

SIDE = 176                  # pixels of a video
MOST_VIDEOS = 60


class Filming:
    """An ActBatch that keeps what the first camera shows; for one episode at a time."""

    def __init__(self, act):
        self._act, self.robot = act, act.robot
        self.frames: list[np.ndarray] = []

    def __call__(self, observations, *rest):
        """Return the chunk of each observation."""
        image = observations[0].images[self.robot.camera_names[0]]
        self.frames.append(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        return self._act(observations, *rest)


def write_sim_report(path: Path, results: Sequence[EpisodeResult], job_of: Callable[..., Job],
                     act, *, checkpoint: str, settings: dict, videos: int,
                     camera_every: int) -> None:
    """Write report.html.

    job_of(result): the job that gave it. act: the policy. videos: of each task; failures first.
    """
    summary, media = summarize(list(results)), Media()
    shown = _shown(results, videos)
    document = {'checkpoint': checkpoint, 'summary': summary, 'settings': settings,
                'episodes': [{name: value for name, value in asdict(result).items()
                              if name != 'smoothness'} for result in results],
                'verdict': verdict(results), 'environment': environment()}
    for row in document['episodes']:
        for key in ('latency_p50_ms', 'latency_p99_ms'):
            row[key] = row[key] if np.isfinite(row[key]) else None
    for row in summary.values():
        if not np.isfinite(row['latency_p50_ms']):
            row['latency_p50_ms'] = None
    films, camera = [], act.robot.cameras[0]
    robot = MetaWorldRobot(image_width=camera.width, image_height=camera.height)
    for result in shown:
        filming = Filming(act)
        again = run_episode(filming, robot, job_of(result), camera_every=camera_every)
        films.append({'title': f'{result.task}, seed {result.seed}: “{result.instruction}”',
                      'success': bool(again.success),
                      'media': media.add(encoded(filming.frames, camera_every * PERIOD_S))})
    write_page(path, 'Closed-loop report', {'kind': 'closed_loop', 'document': document,
                                            'videos': films, 'media': media.held})
    robot.close()



def _shown(results: Sequence[EpisodeResult], videos: int) -> list[EpisodeResult]:
    """Return the episodes of each task to show: failures first, then by seed."""
    shown = []
    for task in dict.fromkeys(result.task for result in results):
        own = sorted((result for result in results if result.task == task),
                     key=lambda result: (result.success, result.seed))
        shown += own[:videos]
    return shown[:MOST_VIDEOS]


def verdict(results: Sequence[EpisodeResult]) -> dict:
    """Return the level, headline and findings of a closed loop."""
    successes = sum(result.success for result in results)
    low, high = success_interval(successes, len(results))
    summary = summarize(list(results))
    weak = {task: row for task, row in summary.items() if row['rate'] < 0.5}
    starved = sum(result.starved_steps for result in results)
    level = GOOD if low >= 0.8 else LOOK if high > 0.5 else STOP
    findings = [{'level': level, 'rests_on': 'summary',
                 'text': f'{successes} of {len(results)} episodes succeeded '
                         f'(95 % interval {low:.0%} to {high:.0%}).'}]
    if weak:
        findings.append({'level': LOOK, 'rests_on': 'summary', 'text':
                         'Fewer than half succeed in ' + ', '.join(
                             f'{task} ({row["successes"]}/{row["episodes"]})'
                             for task, row in weak.items()) + '.'})
    if starved:
        steps = sum(result.steps for result in results)
        findings.append({'level': LOOK, 'rests_on': 'episodes', 'text':
                         f'For {starved} of {steps} control steps no action was due.'})
    return {'level': level, 'headline': f'{successes / len(results):.0%} of the episodes succeed.',
            'findings': findings, 'limits': 'What holds in this simulator, on these seeds; a real '
            'robot is another matter.'}


def encoded(frames: Sequence[np.ndarray], period_s: float) -> bytes:
    """Return frames (SIDE, SIDE, 3) RGB as an H.264 MP4, in the time of the simulation."""
    buffer = io.BytesIO()
    with av.open(buffer, 'w', format='mp4') as container:
        stream = container.add_stream('libx264', rate=Fraction(1 / period_s).limit_denominator(
            1000), options={'crf': '28', 'preset': 'veryfast'})
        stream.width = stream.height = SIDE
        stream.pix_fmt = 'yuv420p'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        container.mux(stream.encode())
    return buffer.getvalue()
