"""What a run leaves to look at: a bag, a video with the predicted chunks, a plot of the motion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import av
import cv2
import matplotlib
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from meanflow_ros.core.contract import TimedActions
from meanflow_ros.ros import from_messages
from meanflow_ros.ros.bag import BagWriter
from meanflow_ros.sim.metaworld_robot import ACTION_SPACE, PERIOD_S
from meanflow_ros.sim.scene import CAMERAS, project

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

PICTURE = 448                      # side of the static picture in the video, pixels
FRAMES_PER_S = 10
END_FRAMES = 8                     # how long the end of an episode stays
MOVING = 3                         # the first dimensions of the action are the tool's velocity


@dataclass
class EpisodeTrace:
    """Everything of one episode that is drawn, by stamp (ns)."""

    task: str
    pictures: dict[str, dict[int, np.ndarray]] = field(
        default_factory=lambda: {camera: {} for camera in CAMERAS})
    tool: dict[int, np.ndarray] = field(default_factory=dict)
    chunks: dict[int, TimedActions] = field(default_factory=dict)
    instruction: str = ''
    outcome: str = ''

    def predicted_path(self, stamp_ns: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return times (N,) s and tool positions (N, 3) m that the chunk of `stamp_ns` predicts.

        The commands are velocities: the path is their sum from where the tool was.
        """
        chunk, start = self.chunks.get(stamp_ns), self.tool.get(stamp_ns)
        if chunk is None or start is None:
            return None
        steps = np.vstack([np.zeros(MOVING), chunk.actions[:, :MOVING] * PERIOD_S])
        times = np.append(chunk.due_ns, chunk.due_ns[-1] + round(PERIOD_S * 1e9)) / 1e9
        return times, start + np.cumsum(steps, axis=0)


class RunRecorder:
    """Subscribes to every topic of a run: writes them to a bag and keeps what is drawn."""

    def __init__(self, node: Node, bag: BagWriter):
        self._node, self._bag = node, bag
        self.episodes: list[EpisodeTrace] = []
        self._instruction = ''
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        topics = [('joint_states', JointState, 50), ('tool_pose', PoseStamped, 50),
                  ('instruction', String, latched), ('episode', DiagnosticStatus, 10),
                  ('action_chunk', JointTrajectory, 50), ('/diagnostics', DiagnosticArray, 10)]
        topics += [(f'camera/{camera}/image_raw', Image, 50) for camera in CAMERAS]
        for topic, kind, qos in topics:
            self._subscribe(topic, kind, qos)

    def _subscribe(self, topic: str, kind, qos) -> None:
        module = kind.__module__.split('.')[0]
        type_name = f'{module}/msg/{kind.__name__}'

        def take(data: bytes) -> None:
            now_ns = self._node.get_clock().now().nanoseconds
            self._bag.write_raw(topic, type_name, data, now_ns)
            self._keep(topic, deserialize_message(data, kind))

        self._node.create_subscription(kind, topic, take, qos, raw=True)

    def _keep(self, topic: str, message) -> None:
        if topic == 'instruction':  # may come just before or just after its episode's start
            self._instruction = message.data
        elif topic == 'episode' and message.message == 'start':
            self.episodes.append(EpisodeTrace(message.name))
        elif topic == 'episode' and self.episodes:
            self.episodes[-1].outcome = message.message
        if not self.episodes or self.episodes[-1].outcome:
            return
        episode = self.episodes[-1]
        episode.instruction = self._instruction
        if topic == 'tool_pose':
            position = message.pose.position
            episode.tool[from_messages.time_ns(message.header.stamp)] = np.array(
                [position.x, position.y, position.z])
        elif topic == 'action_chunk':
            chunk = from_messages.timed_actions(message, ACTION_SPACE.dimensions)
            episode.chunks[chunk.stamp_ns] = chunk
        elif topic.startswith('camera/'):
            stamp_ns = from_messages.time_ns(message.header.stamp)
            episode.pictures[topic.split('/')[1]][stamp_ns] = from_messages.image(message)


def draw_frame(episode: EpisodeTrace, stamp_ns: int) -> np.ndarray:
    """Return one frame of the video (448, 672, 3) RGB: both cameras and the predicted path."""
    picture = episode.pictures['static'][stamp_ns]
    height, width = picture.shape[:2]
    large = cv2.resize(picture, (PICTURE, PICTURE), interpolation=cv2.INTER_CUBIC)
    path = episode.predicted_path(stamp_ns)
    if path is not None:
        pixels = project(path[1], width=width, height=height) * (PICTURE / width, PICTURE / height)
        points = np.round(pixels * 16).astype(np.int32)
        for i in range(len(points) - 1):
            colour = (255, int(230 * (1 - i / len(points))), 30)
            cv2.line(large, tuple(map(int, points[i])), tuple(map(int, points[i + 1])), colour, 2,
                     cv2.LINE_AA, shift=4)
        cv2.circle(large, tuple(map(int, points[0])), 5 * 16, (255, 255, 255), 1, cv2.LINE_AA, 4)
    panel = np.full((PICTURE, PICTURE // 2, 3), 24, np.uint8)
    wrist = episode.pictures['wrist'].get(stamp_ns)
    if wrist is not None:
        panel[:PICTURE // 2] = cv2.resize(wrist, (PICTURE // 2, PICTURE // 2))
    elapsed_s = (stamp_ns - min(episode.pictures['static'])) / 1e9
    lines = [episode.instruction, f'{elapsed_s:.1f} s', 'line: the next 0.4 s, as predicted']
    for i, text in enumerate(lines):
        cv2.putText(panel, text, (8, PICTURE // 2 + 26 + 24 * i), cv2.FONT_HERSHEY_SIMPLEX,
                    0.5 if i == 0 else 0.4, (235, 235, 235), 1, cv2.LINE_AA)
    return np.hstack([large, panel])


def _mark_outcome(frame: np.ndarray, outcome: str) -> np.ndarray:
    colour = (90, 220, 90) if outcome == 'success' else (240, 80, 60)
    marked = cv2.rectangle(frame.copy(), (2, 2), (PICTURE - 3, PICTURE - 3), colour, 4)
    return cv2.putText(marked, outcome, (PICTURE + 8, PICTURE - 20), cv2.FONT_HERSHEY_SIMPLEX,
                       0.8, colour, 2, cv2.LINE_AA)


def write_video(path: Path, episodes: list[EpisodeTrace]) -> None:
    """Write every episode, one after another, as H.264 in real (simulated) time."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=FRAMES_PER_S,
                                      options={'crf': '23', 'preset': 'veryfast'})
        stream.width, stream.height, stream.pix_fmt = PICTURE + PICTURE // 2, PICTURE, 'yuv420p'
        for episode in episodes:
            stamps = sorted(episode.pictures['static'])
            frames = [draw_frame(episode, stamp) for stamp in stamps]
            frames += [_mark_outcome(frames[-1], episode.outcome)] * END_FRAMES if frames else []
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        container.mux(stream.encode())


def write_strip(path: Path, episode: EpisodeTrace, count: int = 4) -> None:
    """Write `count` moments of one episode side by side as a PNG."""
    stamps = sorted(episode.pictures['static'])
    chosen = [stamps[i] for i in np.linspace(0, len(stamps) - 1, count).round().astype(int)]
    strip = np.hstack([draw_frame(episode, stamp)[:, :PICTURE] for stamp in chosen])
    cv2.imwrite(str(path), cv2.cvtColor(
        cv2.resize(strip, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA),
        cv2.COLOR_RGB2BGR))


def write_plot(path: Path, episodes: list[EpisodeTrace], count: int = 4) -> None:
    """Plot the executed tool motion and every predicted chunk of the first `count` tasks."""
    shown = list({episode.task: episode for episode in reversed(episodes)}.values())[::-1][:count]
    figure, axes = plt.subplots(3, len(shown), figsize=(3.4 * len(shown) + 1, 7), squeeze=False,
                                sharex='col')
    for column, episode in enumerate(shown):
        times = np.array(sorted(episode.tool)) / 1e9
        executed = np.array([episode.tool[stamp] for stamp in sorted(episode.tool)])
        start = times[0]
        for row, name in enumerate('xyz'):
            axis = axes[row, column]
            for i, stamp in enumerate(sorted(episode.chunks)):
                predicted = episode.predicted_path(stamp)
                if predicted is not None:
                    axis.plot(predicted[0] - start, predicted[1][:, row], color='tab:orange',
                              alpha=0.6, linewidth=1, label='predicted chunks' if i == 0 else None)
            axis.plot(times - start, executed[:, row], color='black', linewidth=1.6,
                      label='executed')
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(f'tool {name}, m')
            if row == 0:
                axis.set_title(f'"{episode.instruction}": {episode.outcome}', fontsize=9)
            if row == 2:
                axis.set_xlabel('time, s')
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
