"""Messages that are written as bytes, held to those that rclpy writes."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('rclpy')

from rclpy.serialization import deserialize_message  # noqa: E402
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint  # noqa: E402

from meanflow_ros.core.contract import TimedActions  # noqa: E402
from meanflow_ros.ros import to_messages  # noqa: E402

STAMP_NS = 1_795_897_241_596_403_945


def message_of(safe):
    timed = safe.timed
    message = JointTrajectory(joint_names=list(safe.space.dimensions))
    message.header.stamp = to_messages.time(timed.stamp_ns)
    message.points = [
        JointTrajectoryPoint(positions=action.tolist(), time_from_start=to_messages.duration(
            int(due_ns) - timed.stamp_ns))
        for due_ns, action in zip(timed.due_ns, timed.actions)]
    return message


@pytest.mark.parametrize('names', [('a',), ('ab', 'abc'), ('left elbow', 'x', 'gelenk_ä'),
                                   tuple(f'joint_{i}' for i in range(7))])
@pytest.mark.parametrize('steps', [1, 2, 9])
def test_a_trajectory_written_as_bytes_is_the_message_of_the_same_chunk(names, steps):
    random = np.random.default_rng(steps)
    for stamp_ns in (STAMP_NS, 7):
        safe = SimpleNamespace(space=SimpleNamespace(dimensions=names), timed=TimedActions(
            stamp_ns=stamp_ns, actions=random.normal(size=(steps, len(names))),
            due_ns=stamp_ns + np.cumsum(random.integers(1, 3_000_000_000, steps))))
        expected = message_of(safe)
        for _ in range(2):
            found = deserialize_message(to_messages.serialized_joint_trajectory(safe),
                                        JointTrajectory)
            assert found == expected
