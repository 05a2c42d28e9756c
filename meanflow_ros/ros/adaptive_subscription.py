"""A sensor's subscription: best effort for a best-effort publisher, reliable for a reliable one.

Best effort is what sensor drivers are used to, but a picture of 640x480 is larger than the shared
memory segment and the socket buffer of Fast DDS's defaults, and a lost fragment loses the picture
(docs/performance.md has the figures, config/fastdds.xml larger buffers). So where every publisher
of the topic offers reliable delivery, it is asked for. Quality of service given by `qos_overrides`
is used as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

from rclpy.node import Node
from rclpy.qos import ReliabilityPolicy, qos_profile_sensor_data
from rclpy.qos_overriding_options import QoSOverridingOptions

from meanflow_ros.ros.receiving import Receiver


class AdaptiveSubscription:
    """Subscribes to one topic; `adapt`, called now and then, follows what publishers offer.

    serialized: the callback gets the message's bytes (CDR) instead of the message. receiver: what
    takes the messages; the node's executor by default, and always where quality of service is
    given, since only that tells of one that no publisher offers.
    """

    def __init__(self, node: Node, kind, topic: str, callback: Callable, *,
                 serialized: bool = False, receiver: Receiver | None = None):
        self._node, self._kind, self._topic, self._callback = node, kind, topic, callback
        self._serialized, self._receiver = serialized, receiver
        self._name = node.resolve_topic_name(topic)
        given = f'qos_overrides.{self._name}.subscription.'
        self._overridden = any(name.startswith(given) for name in node._parameter_overrides)
        if self._overridden:
            self._receiver = None
        self._reliability = self._offered()
        self._subscription = self._subscribe()

    def adapt(self) -> None:
        """Subscribe anew if the publishers now ask for another reliability."""
        reliability = self._offered()
        if not self._overridden and reliability != self._reliability:
            self._reliability = reliability
            self.destroy()
            self._subscription = self._subscribe()

    def destroy(self) -> None:
        """End the subscription."""
        if self._receiver:
            self._receiver.remove(self._subscription)
        self._node.destroy_subscription(self._subscription)

    def _offered(self) -> ReliabilityPolicy:
        offers = [info.qos_profile.reliability
                  for info in self._node.get_publishers_info_by_topic(self._name)]
        reliable = offers and all(offer == ReliabilityPolicy.RELIABLE for offer in offers)
        return ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT

    def _subscribe(self):
        profile = copy.copy(qos_profile_sensor_data)
        profile.reliability = self._reliability
        subscribe = functools.partial(self._node.create_subscription, self._kind, self._topic,
                                      self._callback, profile, raw=self._serialized)
        if self._receiver:
            return self._receiver.subscribed(subscribe)
        options = QoSOverridingOptions.with_default_policies() if self._overridden else None
        return subscribe(qos_overriding_options=options)
