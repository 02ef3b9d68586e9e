"""A shard hashed and written in one go, as a rank does that meets no trouble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.policy import Verify
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import Shard, ShardReceipt, hash_shard, lay_out_shard, store_shard
from trainers.shards import Chunk


def prepare_shard(name: str, chunks: Sequence[Chunk], data: memoryview, metadata: Mapping[str, str]) -> Shard:
    shard = lay_out_shard(name, chunks, data, metadata)
    shard.hashed.set_result(hash_shard(shard))
    return shard


def write_shard(
    store: Store,
    key: str,
    chunks: Sequence[Chunk],
    data: memoryview,
    metadata: Mapping[str, str],
    verify: Verify = "full",
) -> ShardReceipt:
    """Args: key: `CheckpointRef.shard(rank, world_size)`."""
    folder, _, name = key.rpartition("/")
    ref = CheckpointRef.parse(folder.rpartition("/")[2])
    assert ref is not None, key
    shard = prepare_shard(name, chunks, data, metadata)
    store_shard(store, ref, shard, verify)
    return shard.receipt
