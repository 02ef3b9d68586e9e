"""A small state made with numpy, and how the ranks of a world of any size would save and load it."""

from __future__ import annotations

import numpy as np

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.reader import Destination, expected_fingerprints, read_rows
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import CommitInfo, ShardReceipt, commit
from orchestrator.errors import DamagedCheckpointError
from tests.orchestrator.checkpoint.shards import write_shard
from trainers.fingerprint import combine, format_fingerprint, partial_fingerprint
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

SPECS = [
    TensorSpec(name="model/conv.weight", dtype="F32", shape=(5, 3, 3, 3)),  # narrow rows, uneven over 2, 3, 4 ranks
    TensorSpec(name="model/proj.weight", dtype="F32", shape=(6, 80)),  # wide rows
    TensorSpec(name="model/proj.bias", dtype="F32", shape=(6,)),
    TensorSpec(name="ema/main/proj.weight", dtype="BF16", shape=(7, 4)),
    TensorSpec(name="optimizer/step", dtype="F32", shape=()),  # a 0-dimensional tensor lies on one rank
    TensorSpec(name="model/mask", dtype="BOOL", shape=(2, 3)),
]

State = dict[str, np.ndarray]


def make_state(seed: int) -> State:
    """For each tensor its bytes, (num_rows, row_bytes) uint8."""
    generator = np.random.default_rng(seed)
    return {spec.name: generator.integers(0, 256, (spec.num_rows, spec.row_bytes), np.uint8) for spec in SPECS}


def rows_of(spec: TensorSpec, rank: int, world_size: int) -> tuple[int, int]:
    """As FSDP cuts: ceil(rows / world size) each, the last ranks fewer or none."""
    each = -(-spec.num_rows // world_size)
    return min(rank * each, spec.num_rows), min((rank + 1) * each, spec.num_rows)


def snapshot(state: State, rank: int, world_size: int) -> tuple[list[Chunk], memoryview]:
    chunks, parts, begin = [], [], 0
    for spec in SPECS:
        first, last = rows_of(spec, rank, world_size)
        part = state[spec.name][first:last].tobytes()
        chunks.append(Chunk(spec=spec, row_offset=first, num_rows=last - first, begin=begin, end=begin + len(part)))
        parts.append(part)
        begin += len(part)
    return chunks, memoryview(b"".join(parts))


def make_info(step: int, attempt: int, **changes) -> CommitInfo:
    fields = {
        "run_id": "0123456789ab",
        "attempt": attempt,
        "progress": Progress(step, step * 10),
        "reason": "interval",
        "strategy": "fsdp",
        "config_hash": "c0ffee",
        "versions": {"torch": "2.13.0"},
        "scalars": {"optimizer": {"step": step}, "ema": {"main": {"num_updates": step}}},
        "health": {"ok": True},
    }
    return CommitInfo(**(fields | changes))


def write_shards(store: Store, state: State, world_size: int, ref: CheckpointRef) -> list[ShardReceipt]:
    receipts = []
    for rank in range(world_size):
        chunks, data = snapshot(state, rank, world_size)
        receipts.append(write_shard(store, ref.shard(rank, world_size), chunks, data, {"rank": str(rank)}))
    return receipts


def save(store: Store, state: State, *, step: int, attempt: int = 1, world_size: int = 3, **changes) -> Manifest:
    info = make_info(step, attempt, **changes)
    receipts = write_shards(store, state, world_size, CheckpointRef(info.progress.samples_seen, attempt))
    return commit(store, receipts, info)


def load(store: Store, manifest: Manifest, world_size: int) -> State:
    """What all ranks of a world hold after a restore, with the check across ranks that belongs to it."""
    state = {spec.name: np.full((spec.num_rows, spec.row_bytes), 0xAA, np.uint8) for spec in SPECS}
    partials: dict[str, list[int]] = {spec.name: [] for spec in SPECS}
    for rank in range(world_size):
        wanted = []
        for spec in SPECS:
            first, last = rows_of(spec, rank, world_size)
            out = memoryview(state[spec.name].reshape(-1))[first * spec.row_bytes : last * spec.row_bytes]
            wanted.append(Destination(spec=spec, row_offset=first, num_rows=last - first, out=out))
        read_rows(store, manifest, wanted)
        for part in wanted:
            partials[part.spec.name].append(partial_fingerprint(part.spec, part.row_offset, part.out))
    loaded = {name: format_fingerprint(combine(parts)) for name, parts in partials.items()}
    if loaded != expected_fingerprints(manifest):
        raise DamagedCheckpointError("fingerprint")
    return state


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
