"""The thread that receives a node's sensors, against real publishers."""

import functools
import threading

import pytest

pytest.importorskip('rclpy')

import rclpy  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from std_msgs.msg import String  # noqa: E402

from meanflow_ros.ros.receiving import Receiver  # noqa: E402

PATIENCE_S = 10.0


class Heard:
    """What a callback was called with; the first `faults` calls raise."""

    def __init__(self, faults=0):
        self.texts, self._faults, self._news = [], faults, threading.Condition()

    def __call__(self, message):
        with self._news:
            self.texts.append(message.data)
            self._news.notify_all()
        if len(self.texts) <= self._faults:
            raise ValueError(f'{message.data} is wrong')

    def wait(self, count):
        with self._news:
            assert self._news.wait_for(lambda: len(self.texts) >= count, PATIENCE_S), self.texts


@pytest.fixture
def node():
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node('receiving', context=context)
    yield node
    node.destroy_node()
    rclpy.shutdown(context=context)


@pytest.fixture
def faults():
    return []


@pytest.fixture
def receiver(node, faults):
    receiver = Receiver(node, lambda error: faults.append(str(error)))
    yield receiver
    receiver.end()


def subscribed(receiver, node, topic, callback):
    subscription = receiver.subscribed(functools.partial(
        node.create_subscription, String, topic, callback, 10))
    publisher = node.create_publisher(String, topic, 10)
    while not publisher.get_subscription_count():
        pass
    return subscription, publisher


def test_messages_of_all_subscriptions_come_without_an_executor(node, receiver):
    ears = {topic: Heard() for topic in ('left', 'right')}
    publishers = {topic: subscribed(receiver, node, topic, ear)[1] for topic, ear in ears.items()}
    for number in range(5):
        for topic, publisher in publishers.items():
            publisher.publish(String(data=f'{topic} {number}'))
    for topic, ear in ears.items():
        ear.wait(5)
        assert ear.texts == [f'{topic} {number}' for number in range(5)]


def test_a_callback_that_raises_is_told_of_and_the_next_message_is_taken(node, receiver, faults):
    ear = Heard(faults=2)
    _, publisher = subscribed(receiver, node, 'words', ear)
    for word in ('one', 'two', 'three'):
        publisher.publish(String(data=word))
    ear.wait(3)
    assert faults == ['one is wrong', 'two is wrong']


def test_a_subscription_that_was_removed_is_destroyed_and_hears_no_more(node, receiver):
    removed, kept = Heard(), Heard()
    subscription, publisher = subscribed(receiver, node, 'words', removed)
    subscribed(receiver, node, 'words', kept)
    publisher.publish(String(data='one'))
    removed.wait(1)
    receiver.remove(subscription)
    node.destroy_subscription(subscription)
    publisher.publish(String(data='two'))
    kept.wait(2)
    assert removed.texts == ['one']


def test_a_callback_may_subscribe_anew(node, receiver):
    """As a sensor does when its publishers change."""
    second = Heard()

    def first(message):
        receiver.remove(subscription)
        node.destroy_subscription(subscription)
        subscribed(receiver, node, 'others', second)[1].publish(String(data='three'))

    subscription, publisher = subscribed(receiver, node, 'words', first)
    publisher.publish(String(data='one'))
    second.wait(1)
    assert second.texts == ['three']


def test_an_executor_sleeps_while_messages_wait_for_the_receiver(node, receiver):
    class Counting(SingleThreadedExecutor):
        rounds = 0

        def get_nodes(self):
            self.rounds += 1
            return super().get_nodes()

    entered, go_on = threading.Event(), threading.Event()

    def slow(message):
        entered.set()
        assert go_on.wait(PATIENCE_S)

    executor = Counting(context=node.context)
    executor.add_node(node)
    _, publisher = subscribed(receiver, node, 'words', slow)
    for word in ('one', 'two', 'three'):
        publisher.publish(String(data=word))
    assert entered.wait(PATIENCE_S)
    executor.spin_once(timeout_sec=0.2)      # what the subscription has just changed
    executor.rounds = 0
    executor.spin_once(timeout_sec=0.3)
    go_on.set()
    executor.shutdown()
    assert executor.rounds < 5


def test_it_ends_with_ros_and_can_be_ended_after_that():
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node('receiving', context=context)
    receiver = Receiver(node, pytest.fail)
    subscription, _ = subscribed(receiver, node, 'words', Heard())
    rclpy.shutdown(context=context)
    receiver._thread.join(PATIENCE_S)
    assert not receiver._thread.is_alive()
    receiver.remove(subscription)
    receiver.end()
    node.destroy_node()
