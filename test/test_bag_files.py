"""Bags of every storage, whole, unfinished and damaged: what is read, and what is said lost."""

from __future__ import annotations

import sqlite3
import struct

import made_bags as made
import pytest
from made_bags import MS, T0
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from meanflow_ros.ros.bag import TYPES, deserialize
from meanflow_ros.ros.bag_files import METADATA, Bag

COUNT = 400
STORAGES = {'mcap': StoragePlugin.MCAP, 'db3': StoragePlugin.SQLITE3}


def message_of(number: int):
    return made.joint_state(T0 + number * MS, base=number / 7.0)


def write(path, storage: str = 'mcap', compression=None, *, version: int = 9, topic: str = '/a',
          numbers=range(COUNT)):
    """Write messages whose stamps and values tell their numbers."""
    writer = Writer(path, version=version, storage_plugin=STORAGES[storage])
    if compression is not None:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        kind = 'sensor_msgs/msg/JointState'
        connection = writer.add_connection(topic, kind, typestore=TYPES)
        for number in numbers:
            writer.write(connection, T0 + number * MS,
                         TYPES.serialize_cdr(message_of(number), kind))


def storage_file(path):
    (file,) = [each for each in path.iterdir() if each.name != METADATA]
    return file


def read(path, **options) -> tuple[list[int], list[str]]:
    """Return the numbers of the messages that could be read, and what was lost."""
    with Bag(path) as bag:
        numbers = []
        for raw in bag.messages(**options):
            number = (raw.stamp_ns - T0) // MS
            assert deserialize(raw.data, raw.type).position[0] == number / 7.0
            numbers.append(number)
        return numbers, bag.lost


@pytest.mark.parametrize('compression', [None, CompressionMode.FILE, CompressionMode.MESSAGE,
                                         CompressionMode.STORAGE])
@pytest.mark.parametrize('storage', STORAGES)
def test_every_storage_and_compression_is_read_whole(tmp_path, storage, compression):
    if storage == 'db3' and compression == CompressionMode.STORAGE:
        pytest.skip('db3 has no compression of its own')
    write(tmp_path / 'bag', storage, compression)
    assert read(tmp_path / 'bag') == ([*range(COUNT)], [])
    assert read(tmp_path / 'bag', start_ns=T0 + 100 * MS, stop_ns=T0 + 103 * MS) == (
        [100, 101, 102], [])


@pytest.mark.parametrize('version', [8, 9])
def test_the_metadata_of_older_distributions_is_read(tmp_path, version):
    write(tmp_path / 'bag', version=version)
    assert read(tmp_path / 'bag') == ([*range(COUNT)], [])


HUMBLE = """rosbag2_bagfile_information:
  version: 5
  storage_identifier: sqlite3
  duration: {nanoseconds: 19000000}
  starting_time: {nanoseconds_since_epoch: 1700000000123456789}
  message_count: 20
  topics_with_message_count:
    - topic_metadata: {name: /a, type: sensor_msgs/msg/JointState, serialization_format: cdr,
                       offered_qos_profiles: "- history: 3"}
      message_count: 20
  compression_format: ""
  compression_mode: ""
  relative_file_paths: [second.db3, first.db3]
  files: []
"""


def test_the_metadata_of_humble_gives_the_order_of_the_files(tmp_path):
    for name, numbers in (('second', range(10)), ('first', range(10, 20))):
        write(tmp_path / name, 'db3', numbers=numbers)
        (tmp_path / 'bag').mkdir(exist_ok=True)
        storage_file(tmp_path / name).rename(tmp_path / 'bag' / f'{name}.db3')
    (tmp_path / 'bag' / METADATA).write_text(HUMBLE)
    assert read(tmp_path / 'bag') == ([*range(20)], [])
    (tmp_path / 'bag' / 'first.db3').unlink()
    assert read(tmp_path / 'bag') == (
        [*range(10)], ['first.db3 is listed in metadata.yaml and is not there'])


@pytest.mark.parametrize('storage', STORAGES)
def test_the_files_of_a_split_bag_follow_one_another_by_their_numbers(tmp_path, storage):
    for part in range(12):
        write(tmp_path / f'part{part}', storage, numbers=range(part * 10, part * 10 + 10))
        file = storage_file(tmp_path / f'part{part}')
        (tmp_path / 'bag').mkdir(exist_ok=True)
        file.rename(tmp_path / 'bag' / f'bag_{part}{file.suffix}')
    numbers, lost = read(tmp_path / 'bag')
    assert numbers == [*range(120)]
    assert lost == [f'there is no {METADATA}: the recording was not finished']


@pytest.mark.parametrize('storage', STORAGES)
def test_an_empty_bag_has_no_topics_and_no_times(tmp_path, storage):
    with Writer(tmp_path / 'bag', version=9, storage_plugin=STORAGES[storage]):
        pass
    with Bag(tmp_path / 'bag') as bag:
        assert bag.topics == {} and bag.start_ns is None and [*bag.messages()] == []


@pytest.mark.parametrize('storage', STORAGES)
def test_a_file_of_no_bytes_is_named(tmp_path, storage):
    write(tmp_path / 'bag', storage)
    storage_file(tmp_path / 'bag').write_bytes(b'')
    with pytest.raises(ValueError, match=r'cannot be read as a rosbag2: .*empty'), Bag(
            tmp_path / 'bag'):
        pass


@pytest.mark.parametrize('storage, compression', [
    ('mcap', None), ('mcap', CompressionMode.STORAGE), ('mcap', CompressionMode.FILE),
    ('db3', None)])
def test_of_a_truncated_bag_the_beginning_is_read_and_the_end_is_said_lost(
        tmp_path, storage, compression):
    write(tmp_path / 'bag', storage, compression, numbers=range(20_000))
    file = storage_file(tmp_path / 'bag')
    content = file.read_bytes()
    file.write_bytes(content[:len(content) * 6 // 10])
    numbers, lost = read(tmp_path / 'bag')
    assert 6_000 < len(numbers) < 16_000 and numbers[:6_000] == [*range(6_000)]
    assert numbers == sorted(set(numbers))
    assert len(lost) >= 1 and file.name.removesuffix('.zstd') in ' '.join(lost)


def test_a_recording_that_was_not_finished_is_read_from_its_start(tmp_path):
    write(tmp_path / 'bag', numbers=range(3000))
    file = storage_file(tmp_path / 'bag')
    (tmp_path / 'bag' / METADATA).unlink()
    content = file.read_bytes()
    summary = struct.unpack_from('<Q', content, len(content) - 8 - 20)[0]   # of the footer
    file.write_bytes(content[:summary])       # no index, no footer, no closing magic
    numbers, lost = read(tmp_path / 'bag')
    assert numbers == [*range(3000)]
    assert all(any(word in what for what in lost) for word in ('not finished', 'no index'))


def test_of_a_corrupt_mcap_only_the_damaged_chunk_is_lost(tmp_path):
    write(tmp_path / 'bag', compression=CompressionMode.STORAGE, numbers=range(40_000))
    file = storage_file(tmp_path / 'bag')
    content = bytearray(file.read_bytes())
    place = 60_000      # in the middle of the first chunk
    content[place:place + 200] = bytes(255 - value for value in content[place:place + 200])
    file.write_bytes(content)
    numbers, lost = read(tmp_path / 'bag')
    assert 20_000 < len(numbers) < 40_000 and numbers[-1] == 39_999
    assert numbers == sorted(numbers)
    assert len(lost) == 1 and 'at byte' in lost[0]


def test_of_a_corrupt_db3_the_rows_around_the_damage_are_read(tmp_path):
    write(tmp_path / 'bag', 'db3', numbers=range(20_000))
    file = storage_file(tmp_path / 'bag')
    content = bytearray(file.read_bytes())
    page = 4096 * (len(content) // 4096 // 3)
    content[page:page + 4096] = b'\xa5' * 4096
    file.write_bytes(content)
    numbers, lost = read(tmp_path / 'bag')
    assert len(numbers) > 10_000 and numbers == sorted(numbers) and lost
    assert file.name in ' '.join(lost)


def test_the_journal_of_a_db3_that_was_being_written_is_used(tmp_path):
    write(tmp_path / 'bag', 'db3')
    file = storage_file(tmp_path / 'bag')
    (tmp_path / 'live').mkdir()
    database = sqlite3.connect(tmp_path / 'live' / 'live_0.db3', isolation_level=None)
    database.executescript('\n'.join(sqlite3.connect(file).iterdump()))
    database.execute('PRAGMA journal_mode=WAL')
    database.execute('PRAGMA wal_autocheckpoint=0')
    row = database.execute('SELECT topic_id, data FROM messages WHERE timestamp = ?',
                           (T0 + 7 * MS,)).fetchone()
    data = TYPES.serialize_cdr(message_of(COUNT), 'sensor_msgs/msg/JointState')
    database.execute('INSERT INTO messages (topic_id, timestamp, data) VALUES (?, ?, ?)',
                     (row[0], T0 + COUNT * MS, bytes(data)))
    numbers, _ = read(tmp_path / 'live')       # while the writer has it open
    database.close()
    assert numbers == [*range(COUNT + 1)]
