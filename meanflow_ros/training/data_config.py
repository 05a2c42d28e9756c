"""DataConfig: where a recording keeps what the policy learns from; section `data` of the YAML."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from meanflow_ros.core.contract import RobotSpec, clean_instruction
from meanflow_ros.core.schema import known_or_hint
from meanflow_ros.ros.from_messages import TWIST_FIELDS
from meanflow_ros.ros.streams import IngestLimits

EPISODES = ('topic', 'gaps', 'bag')


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Topics, episodes and instructions; the defaults are those of `record_demonstrations`.

    camera_topics: camera name -> topic (Image or CompressedImage), where it is not
    camera/<name>/image_raw or camera/<name>/image_raw/compressed. state_topic: JointState.
    action_topic: JointTrajectory and JointState are matched by name to the dimensions of the
    action space, Float32MultiArray (or Float64MultiArray) by position, TwistStamped by
    `twist_fields`, one per dimension. gripper_topic: Float32, Float64, Int32 or Bool that gives
    the last dimension, '' if the action topic has it. executed_topic: what the robot was told in
    all dimensions, where that is not the action that is to be learned (demonstrations with a
    disturbed command); prefixes are made of it, '' for the action itself. relative: predict the
    difference to the measured state, for dimensions that are named like a state.
    max_action_gap: longest pause between actions inside an episode, in periods.

    instruction_topic: String. instruction_file: used in its place; a .txt with one instruction,
    or a YAML mapping of recordings or episodes ('bag episode 3') to instructions. It is looked
    for in the recording, beside it, and in the working directory.

    episodes: 'topic' cuts at episode_topic (a DiagnosticStatus that says start, then success or
    failure, or an Int32 that changes, negative between episodes), 'gaps' where pictures or
    actions pause for more than gap_s, 'bag' makes each bag one episode.
    use_sim_time: the recording's time is that of its /clock. max_age_s, max_skew_s: as the
    parameters of the node. max_ages_s: stream (camera/<name>, joint_states) -> its own max_age_s.

    lerobot_images: camera name -> feature, where it is not observation.images.<name>.
    lerobot_by_position: match states and actions by position though their names differ.
    """

    camera_topics: Mapping[str, str] = field(default_factory=dict)
    state_topic: str = 'joint_states'
    action_topic: str = 'action'
    gripper_topic: str = ''
    executed_topic: str = ''
    twist_fields: tuple[str, ...] = TWIST_FIELDS
    relative: bool = False
    max_action_gap: float = 10.0
    instruction_topic: str = 'instruction'
    instruction_file: str = ''
    episodes: str = 'topic'
    episode_topic: str = 'episode'
    gap_s: float = 1.0
    use_sim_time: bool = False
    max_age_s: float = IngestLimits.max_age_s
    max_ages_s: Mapping[str, float] = field(default_factory=dict)
    max_skew_s: float = IngestLimits.max_skew_s
    lerobot_images: Mapping[str, str] = field(default_factory=dict)
    lerobot_state: str = 'observation.state'
    lerobot_action: str = 'action'
    lerobot_by_position: bool = False

    def __post_init__(self):
        if self.episodes not in EPISODES:
            raise ValueError(f'episodes must be one of {", ".join(EPISODES)}, '
                             f'got {self.episodes!r}')
        for name in ('max_action_gap', 'gap_s'):
            if not getattr(self, name) > 0:
                raise ValueError(f'{name} must be above 0, got {getattr(self, name)}')
        for name in self.twist_fields:
            if name not in TWIST_FIELDS:
                raise ValueError(f'twist_fields: unknown field {name!r} '
                                 f'({known_or_hint(name, TWIST_FIELDS)})')
        for name in ('camera_topics', 'lerobot_images'):
            for key, value in getattr(self, name).items():
                if not (isinstance(key, str) and isinstance(value, str) and value):
                    raise ValueError(f'{name} must map camera names to names, '
                                     f'got {key!r}: {value!r}')
        self.limits()

    def limits(self) -> IngestLimits:
        """Return the limits of the ingest; ValueError if they are out of range."""
        return IngestLimits(max_age_s=self.max_age_s, max_ages_s=self.max_ages_s,
                            max_skew_s=self.max_skew_s)

    def relative_to(self, robot: RobotSpec) -> tuple[str, ...]:
        """Return, per action dimension, the state from which its value is counted, or ''.

        ValueError if relative actions are asked for and no dimension is named like a state.
        """
        if not self.relative:
            return ('',) * robot.action_space.size
        names = tuple(name if name in robot.state_names else ''
                      for name in robot.action_space.dimensions)
        if not any(names):
            raise ValueError(f'relative: no action dimension is named like a state: dimensions '
                             f'{list(robot.action_space.dimensions)}, '
                             f'states {list(robot.state_names)}')
        return names

    def require_cameras(self, robot: RobotSpec) -> None:
        """ValueError if a camera is named that the robot has not."""
        for name in ('camera_topics', 'lerobot_images'):
            for camera in getattr(self, name):
                if camera not in robot.camera_names:
                    raise ValueError(f'{name}: the robot has no camera {camera!r} '
                                     f'({known_or_hint(camera, robot.camera_names)})')

    def instructions_of(self, recording: Path) -> Instructions | None:
        """Read the instruction file for a recording, None if topics give the instructions."""
        if not self.instruction_file:
            return None
        return Instructions(find_instruction_file(self.instruction_file, recording))


def find_instruction_file(name: str, recording: Path) -> Path:
    """Return the instruction file for a recording; ValueError lists where it was looked for."""
    places = [recording / name, recording.parent / name, Path(name)]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f'instruction_file: there is none at '
                     f'{", ".join(dict.fromkeys(str(place) for place in places))}')


class Instructions:
    """The instruction of each episode, from a file; see DataConfig."""

    def __init__(self, path: Path):
        self._path = path
        try:
            text = path.read_text(encoding='utf-8')
            self._texts = (functools.partial(_always, clean_instruction(text))
                           if path.suffix == '.txt' else _mapping(yaml.safe_load(text)))
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f'instruction file {path}: {error}') from None

    def of(self, recording: str, episode: str) -> str:
        """Return the instruction of an episode; ValueError if the file has none."""
        text = self._texts(episode) or self._texts(recording)
        if text is None:
            raise ValueError(f'{self._path} has no instruction for {episode!r} or {recording!r}')
        return text


def _always(text: str, name: str) -> str:
    return text


def _mapping(document):
    if not isinstance(document, Mapping) or not all(
            isinstance(text, str) for text in document.values()):
        raise ValueError('it must map names of recordings or episodes to instructions')
    return {str(name): clean_instruction(text) for name, text in document.items()}.get
