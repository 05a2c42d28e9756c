"""The replay's guard is the node's: motion file, robot description, seams, joints astray."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
import yaml
from made_bags import MS, ROBOT, T0, Scene, joint_state, status, text
from replay_rig import Fake, replay
from test_replay import one_episode
from test_replay_command import config, run  # noqa: F401

from meanflow_ros.core.guard import Guard, Rejected
from meanflow_ros.evaluation.replay.driving import UNKNOWN, motion_config
from meanflow_ros.ros.bag import deserialize
from meanflow_ros.ros.bag_files import Bag
from meanflow_ros.ros.motion import Motion
from meanflow_ros.ros.motion_config import read_mode

TRAJECTORY = {'type': 'joint_trajectory', 'topic': '/arm', 'dimensions': ['base', 'elbow']}
STREAM = {'type': 'forward_command', 'topic': '/arm', 'dimensions': ['elbow', 'base']}
GRIPPER = {'type': 'forward_command', 'topic': '/grip', 'dimensions': ['gripper']}
URDF = ('<robot name="r">'
        '<joint name="base" type="revolute"><limit lower="-2" upper="{}" velocity="{}"/></joint>'
        '<joint name="elbow" type="prismatic"><limit lower="-9" upper="9"/></joint></robot>')


def motion_file(tmp_path, **fields) -> str:
    path = tmp_path / 'motion.yaml'
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def counts(document) -> dict[str, int]:
    return document['guard']['interventions']


def drifting(length_ms: int, path, *, camera_ms: int = 40, description: str = '',
             words: tuple = ()) -> None:
    """Write an episode whose robot stirs and then stays where it began; words: (ms, text)."""
    scene = Scene()
    scene.add('episode', T0, status('start', 0))
    scene.add('instruction', T0, text('go'))
    for late, said in words:
        scene.add('instruction', T0 + late * MS, text(said))
    if description:
        scene.add('robot_description', T0 + 50 * MS, text(description))
    for now_ns in range(T0, T0 + length_ms * MS, 10 * MS):
        scene.add('joint_states', now_ns, joint_state(
            now_ns, base=-0.5 if now_ns < T0 + 100 * MS else -0.54, elbow=0.25))
    scene.robot(T0, length_ms * MS, camera_ns=camera_ms * MS, delay_ns=0, without=('states',))
    scene.add('episode', T0 + length_ms * MS, status('success', 0))
    scene.write(path)


def wild(observation, seed, steps) -> np.ndarray:
    """Return an error (T, A) that breaks another rule at every other picture."""
    number = (observation.stamp_ns - T0) // (40 * MS)
    table = np.zeros((5, 3))
    if number % 9 == 2:
        table[3, 1] = np.nan
    elif number % 9 == 4:
        table[:, 0] = 9.0
    elif number % 9 == 6:
        table[:, 1] = 0.03 * np.arange(5)
    elif number % 9 in (1, 7):
        table[:, 0] = 0.02
    elif number % 9 == 8:
        table[:, 1] = -0.2
    return table


WILD = {
    'limits': {'velocity': {'base': 1.3, 'elbow': 1.1}, 'acceleration': {'elbow': 60.0}},
    'remedies': {'velocity': 'clamp', 'acceleration': 'slow', 'first_step': 'clamp'},
    'first_step': {'elbow': 0.15}}


class Sent:
    """Stands for DDS: what an output publishes is counted."""

    def __init__(self):
        self.messages = Counter()

    def create_publisher(self, kind, topic, depth):
        messages = self.messages

        class Publisher:
            topic_name = topic

            def publish(self, message):
                assert isinstance(message, kind)
                messages[topic] += 1

            def get_subscription_count(self):
                return 1

        return Publisher()

    def get_subscriptions_info_by_topic(self, topic):
        return []


def as_the_node(path, episode, motion: str, mode: str, answer) -> tuple[Counter, Counter]:
    """Return what the node's own Motion counts for these chunks and states, and what it sends."""
    outputs = pytest.importorskip('meanflow_ros.ros.outputs')
    pytest.importorskip('geometry_msgs', reason='messages are missing: source a ROS 2')
    settings, sent = motion_config(motion, ROBOT), Sent()
    motion = Motion(ROBOT, settings, Guard(ROBOT, settings.guard_settings(ROBOT)),
                    read_mode(mode), [outputs.make_output(sent, each, ROBOT.action_space)
                                      for each in settings.outputs])
    with Bag(path) as bag:
        states = [(raw.stamp_ns, 1, deserialize(raw.data, raw.type).position[::-1])
                  for raw in bag.messages({'/joint_states'})]     # elbow, base
    chunks = [(int(done_ns), 2, row) for row, done_ns in enumerate(episode.done_ns)
              if done_ns <= episode.tick_ns[-1]]
    first_ns, period_ns = int(episode.done_ns[0]), round(settings.tick_s * 1e9)
    ticks = [(first_ns + period_ns * number, 0, None) for number in range(
        1, 1 + (int(episode.tick_ns[-1]) - first_ns) // period_ns)]
    for now_ns, kind, what in sorted([*states, *chunks, *ticks], key=lambda event: event[:2]):
        if kind == 0:
            motion.tick(now_ns)
        elif kind == 1:
            motion.feel(what)
        else:
            try:
                motion.accept(answer(int(episode.stamp_ns[what])), now_ns=now_ns,
                              epoch=motion.timeline.epoch, state=episode.states[what])
            except Rejected:
                pass
    return motion.guard.interventions, sent.messages


@pytest.mark.parametrize('outputs', [[], [TRAJECTORY], [STREAM, GRIPPER], [TRAJECTORY, GRIPPER]])
@pytest.mark.parametrize('mode', ['receding_horizon', 'ensemble:0.01'])
def test_the_nodes_motion_and_the_replay_count_the_same_interventions_by_kind(
        tmp_path, outputs, mode):
    drifting(2500, tmp_path / 'bag')
    motion = motion_file(tmp_path, outputs=outputs, **WILD)
    acting = Fake(error=wild)
    document, (episode,), _ = replay(tmp_path / 'bag', acting, latency_ms=17, motion=motion,
                                     execution=mode, as_driven=True)

    def answer(stamp_ns):
        seen = dataclasses.make_dataclass('Seen', ['stamp_ns'])(stamp_ns)
        return acting.answer(seen, 0, None)

    expected, sent = as_the_node(tmp_path / 'bag', episode, motion, mode, answer)
    assert counts(document) == dict(expected)
    assert counts(document) == document['episodes'][0]['interventions']
    assert {'not_finite', 'position', 'velocity clamped', 'first_step clamped'} <= set(expected)
    assert ('seam clamped' in expected) == (TRAJECTORY in outputs)
    assert ('astray' in expected) == (TRAJECTORY in outputs)
    assert set(sent) == {output['topic'] for output in outputs}


def test_a_joint_that_is_not_where_it_was_sent_is_counted_only_if_this_policy_drove_it(tmp_path):
    drifting(1500, tmp_path / 'bag')
    motion = motion_file(tmp_path, outputs=[TRAJECTORY], limits={
        'velocity': {'base': 1.5, 'elbow': 1.5}})
    found = {}
    for as_driven in (False, True):
        found[as_driven], _, _ = replay(tmp_path / 'bag', Fake(), motion=motion,
                                        as_driven=as_driven)
    # base is sent 0.977 rad/s away from where it stays: beyond 0.05 * 6 + 0.2 * 1.5 after 0.61 s.
    assert 'astray' not in counts(found[False])
    assert found[False]['guard']['not_checked'] == UNKNOWN
    assert found[False]['guard']['rejected'] == 0
    assert 15 <= counts(found[True])['astray'] == found[True]['guard']['rejected'] <= 25
    assert found[True]['guard']['not_checked'] == {}
    assert any('Not known from a recording: astray' in each['text']
               for each in found[False]['verdict']['findings'])
    without, _, _ = replay(tmp_path / 'bag', Fake())
    assert without['guard']['not_checked'] == {} and without['guard']['motion'] == ''


def test_where_two_chunks_of_a_trajectory_meet_with_a_jump_the_seam_is_counted(tmp_path):
    one_episode(tmp_path / 'bag')

    def alternating(observation, seed, steps):
        return (observation.stamp_ns - T0) // (40 * MS) % 2 * np.array([0.3, 0.0, 0.0])

    motion = motion_file(tmp_path, outputs=[TRAJECTORY], limits={
        'velocity': {'base': 1.5, 'elbow': 1.5}})
    document, (episode,), _ = replay(tmp_path / 'bag', Fake(error=alternating), motion=motion)
    assert counts(document)['seam clamped'] >= len(episode.stamp_ns) // 2
    motion = motion_file(tmp_path, outputs=[STREAM], limits={
        'velocity': {'base': 1.5, 'elbow': 1.5}})
    document, _, _ = replay(tmp_path / 'bag', Fake(error=alternating), motion=motion)
    assert counts(document) == {}


def test_a_chunk_for_words_that_have_changed_is_guarded_and_then_discarded(tmp_path):
    drifting(600, tmp_path / 'bag', words=((130, 'stop'), (331, 'go on')))

    def outside(observation, seed, steps):
        return 9.0 if observation.stamp_ns == T0 + 320 * MS else 0.0

    document, (episode,), _ = replay(tmp_path / 'bag', Fake(error=outside), latency_ms=35)
    by_stamp = dict(zip((episode.stamp_ns - T0) // MS, episode.outcome.tolist()))
    assert by_stamp[120] == 'discarded' and by_stamp[320] == 'position'
    assert counts(document) == {'position': 1} and document['guard']['discarded'] == 1


def test_after_the_deadline_a_chunk_is_not_followed_any_more(tmp_path):
    # Chunks of 100 ms from T0 + 1 ms on; the control loop looks at 1 + 20 n ms.
    one_episode(tmp_path / 'bag', length_ms=800, camera_ms=400)
    document, (episode,), _ = replay(tmp_path / 'bag', Fake(), motion=motion_file(
        tmp_path, deadline_s=0.05, control_rate_hz=50.0, outputs=[STREAM, GRIPPER]))
    due = (episode.tick_ns[episode.source >= 0] - T0) // MS
    assert due.tolist() == [20, 40, 60, 420, 440, 460]
    assert document['deadline_misses']['count'] == len(episode.tick_ns) - 1 - 6
    document, (episode,), _ = replay(tmp_path / 'bag', Fake())
    assert ((episode.tick_ns[episode.source >= 0] - T0) // MS).tolist() == [
        20, 40, 60, 80, 420, 440, 460, 480]


def test_an_open_loop_longer_than_the_deadline_goes_on_while_pictures_come(tmp_path):
    drifting(800, tmp_path / 'bag', camera_ms=20)
    motion = motion_file(tmp_path, deadline_s=0.05, control_rate_hz=50.0, outputs=[GRIPPER])
    document, (episode,), _ = replay(tmp_path / 'bag', Fake(), motion=motion,
                                     execution='open_loop')
    assert document['deadline_misses']['count'] == 0 and len(episode.stamp_ns) <= 10


def test_recorded_commands_are_chosen_in_an_open_loop_by_their_time_and_not_by_the_guard(tmp_path):
    drifting(800, tmp_path / 'bag', camera_ms=20)
    found = [replay(tmp_path / 'bag', execution='open_loop', motion=motion)[1][0].stamp_ns.tolist()
             for motion in ('', motion_file(tmp_path, first_step={'base': 0.9, 'elbow': 0.9}))]
    assert found[0] == found[1] and 7 <= len(found[0]) <= 10


def test_the_described_limits_of_the_recording_or_of_a_file_tighten_the_checkpoints(tmp_path):
    drifting(400, tmp_path / 'plain')
    drifting(400, tmp_path / 'described', description=URDF.format(2, 0.9))
    file = tmp_path / 'robot.urdf'
    file.write_text(URDF.format(-0.3, 5))
    for bag, urdf, expected, named in (
            ('plain', '', None, ''), ('described', '', 'velocity', '/robot_description'),
            ('described', 'none', None, ''), ('plain', str(file), 'position', str(file)),
            ('described', str(file), 'position', str(file))):
        document, (episode,), _ = replay(tmp_path / bag, Fake(), urdf=urdf)
        assert set(counts(document)) - {None} == {expected} - {None}
        assert document['recordings'][0]['urdf'] == named
    # base is commanded 1 / 1.024 rad/s: too fast for 0.9, and from 205 ms on beyond -0.3.
    document, (episode,), _ = replay(tmp_path / 'described', Fake())
    assert counts(document) == {'velocity': len(episode.stamp_ns)}


def test_a_description_that_does_not_fit_is_one_clear_reason_that_names_the_option(tmp_path):
    for description, message in (
            ('<robot name="r"/>', "no moving joint 'base'"), ('beep', 'is no XML'),
            (URDF.format(-2, 1), 'cannot move'),
            (URDF.format(-1.99, 1).replace('-2', '-5').replace('-1.99', '-4'),
             'nothing in common')):
        path = tmp_path / str(len(message))
        drifting(200, path, description=description)
        with pytest.raises(ValueError, match=message) as error:
            replay(path, Fake())
        assert '--urdf FILE' in str(error.value) and '\n' not in str(error.value)
        assert counts(replay(path, Fake(), urdf='none')[0]) == {}


def test_a_description_is_found_under_another_name_and_one_of_another_type_is_none(tmp_path):
    scene = Scene()
    scene.add('status', T0, status('start', 0))
    scene.add('robot_description', T0, joint_state(T0, base=0.0))
    scene.add('left/description', T0, text(URDF.format(2, 0.9)))
    scene.add('instruction', T0, text('go'))
    scene.robot(T0, 300 * MS, delay_ns=0)
    scene.write(tmp_path / 'bag')
    data = {'episodes': 'bag'}
    assert counts(replay(tmp_path / 'bag', Fake(), data=data)[0]) == {}
    document, _, _ = replay(tmp_path / 'bag', Fake(), data=data, remaps={
        '/robot_description': '/left/description'})
    assert set(counts(document)) == {'velocity'}
    assert document['recordings'][0]['urdf'] == '/left/description'
    with pytest.raises(ValueError, match='holds sensor_msgs/msg/JointState, expected std_msgs'):
        replay(tmp_path / 'bag', Fake(), data=data, remaps={
            '/robot_description': '/robot_description'})


@pytest.mark.parametrize('option, content, message', [
    ('motion', None, 'there is no such file; give the motion file that the node is started with'),
    ('motion', 'limits: {velocity: {bas: 1.0}}', "did you mean 'base'.*the robot 'arm'"),
    ('motion', 'limits: {upper: {base: 5.0}}', "would loosen.*the robot 'arm'"),
    ('motion', 'outputs: [{type: joint_trajectory, topic: t, dimensions: [panda_joint1]}]',
     "unknown name 'panda_joint1'.*give the motion file of the robot 'arm'"),
    ('motion', 'limit: {}', 'limit'),
    ('urdf', None, 'No such file or directory: give the file of the robot description'),
    ('urdf', '<robot name="r"><joint name="bas" type="revolute"/></robot>',
     "no moving joint 'base'.*give the robot description of 'arm'"),
    ('urdf', 'beep', "is no XML.*give the robot description of 'arm'"),
    ('urdf', b'\xff\xfe', 'it is no text: give the file of the robot description')])
def test_a_file_that_is_missing_or_of_another_robot_is_one_line_that_names_the_fix(
        run, tmp_path, option, content, message):  # noqa: F811
    one_episode(tmp_path / 'bag', length_ms=200)
    path = tmp_path / 'given'
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, metrics, shown = run(tmp_path / 'bag', f'--{option}', path)
    assert code == 1 and metrics is None
    (line,) = [line for line in shown.splitlines() if line.startswith('replay: ')]
    assert str(path) in line
    assert re.search(message, line), line


def test_a_robot_without_measured_positions_has_no_use_for_a_description(tmp_path):
    drifting(200, tmp_path / 'bag', description='beep')
    space = dataclasses.replace(ROBOT.action_space, rates=('base', 'elbow'))
    robot = dataclasses.replace(ROBOT, action_space=space)
    assert counts(replay(tmp_path / 'bag', Fake(robot))[0]) == {}
    with pytest.raises(ValueError, match='commands no position of a measured joint.*leave it out'):
        replay(tmp_path / 'bag', Fake(robot), urdf='robot.urdf')


def test_a_motion_file_that_has_changed_is_replayed_anew(run, tmp_path):  # noqa: F811
    one_episode(tmp_path / 'bag', length_ms=200)
    found = []
    for velocity in (5.0, 0.5):
        motion = motion_file(tmp_path, limits={'velocity': {'base': velocity}})
        code, metrics, _ = run(tmp_path / 'bag', '--motion', motion)
        assert code == 0
        found.append(counts(metrics))
    assert found[0] == {} and found[1]['velocity'] > 0


def test_the_report_shows_every_kind_and_what_cannot_be_known(run, tmp_path):  # noqa: F811
    one_episode(tmp_path / 'bag', length_ms=200)
    motion = motion_file(tmp_path, outputs=[TRAJECTORY], limits={'velocity': {'base': 0.5}})
    run(tmp_path / 'bag', '--motion', motion)
    page = (tmp_path / 'out' / 'report.html').read_text()
    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert json.dumps(metrics['guard']['not_checked'])[1:-1] in page.replace('":"', '": "')
    assert '"velocity"' in page and 'function guard(found)' in page
