from __future__ import annotations

import os

from orchestrator.checkpoint.store import Store
from orchestrator.messages import Receipt, SaveFailed, Snapshot
from orchestrator.shard_writer import ShardWriter
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec


def test_a_shard_writer_outlives_a_failed_save(tmp_path):
    spec = TensorSpec(name="a", dtype="U8", shape=(100,))
    chunks = (Chunk(spec=spec, row_offset=0, num_rows=100, begin=0, end=100),)
    snapshot = Snapshot(progress=Progress(1, 4), chunks=chunks, size_bytes=100, scalars={})
    (tmp_path / "run").write_text("in the way")
    buffer = os.memfd_create("test")
    os.ftruncate(buffer, 100)
    writer = ShardWriter(Store.open(str(tmp_path / "run")), buffer, 0, 1)
    writer.submit(7, snapshot)
    assert writer.connection.poll(10)
    failed = writer.connection.recv()
    assert isinstance(failed, SaveFailed) and failed.attempt == 7 and "in the way" in failed.error
    (tmp_path / "run").unlink()
    writer.submit(7, snapshot)
    assert writer.connection.poll(10)
    assert isinstance(writer.connection.recv(), Receipt)
    os.close(buffer)
