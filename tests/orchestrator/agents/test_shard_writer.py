from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from orchestrator.agents.shard_writer import HeldSnapshot, ShardWriter
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.messages.saves import Receipt, SaveDelayed, SaveFailed, Snapshot
from orchestrator.sections import CheckpointConfig
from orchestrator.stores import Stores
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

CHUNK = Chunk(spec=TensorSpec(name="a", dtype="U8", shape=(100,)), row_offset=0, num_rows=100, begin=0, end=100)


@pytest.fixture
def buffer() -> Iterator[int]:
    handle = os.memfd_create("test")
    os.ftruncate(handle, 100)
    yield handle
    os.close(handle)


def held() -> HeldSnapshot:
    return HeldSnapshot(snapshot=Snapshot(progress=Progress(1, 4), chunks=(CHUNK,), size_bytes=100, scalars={}))


def make_writer(folder, buffer: int, deadline_s: float) -> ShardWriter:
    return ShardWriter(
        Stores(storage=Store.open(str(folder / "run"))), buffer, 0, 1, CheckpointConfig(deadline_s=deadline_s)
    )


def hear(writer: ShardWriter) -> object:
    assert writer.connection.poll(10)
    return writer.connection.recv()


def test_a_shard_writer_outlives_a_failed_save(tmp_path, buffer):
    (tmp_path / "run").write_text("in the way")
    writer = make_writer(tmp_path, buffer, deadline_s=0.0)
    writer.submit(7, held())
    assert isinstance(hear(writer), SaveDelayed)
    failed = hear(writer)
    assert isinstance(failed, SaveFailed) and failed.attempt == 7 and "in the way" in failed.error
    (tmp_path / "run").unlink()
    writer.submit(7, held())
    assert isinstance(hear(writer), Receipt)


def test_a_write_is_tried_again_until_it_succeeds(tmp_path, buffer):
    (tmp_path / "run").write_text("in the way")
    writer = make_writer(tmp_path, buffer, deadline_s=60.0)
    writer.submit(7, held())
    assert isinstance(hear(writer), SaveDelayed)
    (tmp_path / "run").unlink()
    assert isinstance(hear(writer), Receipt)


def test_what_nobody_waits_for_is_not_tried_again(tmp_path, buffer):
    (tmp_path / "run").write_text("in the way")
    writer = make_writer(tmp_path, buffer, deadline_s=60.0)
    writer.submit(7, held())
    assert isinstance(hear(writer), SaveDelayed)
    writer.drop()
    assert isinstance(hear(writer), SaveFailed)


def test_what_keeps_a_shard_from_being_hashed_fails_the_save(tmp_path, buffer, monkeypatch):
    def broken(shard):
        raise MemoryError("no room")

    monkeypatch.setattr("orchestrator.agents.shard_writer.hash_shard", broken)
    writer, snapshot = make_writer(tmp_path, buffer, deadline_s=0.0), held()
    writer.submit(7, snapshot)
    failed = hear(writer)
    assert isinstance(failed, SaveFailed) and "no room" in failed.error
    assert snapshot.recall(pending=False).chunks == ()  # and no trainer takes it for sound


def test_a_snapshot_that_grows_is_mapped_anew(tmp_path, buffer):
    writer = make_writer(tmp_path, buffer, deadline_s=0.0)
    writer.submit(7, held())
    first = hear(writer)
    os.pwrite(buffer, bytes(range(200)), 0)
    grown = replace(CHUNK, spec=replace(CHUNK.spec, shape=(200,)), num_rows=200, end=200)
    writer.submit(8, HeldSnapshot(snapshot=replace(held().snapshot, chunks=(grown,), size_bytes=200)))
    second = hear(writer)
    assert isinstance(first, Receipt) and isinstance(second, Receipt)
    assert (tmp_path / "run" / CheckpointRef(4, 8).shard(0, 1)).read_bytes().endswith(bytes(range(200)))


def test_a_snapshot_that_changed_in_memory_is_not_stored_a_second_time(tmp_path, buffer):
    writer = make_writer(tmp_path, buffer, deadline_s=0.0)
    snapshot = held()
    writer.submit(7, snapshot)
    assert isinstance(hear(writer), Receipt)
    os.pwrite(buffer, b"x", 50)
    writer.submit(8, snapshot)
    failed = hear(writer)
    assert isinstance(failed, SaveFailed) and "changed in memory" in failed.error


def test_what_both_threads_tell_at_once_arrives_whole(tmp_path, buffer):
    """A pipe takes 64 KiB in one piece."""
    writer = make_writer(tmp_path, buffer, deadline_s=0.0)
    long = replace(held().snapshot, scalars={str(number): 0.0 for number in range(100_000)})
    too_long = replace(held().snapshot, size_bytes=200)  # than the buffer: laying it out fails, in the first thread
    writer.submit(7, HeldSnapshot(snapshot=long))
    assert writer.connection.poll(10)
    for _ in range(20):
        writer.submit(7, HeldSnapshot(snapshot=too_long))
    told = [type(hear(writer)) for _ in range(21)]
    assert told.count(Receipt) == 1 and told.count(SaveFailed) == 20
