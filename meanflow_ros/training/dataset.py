"""Recordings -> training pairs, through the ingest of the live node.

A demonstration bag holds the node's input topics, an `action` topic (JointTrajectory whose
stamp is the time its command was due) and an `episode` topic (DiagnosticStatus: 'start', then
'success' or 'failure'). Failed and broken episodes are skipped by name and counted.
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from meanflow_ros.core.contract import NANOSECONDS, Observation, RobotSpec
from meanflow_ros.ros import from_messages
from meanflow_ros.ros.bag import read_messages
from meanflow_ros.ros.ingest import Ingest, NoObservation

log = logging.getLogger('meanflow_ros.training')


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration: N observations and the actions (N, A) that were due at their stamps.

    pictures: (N, C, S, S, 3) uint8. states: (N, P).
    """

    name: str
    instruction: str
    pictures: np.ndarray
    states: np.ndarray
    actions: np.ndarray


def find_bags(directory: Path | str) -> list[Path]:
    """Return every rosbag2 directory in or below `directory`; ValueError if there is none."""
    bags = sorted(path.parent for path in Path(directory).rglob('metadata.yaml'))
    if not bags:
        raise ValueError(f'no rosbag2 (a directory with metadata.yaml) in or below {directory}')
    return bags


def resize_picture(picture: np.ndarray, size: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (size, size, 3) exactly as the encoder does at inference."""
    if picture.shape[:2] == (size, size):
        return picture
    pixels = torch.tensor(picture).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (size, size), mode='bilinear', antialias=True,
                           align_corners=False)
    return pixels[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


class _Recorder:
    """Feeds one bag's messages to the ingest and cuts the result into episodes."""

    def __init__(self, robot: RobotSpec, size: int, name: str):
        self._robot, self._size, self._name = robot, size, name
        self._ingest = Ingest(robot)
        self._observations: dict[int, Observation] = {}
        self._actions: dict[int, np.ndarray] = {}
        self.episodes: list[Episode] = []
        self.skipped: list[str] = []

    def take(self, topic: str, stamp_ns: int, message) -> None:
        topic = topic.lstrip('/')
        if topic.startswith('camera/'):
            key = topic.split('/')[1]
            if key in self._robot.camera_names:
                add = (self._ingest.add_compressed_image if topic.endswith('compressed')
                       else self._ingest.add_image)
                add(key, message, now_ns=stamp_ns)
                self._observe(stamp_ns)
        elif topic == 'joint_states':
            self._ingest.add_joint_state(message, now_ns=stamp_ns)
        elif topic == 'instruction':
            self._ingest.set_instruction(message.data)
        elif topic == 'action':
            timed = from_messages.timed_actions(message, self._robot.action_space.dimensions)
            self._actions[timed.stamp_ns] = timed.actions[0]
        elif topic == 'episode':
            self._episode(message)

    def _observe(self, now_ns: int) -> None:
        try:
            observation = self._ingest.observe(now_ns=now_ns)
        except NoObservation:
            return
        small = {key: resize_picture(image, self._size)
                 for key, image in observation.images.items()}
        self._observations[observation.stamp_ns] = Observation(
            stamp_ns=observation.stamp_ns, images=small, state=observation.state,
            instruction=observation.instruction)

    def _episode(self, message) -> None:
        if message.message == 'start':
            self._observations.clear()
            self._actions.clear()
            self._ingest.reset()
            return
        number = {pair.key: pair.value for pair in message.values}.get('episode', '?')
        name = f'{self._name} episode {number}'
        if message.message != 'success':
            self.skipped.append(f'{name}: ended with {message.message!r}')
            return
        try:
            self.episodes.append(self._cut(name))
        except ValueError as error:
            self.skipped.append(f'{name}: {error}')

    def _cut(self, name: str) -> Episode:
        step_ns = round(self._robot.period_s * NANOSECONDS)
        stamps = sorted(self._observations.keys() & self._actions.keys())
        if len(stamps) < 2:
            raise ValueError(f'{len(self._observations)} observations and {len(self._actions)} '
                             f'actions have fewer than 2 stamps in common')
        if np.abs(np.diff(stamps) - step_ns).max() > 0.1 * step_ns:
            raise ValueError(f'observations are not {self._robot.period_s:g} s apart')
        seen = [self._observations[stamp] for stamp in stamps]
        return Episode(
            name=name, instruction=seen[-1].instruction,
            pictures=np.stack([[o.images[key] for key in self._robot.camera_names]
                               for o in seen]),
            states=np.stack([np.zeros(0) if o.state is None else o.state for o in seen]),
            actions=np.stack([self._actions[stamp] for stamp in stamps]))


def read_bag(path: Path, robot: RobotSpec, size: int) -> tuple[list[Episode], list[str]]:
    """Return the episodes of one bag and the names and reasons of those skipped."""
    torch.set_num_threads(1)
    recorder = _Recorder(robot, size, path.name)
    try:
        for topic, stamp_ns, message in read_messages(path):
            recorder.take(topic, stamp_ns, message)
    except ValueError as error:
        recorder.skipped.append(f'{path.name}: {error}')
    return recorder.episodes, recorder.skipped


def read_bags(paths: Sequence[Path], robot: RobotSpec, size: int,
              workers: int) -> list[Episode]:
    """Read many bags with `workers` processes; ValueError lists why when nothing is usable."""
    episodes, skipped = [], []
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        jobs = [pool.submit(read_bag, path, robot, size) for path in paths]
        for job in tqdm(concurrent.futures.as_completed(jobs), 'reading bags', len(jobs)):
            some, reasons = job.result()
            episodes += some
            skipped += reasons
    for reason in skipped:
        log.warning('skipped %s', reason)
    if not episodes:
        raise ValueError('no usable episode: ' + '; '.join(skipped[:10]))
    log.info('%d episodes read, %d skipped', len(episodes), len(skipped))
    return sorted(episodes, key=lambda e: e.name)


class ChunkDataset:
    """Every observation of every episode with the chunk that follows it, held on one device."""

    def __init__(self, episodes: Sequence[Episode], robot: RobotSpec, device: torch.device):
        lengths = np.array([len(e.actions) for e in episodes])
        ends = np.repeat(np.cumsum(lengths), lengths)
        self.instructions = [e.instruction for e in episodes for _ in range(len(e.actions))]
        self.states = np.concatenate([e.states for e in episodes])
        self.actions = np.concatenate([e.actions for e in episodes])
        self.pictures = torch.from_numpy(np.concatenate([e.pictures for e in episodes])).to(device)
        steps = np.arange(len(ends))[:, None] + robot.first_step + np.arange(robot.horizon)
        self.mask = steps < ends[:, None]                          # (N, T)
        self.chunk_rows = np.minimum(steps, ends[:, None] - 1)     # (N, T)

    def __len__(self) -> int:
        return len(self.actions)


def augment(pixels: torch.Tensor, *, shift: float, colour: float) -> torch.Tensor:
    """Shift each picture by up to `shift` pixels and change its brightness and contrast.

    pixels: (B, C, 3, S, S), 0 .. 255. Every camera of every sample gets its own change.
    """
    batch, cameras, _, size, _ = pixels.shape
    count, device = batch * cameras, pixels.device
    offset = (torch.rand(count, 2, device=device) * 2 - 1) * 2 * shift / size
    affine = torch.eye(2, 3, device=device).repeat(count, 1, 1)
    affine[:, :, 2] = offset
    grid = F.affine_grid(affine, [count, 3, size, size], align_corners=False)
    moved = F.grid_sample(pixels.flatten(0, 1), grid, mode='bilinear', padding_mode='border',
                          align_corners=False)
    gain = 1 + (torch.rand(count, 3, 1, 1, device=device) * 2 - 1) * colour
    bias = (torch.rand(count, 1, 1, 1, device=device) * 2 - 1) * colour * 128
    return (moved * gain + bias).clamp(0, 255).view_as(pixels)
