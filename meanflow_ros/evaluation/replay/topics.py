"""Which topic of a bag is what to the policy: names, remappings, types, and clear refusals."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.ros.bag import absolute_topic
from meanflow_ros.ros.bag_files import Channel, topic_list
from meanflow_ros.ros.from_messages import ActionReader, action_reader, scalar_action
from meanflow_ros.ros.ingest import COMPRESSED_IMAGE, IMAGE
from meanflow_ros.ros.motion_config import measured_names
from meanflow_ros.training.data_config import DataConfig, Instructions

CLOCK, STRING, JOINT_STATE = 'rosgraph_msgs/msg/Clock', 'std_msgs/msg/String', \
    'sensor_msgs/msg/JointState'
STATUS, INT32 = 'diagnostic_msgs/msg/DiagnosticStatus', 'std_msgs/msg/Int32'
SCALARS = tuple(f'std_msgs/msg/{name}' for name in ('Float32', 'Float64', 'Int32', 'Bool'))


@dataclass(frozen=True, kw_only=True)
class Topics:
    """The topics of one bag by their role, each with its type in `types`.

    cameras: camera name -> topic. actions: the action topic, then the gripper's if there is one,
    each with the reader of its messages. description: of the robot, read before the rest. Roles
    that nothing fills are ''.
    """

    types: Mapping[str, str]
    cameras: Mapping[str, str]
    actions: tuple[tuple[str, ActionReader], ...]
    state: str = ''
    instruction: str = ''
    episode: str = ''
    clock: str = ''
    description: str = ''

    def all(self) -> set[str]:
        """Return every topic that is read."""
        return {*self.cameras.values(), *(topic for topic, _ in self.actions), *self.latched()} | (
            {self.state} - {''})

    def latched(self) -> set[str]:
        """Return the topics whose last message still counts when the replay starts later."""
        held = {self.instruction, self.episode, self.clock}
        return (held | {topic for topic, _ in self.actions[1:]}) - {''}


def parse_remappings(texts) -> dict[str, str]:
    """Read 'camera/static/image_raw:=/zed/image' and its like; ValueError for anything else."""
    remaps = {}
    for text in texts:
        name, arrow, topic = text.partition(':=')
        if not (arrow and name.strip('/ ') and topic.strip('/ ')):
            raise ValueError(f'a remapping is written NAME:=TOPIC, got {text!r}')
        remaps[absolute_topic(name.strip())] = absolute_topic(topic.strip())
    return remaps


def find_topics(found: Mapping[str, Channel], robot: RobotSpec, data: DataConfig,
                remaps: Mapping[str, str], *, told: bool) -> Topics:
    """Give every role its topic.

    found: what the bag has. remaps: the policy's name of a topic -> the bag's.
    told: the instruction comes from elsewhere. ValueError names the topic that is missing, with
    the nearest one, all that are there and their types, or the one of a wrong type.
    """
    data.require_cameras(robot)
    search = _Search(found, remaps)
    dimensions = robot.action_space.dimensions
    action = search.find('action_topic', data.action_topic)
    own = dimensions[:-1] if data.gripper_topic else dimensions
    try:
        actions = [(action, action_reader(found[action].type, own, data.twist_fields))]
    except ValueError as error:
        raise ValueError(f'{action} (action_topic): {error}') from None
    if data.gripper_topic:
        actions.append((search.find('gripper_topic', data.gripper_topic, *SCALARS),
                        scalar_action))
    topics = Topics(
        types={topic: channel.type for topic, channel in found.items()},
        cameras={camera: search.camera(camera, data.camera_topics.get(camera))
                 for camera in robot.camera_names},
        actions=tuple(actions),
        state=(search.find('state_topic', data.state_topic, JOINT_STATE)
               if robot.state_names else ''),
        instruction='' if told else search.find('instruction_topic', data.instruction_topic,
                                                STRING),
        episode=(search.find('episode_topic', data.episode_topic, STATUS, INT32)
                 if data.episodes == 'topic' else ''),
        clock=search.find('use_sim_time', '/clock', CLOCK) if data.use_sim_time else '',
        description=search.latched_if_there('robot_description', STRING)
        if measured_names(robot) else '')
    search.require_used()
    return topics


def topics_of(bag, settings) -> tuple[Topics, Instructions | str | None]:
    """Return the topics of an open bag, and its instructions where no topic has them."""
    told = settings.instruction or settings.data.instructions_of(bag.path)
    return find_topics(bag.topics, settings.robot, settings.data, settings.remaps,
                       told=told is not None), told


class _Search:
    def __init__(self, found: Mapping[str, Channel], remaps: Mapping[str, str]):
        self._found = {absolute_topic(topic): channel for topic, channel in found.items()}
        self._remaps, self._used = remaps, set()

    def find(self, field: str, name: str, *types: str) -> str:
        """Return the topic for `name`; ValueError if it is missing or of another type."""
        topic = self._resolved(name)
        channel = self._found.get(topic)
        if channel is None:
            close = self._nearest(topic, types)
            raise ValueError(
                f'the bag has no topic {topic} ({field})'
                + (f', did you mean {close}? --topic {name}:={close}' if close else '')
                + f'; it has {topic_list(self._found)}')
        if types and channel.type not in types:
            raise ValueError(f'{topic} ({field}) holds {channel.type}, '
                             f'expected {" or ".join(types)}')
        return channel.topic

    def latched_if_there(self, name: str, *types: str) -> str:
        """Return the topic for `name`, '' if the bag has none and no remapping asks for one.

        One of another type is none: a node would not hear it.
        """
        channel = self._found.get(self._resolved(name))
        asked = absolute_topic(name) in self._remaps or (channel and channel.type in types)
        return self.find(name, name, *types) if asked else ''

    def _nearest(self, topic: str, types: tuple[str, ...]) -> str:
        """Return the topic whose name is nearest; one that holds the whole word comes first."""
        usable = [each for each, channel in self._found.items()
                  if channel.type in types or not types]
        word = topic.rsplit('/', 1)[-1]
        holding = sorted((each for each in usable if word in each), key=len)
        return next(iter(holding + difflib.get_close_matches(topic, usable, n=1, cutoff=0.4)), '')

    def camera(self, camera: str, given: str | None) -> str:
        raw = given or f'camera/{camera}/image_raw'
        compressed = f'{raw}/compressed'
        if (given is None and self._resolved(raw) not in self._found
                and self._resolved(compressed) in self._found):
            self._used.add(absolute_topic(raw))
            raw = compressed
        return self.find(f'camera {camera!r}', raw, IMAGE, COMPRESSED_IMAGE)

    def _resolved(self, name: str) -> str:
        name = absolute_topic(name)
        if name in self._remaps:
            self._used.add(name)
        return self._remaps.get(name, name)

    def require_used(self) -> None:
        """ValueError for a remapping of a name that the policy does not have."""
        for name in self._remaps:
            if name not in self._used:
                raise ValueError(f'--topic {name}:=...: nothing is read from {name}')
