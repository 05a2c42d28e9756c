"""rosbag2 -> episodes, through the ingest of the live node.

The messages of a bag go to the ingest in the order and at the times of their recording. Whenever
the live node would look for an observation, one is looked for here, and the first of each stamp
is taken, as the node does. What the node could not use, training does not see either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, Observation, RobotSpec
from meanflow_ros.ros.bag import absolute_topic, read_messages, topic_types
from meanflow_ros.ros.from_messages import action_reader, scalar_action, time_ns
from meanflow_ros.ros.ingest import COMPRESSED_IMAGE, IMAGE, Ingest
from meanflow_ros.ros.streams import NoObservation
from meanflow_ros.training.data_config import DataConfig
from meanflow_ros.training.episode import (
    ActionStream, Episode, Skipped, due_times, make_relative, pair, resize_picture,
    sample_actions)

SCALARS = tuple(f'std_msgs/msg/{name}' for name in ('Float32', 'Float64', 'Int32', 'Bool'))
STATUS, INT32 = 'diagnostic_msgs/msg/DiagnosticStatus', 'std_msgs/msg/Int32'
CLOCK = '/clock'
BEFORE_FIRST_ACTION_S = 1.0
Keep = Callable[[Mapping[str, np.ndarray]], object]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An observation whose pictures are whatever `keep` made of them; state: (P,) or None."""

    stamp_ns: int
    pictures: object
    instruction: str
    state: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class RecordedEpisode:
    """The observations of an episode and the streams of its actions, as they were recorded.

    actions: their dimensions follow one another; the first is the action topic. executed: what
    the robot was told, None where that is not recorded apart.
    """

    name: str
    observations: tuple[Seen, ...]
    actions: tuple[ActionStream, ...]
    executed: ActionStream | None = None


def read_bag(path: Path, robot: RobotSpec, data: DataConfig,
             keep: Keep) -> Iterator[RecordedEpisode | Skipped]:
    """Yield the episodes of a rosbag2 in their order; memory holds one at a time.

    keep: turns the pictures of an observation, camera name -> (H, W, 3) uint8, into what is held.
    """
    cutter = None
    try:
        cutter = _Cutter(path, robot, data, keep)
        for topic, stamp_ns, message in read_messages(path, cutter.topics):
            yield from cutter.take(topic, stamp_ns, message)
        yield from cutter.end()
    except ValueError as error:
        yield Skipped(name=(cutter and cutter.episode) or path.name, reason=str(error))


def read_bag_pairs(path: Path, robot: RobotSpec, data: DataConfig,
                   size: int) -> Iterator[Episode | Skipped]:
    """Yield the episodes of a rosbag2 as training pairs, pictures size x size."""
    def keep(images: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.stack([resize_picture(images[name], size) for name in robot.camera_names])

    for recorded in read_bag(path, robot, data, keep):
        if isinstance(recorded, Skipped):
            yield recorded
            continue
        try:
            yield _pairs(recorded, robot, data)
        except ValueError as error:
            yield Skipped(name=recorded.name, reason=str(error))


def _pairs(recorded: RecordedEpisode, robot: RobotSpec, data: DataConfig) -> Episode:
    stamps_ns = np.array([seen.stamp_ns for seen in recorded.observations], np.int64)
    rows, chunks, mask = pair(stamps_ns, recorded.actions, robot)
    used = [recorded.observations[row] for row in rows]
    states = np.stack([np.zeros(0) if seen.state is None else seen.state for seen in used])
    executed = chunks
    if recorded.executed is not None:
        executed, _, _ = sample_actions([recorded.executed], due_times(stamps_ns[rows], robot),
                                        robot)
    relative = data.relative_to(robot), robot.state_names
    return Episode(
        name=recorded.name, instructions=tuple(seen.instruction for seen in used),
        pictures=np.stack([seen.pictures for seen in used]), states=states, mask=mask,
        chunks=make_relative(chunks, states, *relative),
        executed=make_relative(executed, states, *relative))


class _Cutter:
    """Feeds one bag's messages to the ingest and cuts the result into episodes.

    episode: the name of the one that is running, None between episodes.
    """

    def __init__(self, path: Path, robot: RobotSpec, data: DataConfig, keep: Keep):
        self._name, self._robot, self._data, self._keep = path.name, robot, data, keep
        self._instructions = data.instructions_of(path)
        self._ingest = Ingest(robot, limits=data.limits())
        self._handlers: dict[str, list[Callable]] = defaultdict(list)
        self._types = topic_types(path)
        self._connect()
        self.episode: str | None = None
        self._count = 0
        self._clock_ns = 0
        self._mark: int | None = None
        self._gripper: tuple | None = None
        self._clear()

    @property
    def topics(self) -> list[str]:
        """Return the topics that must be read."""
        return list(self._handlers)

    # Topics

    def _connect(self) -> None:
        robot, data = self._robot, self._data
        data.require_cameras(robot)
        if data.use_sim_time:
            self._on('use_sim_time', CLOCK, {'rosgraph_msgs/msg/Clock': self._on_clock})
        if data.episodes == 'topic':
            self._on('episode_topic', data.episode_topic,
                     {STATUS: self._on_status, INT32: self._on_index})
        if self._instructions is None:
            self._on('instruction_topic', data.instruction_topic,
                     {'std_msgs/msg/String': self._on_instruction})
        if robot.state_names:
            self._on('state_topic', data.state_topic,
                     {'sensor_msgs/msg/JointState': self._on_joint_state})
        dimensions = robot.action_space.dimensions
        if data.gripper_topic:
            dimensions = dimensions[:-1]
        kind = self._on('action_topic', data.action_topic, None, self._on_action)
        self._readers = [action_reader(kind, dimensions, data.twist_fields)]
        if data.gripper_topic:
            self._on('gripper_topic', data.gripper_topic,
                     dict.fromkeys(SCALARS, self._on_gripper))
            self._readers.append(scalar_action)
        if data.executed_topic:
            kind = self._on('executed_topic', data.executed_topic, None, self._on_executed)
            self._executed_reader = action_reader(kind, robot.action_space.dimensions,
                                                  data.twist_fields)
        for camera in robot.camera_names:
            self._on('camera_topics', self._camera_topic(camera), {
                IMAGE: self._on_picture(camera, self._ingest.add_image),
                COMPRESSED_IMAGE: self._on_picture(camera, self._ingest.add_compressed_image)})

    def _on(self, field: str, topic: str, by_type: Mapping[str, Callable] | None,
            for_all: Callable | None = None) -> str:
        """Give a topic to the handler of its type; return the type."""
        topic = absolute_topic(topic)
        kind = self._types.get(topic)
        if kind is None:
            raise ValueError(f'the bag has no topic {topic} ({field}), it has '
                             f'{", ".join(self._types) or "none"}')
        handler = for_all or by_type.get(kind)
        if handler is None:
            raise ValueError(f'{topic} ({field}) holds {kind}, expected {" or ".join(by_type)}')
        self._handlers[topic].append(handler)
        return kind

    def _camera_topic(self, camera: str) -> str:
        raw = f'camera/{camera}/image_raw'
        if camera in self._data.camera_topics:
            return self._data.camera_topics[camera]
        has_raw = absolute_topic(raw) in self._types
        has_compressed = absolute_topic(f'{raw}/compressed') in self._types
        return f'{raw}/compressed' if has_compressed and not has_raw else raw

    # Messages: every handler takes (message, now_ns)

    def take(self, topic: str, received_ns: int,
             message) -> Iterator[RecordedEpisode | Skipped]:
        """Take a message and yield the episodes that it ends."""
        now_ns = self._clock_ns if self._data.use_sim_time else received_ns
        jump_s = self._ingest.clock(now_ns)
        if jump_s is not None and self.episode:
            self._broken = f'the clock jumped back by {-jump_s:.3f} s'
        for handle in self._handlers[absolute_topic(topic)]:
            if now_ns > 0 or handle in (self._on_clock, self._on_instruction):
                yield from handle(message, now_ns) or ()

    def end(self) -> Iterator[RecordedEpisode | Skipped]:
        """Yield what the end of the bag ends."""
        if self.episode and self._data.episodes == 'topic' and self._mark is None:
            self._broken = 'the bag ends before the episode does'
        yield from self._stop()
        if not self._count:
            yield Skipped(name=self._name, reason=f'no episode begins in it (episodes: '
                                                  f'{self._data.episodes})')

    def _on_clock(self, message, now_ns: int) -> None:
        self._clock_ns = time_ns(message.clock)

    def _on_status(self, message, now_ns: int) -> Iterator[RecordedEpisode | Skipped]:
        if message.message == 'start':
            if self.episode:
                self._broken = 'the next one starts before it has ended'
            yield from self._stop()
            self._start({pair.key: pair.value for pair in message.values}.get('episode'))
        elif self.episode:
            if message.message != 'success':
                self._broken = f'ended with {message.message!r}'
            yield from self._stop()

    def _on_index(self, message, now_ns: int) -> Iterator[RecordedEpisode | Skipped]:
        if message.data != self._mark:
            yield from self._stop()
            self._mark = message.data
            if message.data >= 0:
                self._start(message.data)

    def _on_instruction(self, message, now_ns: int) -> None:
        try:
            self._ingest.set_instruction(message.data)
        except ValueError:
            pass  # the ingest keeps the reason and gives no observation until a good one comes

    def _on_joint_state(self, message, now_ns: int) -> None:
        if self.episode:
            self._store(self._ingest.add_joint_state, message, now_ns=now_ns)

    def _on_picture(self, camera: str, add: Callable) -> Callable:
        def handle(message, now_ns: int) -> Iterator[RecordedEpisode | Skipped]:
            yield from self._cut_at_gap(camera, now_ns)
            if self.episode:
                self._look = True
                self._store(add, camera, message, now_ns=now_ns)
        return handle

    def _on_action(self, message, now_ns: int) -> Iterator[RecordedEpisode | Skipped]:
        yield from self._cut_at_gap('', now_ns)
        if self.episode:
            self._add_action(0, message, now_ns)

    def _on_executed(self, message, now_ns: int) -> None:
        if self.episode:
            try:
                self._executed.add(self._executed_reader(message, now_ns))
            except ValueError as error:
                self._broken = self._broken or str(error)

    def _on_gripper(self, message, now_ns: int) -> None:
        self._gripper = message, now_ns
        if self.episode:
            self._add_action(1, message, now_ns)

    def _add_action(self, index: int, message, now_ns: int) -> None:
        try:
            self._actions[index].add(self._readers[index](message, now_ns))
        except ValueError as error:
            self._broken = self._broken or str(error)

    def _store(self, add: Callable, *arguments, now_ns: int) -> None:
        try:
            add(*arguments, now_ns=now_ns)
        except ValueError:
            pass  # the ingest keeps the reason and gives no observation until it recovers
        if self._look:
            self._observe(now_ns)

    def _observe(self, now_ns: int) -> None:
        """Look for a new observation; a joint state alone does not make one."""
        try:
            seen = self._ingest.observe(now_ns=now_ns)
        except NoObservation as reason:
            self._missing = str(reason)
            return
        self._look = False
        newest_ns = self._observations[-1].stamp_ns if self._observations else None
        if (newest_ns is None or seen.stamp_ns > newest_ns) and not self._paused(now_ns):
            self._observations.append(self._kept(seen))
            self._forget_before_first_action(seen.stamp_ns)

    def _kept(self, seen: Observation) -> Seen:
        return Seen(stamp_ns=seen.stamp_ns, pictures=self._keep(seen.images),
                    instruction=seen.instruction, state=seen.state)

    def _forget_before_first_action(self, stamp_ns: int) -> None:
        """Drop observations for which no action can come any more."""
        if not len(self._actions[0]):
            lead_s = BEFORE_FIRST_ACTION_S + self._robot.first_step * self._robot.period_s
            while self._observations[0].stamp_ns < stamp_ns - round(lead_s * NANOSECONDS):
                self._observations.pop(0)

    # Episodes

    def _cut_at_gap(self, stream: str, now_ns: int) -> Iterator[RecordedEpisode | Skipped]:
        """Note that a camera or the action topic ('') goes on; start a new episode if due."""
        if self._data.episodes == 'gaps' and self._pause_ns(stream, now_ns) > self._gap_ns():
            yield from self._stop()
            self._heard_ns.clear()
        if self._data.episodes != 'topic' and not self.episode:
            self._start(None if self._data.episodes == 'gaps' else '')
        self._heard_ns[stream] = now_ns

    def _pause_ns(self, stream: str, now_ns: int) -> int:
        return now_ns - self._heard_ns.get(stream, now_ns)

    def _gap_ns(self) -> int:
        return round(self._data.gap_s * NANOSECONDS)

    def _paused(self, now_ns: int) -> bool:
        """Whether the actions have paused for so long that the next is another episode's."""
        return self._data.episodes == 'gaps' and self._pause_ns('', now_ns) > self._gap_ns()

    def _start(self, number: object) -> None:
        """Begin an episode; number: its own, None to count, '' where it is the only one."""
        self._clear()
        self._ingest.reset()
        number = self._count if number is None else number
        self._count += 1
        self.episode = self._name if number == '' else f'{self._name} episode {number}'
        if self._gripper:
            self._add_action(1, *self._gripper)  # a command holds until the next one
        if self._instructions is not None:
            try:
                self._ingest.set_instruction(self._instructions.of(self._name, self.episode))
            except ValueError as error:
                self._broken = str(error)

    def _stop(self) -> Iterator[RecordedEpisode | Skipped]:
        if not self.episode:
            return
        name, self.episode = self.episode, None
        try:
            if self._broken:
                raise ValueError(self._broken)
            if not self._observations:
                raise ValueError(f'there is no observation '
                                 f'({self._missing or "no picture was received"})')
            longest_s = self._data.max_action_gap * self._robot.period_s
            self._actions[0].require_steady(round(longest_s * NANOSECONDS))
            if not all(len(stream) for stream in self._actions):
                raise ValueError('there is no message on the gripper topic')
            if self._data.executed_topic and not len(self._executed):
                raise ValueError('there is no message on the topic of executed actions')
        except ValueError as error:
            self._clear()
            yield Skipped(name=name, reason=str(error))
            return
        recorded = RecordedEpisode(name=name, observations=tuple(self._observations),
                                   actions=tuple(self._actions),
                                   executed=self._executed if self._data.executed_topic else None)
        self._clear()
        yield recorded

    def _clear(self) -> None:
        self._observations: list[Seen] = []
        self._actions = [ActionStream() for _ in self._readers]
        self._executed = ActionStream()
        self._broken: str | None = None
        self._missing: str | None = None
        self._look = False
        self._heard_ns: dict[str, int] = {}
