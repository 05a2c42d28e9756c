"""Receives the messages of some subscriptions on a thread of its own, sooner than an executor.

For every message an executor of rclpy goes through all that a node has, in Python: half a
millisecond, for which the thread that waits for the message cannot run either. Here a message
takes what the wait set and the callback take. The executor leaves these subscriptions alone. Nor
does it hear of their events (an incompatible quality of service): with Fast DDS what waits for
those wakes for messages too, again and again until somebody takes them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from rclpy.callback_groups import CallbackGroup
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.guard_condition import GuardCondition
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.subscription import Subscription

CHECK_NS = 500_000_000   # how often it looks whether ROS has been shut down
PAUSE_S = 0.05           # after an error, which would come again and again


class _NotTheExecutors(CallbackGroup):
    """Of subscriptions whose messages no executor takes."""

    def can_execute(self, entity) -> bool:
        return False

    def beginning_execution(self, entity) -> bool:
        return False

    def ending_execution(self, entity) -> None:
        pass


class Receiver:
    """Calls the callbacks of its subscriptions, one message after the other.

    failed: gets what a callback raises.
    """

    def __init__(self, node: Node, failed: Callable[[Exception], None]):
        self._group, self._failed, self._context = _NotTheExecutors(), failed, node.context
        self._lock = threading.Lock()
        self._subscriptions: list[Subscription] = []
        self._changed = GuardCondition(None, None, node.context)
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True, name='receive')
        self._thread.start()

    def subscribed(self, subscribe: Callable[..., Subscription]) -> Subscription:
        """Return a subscription whose messages are taken from now on.

        subscribe: creates it, with what is missing of `Node.create_subscription`'s arguments.
        """
        subscription = subscribe(
            callback_group=self._group,
            event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False))
        with self._lock:
            self._subscriptions = [*self._subscriptions, subscription]
        self._changed.trigger()
        return subscription

    def remove(self, subscription: Subscription) -> None:
        """Take no more of them: to be called before it is destroyed."""
        with self._lock:
            self._subscriptions = [one for one in self._subscriptions if one is not subscription]
        self._changed.trigger()

    def end(self) -> None:
        """Take nothing more; not to be called from a callback."""
        self._ended = True
        self._changed.trigger()
        self._thread.join()
        self._changed.destroy()

    def _run(self) -> None:
        while not self._ended and self._context.ok():
            try:
                self._receive()
            except Exception as error:  # whatever is raised must not end the thread
                self._failed(error)
                time.sleep(PAUSE_S)

    def _receive(self) -> None:
        """Take the messages of the subscriptions that there are, until there are others."""
        with contextlib.ExitStack() as in_use:   # what is destroyed meanwhile is so at the end
            with self._lock:
                subscriptions = self._subscriptions
                for handle in (self._context.handle, self._changed.handle,
                               *(one.handle for one in subscriptions)):
                    in_use.enter_context(handle)
            wait_set = rclpy_implementation.WaitSet(
                len(subscriptions), 1, 0, 0, 0, 0, self._context.handle)
            while (subscriptions is self._subscriptions and not self._ended
                   and self._context.ok()):
                wait_set.clear_entities()
                wait_set.add_guard_condition(self._changed.handle)
                for one in subscriptions:
                    wait_set.add_subscription(one.handle)
                wait_set.wait(CHECK_NS)
                ready = wait_set.get_ready_entities('subscription')
                for one in subscriptions:
                    if one.handle.pointer in ready and subscriptions is self._subscriptions:
                        taken = one.handle.take_message(one.msg_type, one.raw)
                        if taken is not None:
                            one.callback(taken[0])
