"""rosbag2 in and out, without a ROS installation (PyPI `rosbags`).

Bags are read and written as ROS 2 Jazzy; messages are the dataclasses of `TYPES`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from rosbags.interfaces import (
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import (
    CompressionFormat,
    CompressionMode,
    StoragePlugin,
    Writer,
    WriterError,
)
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_typestore

from meanflow_ros.ros.bag_files import Bag

TYPES = get_typestore(Stores.ROS2_JAZZY)
_TEXT_OVERHEAD = 9   # of a serialised string: 4 bytes of header, 4 of length, 1 at its end
LATCHED_TOPICS = ('instruction',)
_FOREVER = QosTime(9223372036, 854775807)
_LATCHED = Qos(QosHistory.KEEP_LAST, 1, QosReliability.RELIABLE, QosDurability.TRANSIENT_LOCAL,
               _FOREVER, _FOREVER, QosLiveliness.AUTOMATIC, _FOREVER, False)


def absolute_topic(topic: str) -> str:
    """Return the topic as `ros2 bag` stores it: resolved in the namespace /."""
    return '/' + topic.lstrip('/')


def deserialize(data: bytes, type_name: str):
    """Read a serialised (CDR) message; its arrays are views of `data`, not copies.

    ValueError if it is not a message of that type. For a picture of 640x480 this takes a
    twentieth of the time of rclpy's own conversion.
    """
    try:
        return TYPES.deserialize_cdr(data, type_name)
    except (SerdeError, UnicodeDecodeError) as error:
        raise ValueError(f'not a {type_name}: {error}') from None


def deserialize_text(data: bytes, max_bytes: int) -> str:
    """Read a serialised std_msgs/String; ValueError if it is longer, or no UTF-8."""
    size = len(data) - _TEXT_OVERHEAD
    if size > max_bytes:
        raise ValueError(f'must be at most {max_bytes} bytes, got {size}')
    try:
        return deserialize(data, 'std_msgs/msg/String').data
    except ValueError as error:
        if 'utf-8' in str(error):
            raise ValueError('is not valid UTF-8') from None
        raise


class BagWriter:
    """Writes a new rosbag2 directory, mcap with zstd; use it in a `with` statement.

    Topics are stored with a leading slash; those in `latched` are offered as reliable and
    transient local. ValueError if the path exists. On an error the bag is still closed, so what
    was written stays readable.
    """

    def __init__(self, path: Path | str, latched: Collection[str] = LATCHED_TOPICS):
        self._path = Path(path)
        self._latched = {absolute_topic(topic) for topic in latched}
        self._connections = {}
        try:
            self._writer = Writer(self._path, version=9, storage_plugin=StoragePlugin.MCAP)
        except WriterError:
            raise ValueError(f'{path} exists already, choose a new path for the bag') from None
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)

    def __enter__(self) -> BagWriter:
        try:
            self._writer.open()
        except (OSError, WriterError) as error:
            raise ValueError(f'cannot write a bag at {self._path}: {error}') from None
        return self

    def __exit__(self, *_) -> None:
        self._writer.close()

    def write(self, topic: str, message, stamp_ns: int) -> None:
        """Append a message of `TYPES`, received at `stamp_ns`."""
        kind = message.__msgtype__
        self.write_raw(topic, kind, TYPES.serialize_cdr(message, kind), stamp_ns)

    def write_raw(self, topic: str, type_name: str, cdr_bytes: bytes | memoryview,
                  stamp_ns: int) -> None:
        """Append a serialised message; `type_name` as in 'std_msgs/msg/String'.

        ValueError for a type that ROS 2 Jazzy does not know, or another type on the same topic.
        """
        topic = absolute_topic(topic)
        connection = self._connections.get(topic)
        if connection is None:
            connection = self._connections[topic] = self._connect(topic, type_name)
        if connection.msgtype != type_name:
            raise ValueError(f'{topic} holds {connection.msgtype}, not {type_name}')
        self._writer.write(connection, stamp_ns, cdr_bytes)

    def _connect(self, topic: str, type_name: str):
        if type_name not in TYPES.types:
            raise ValueError(f'{topic}: unknown message type {type_name!r}')
        qos = [_LATCHED] if topic in self._latched else []
        return self._writer.add_connection(topic, type_name, typestore=TYPES,
                                           offered_qos_profiles=qos)


def topic_types(path: Path | str) -> dict[str, str]:
    """Return topic -> message type of a rosbag2, sorted; ValueError as `read_messages`."""
    with Bag(path) as bag:
        _require_whole(bag)
        return {topic: channel.type for topic, channel in bag.topics.items()}


def read_messages(path: Path | str, topics: Collection[str] | None = None,
                  ) -> Iterator[tuple[str, int, object]]:
    """Yield (topic, stamp_ns, message) of a rosbag2 (db3 or mcap) in time order.

    Messages of one stamp come in the order in which they were written. Memory stays constant.
    topics: only these, with or without the leading slash; None reads all whose type ROS 2 Jazzy
    knows. ValueError if there is no bag at `path`, if it is not one, or if it is damaged; `Bag`
    reads what is left of a damaged one.
    """
    wanted = None if topics is None else {absolute_topic(topic) for topic in topics}
    with Bag(path) as bag:
        _require_whole(bag)
        chosen = {topic: channel.type for topic, channel in bag.topics.items()
                  if (channel.type in TYPES.types if wanted is None
                      else absolute_topic(topic) in wanted)}
        for topic, kind in chosen.items():
            if kind not in TYPES.types:
                raise ValueError(f'{path} cannot be read as a rosbag2: {topic} has the unknown '
                                 f'type {kind!r}')
        for raw in bag.messages(chosen):
            _require_whole(bag)
            yield raw.topic, raw.stamp_ns, deserialize(raw.data, raw.type)
        _require_whole(bag)


def _require_whole(bag: Bag) -> None:
    if bag.lost:
        raise ValueError(f'{bag.path} cannot be read as a rosbag2: {bag.lost[0]}')
