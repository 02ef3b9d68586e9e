"""How the control path grows with the number of ranks and checkpoints, through the real code, without the ranks.

The same model is spread over more and more ranks, every tensor over all of them: the receipts that their agents would
send are made up, everything after that is what runs in rank 0's agent, or in one starting rank. The exponent is the
slope of the last half of the points, on logarithmic axes: 1 is linear, 2 the square. Objects that no longer fit into
the caches of the processor add to it, so the goal leaves some room above 1.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.control_path import attempt_and_save
from bench.figure import Figure
from bench.large_cluster import simulated_goodput
from bench.programs import workplace
from orchestrator.checkpoint.catalog import list_checkpoints, newest_stable
from orchestrator.checkpoint.keys import shard_name
from orchestrator.checkpoint.manifest import FileEntry, Manifest
from orchestrator.checkpoint.policy import RetentionConfig, judge
from orchestrator.checkpoint.reader import Destination, plan
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import ChunkReceipt, CommitInfo, ShardReceipt, commit
from trainers.progress import Progress
from trainers.shards import TensorSpec

_RANKS = (8, 64, 512, 2048, 8192, 16384)
_CHECKPOINTS = (100, 1000, 3000, 10_000)
_REPEATS = 3
_GOAL = 1.15
_SPECS = [TensorSpec(name=f"model/{index:02d}.weight", dtype="F32", shape=(16384, 16)) for index in range(8)]
_HASH = "0123456789abcdef0123456789abcdef"

_NEWEST, _READ, _PLAN = (
    "find the newest checkpoint",
    "read and check a manifest",
    "plan a restore, one of as many ranks",
)
_LIFE = "launch, watch, save and end an attempt"
_AT_A_RESTART = (_NEWEST, _READ, _PLAN, _LIFE)

Points = list[tuple[float, float]]


def measure(quick: bool) -> list[Figure]:
    """The exponent of every path, the size of a manifest, and the goodput of 10,000 nodes."""
    ranks, checkpoints = ((8, 16, 32), (5, 10, 20)) if quick else (_RANKS, _CHECKPOINTS)
    paths: dict[str, Points] = {}
    sizes: Points = []
    for world_size in ranks:
        times, size = _at(world_size)
        sizes.append((world_size, size))
        for name, seconds in times.items():
            paths.setdefault(name, []).append((world_size, 1000 * seconds))
    figures = [_exponent(name, "ranks", points) for name, points in paths.items()]
    last, size = sizes[-1]
    exponent = Figure(name="size of a manifest: exponent in ranks", value=_slope(sizes), goal=_GOAL)
    figures.append(replace(exponent, notes={f"MB, {len(_SPECS)} tensors, {last:,} ranks": size / 1e6}))
    figures += [_exponent(name, "checkpoints", points) for name, points in _listing(checkpoints).items()]
    return figures + simulated_goodput([paths[name] for name in _AT_A_RESTART], days=0.2 if quick else 10)


def _exponent(name: str, of: str, points: Points) -> Figure:
    (most, longest), (least, shortest) = points[-1], points[0]
    notes = {"ms": {f"at {least:,}": shortest, f"at {most:,}": longest}}
    return Figure(name=f"{name}: exponent in {of}", value=_slope(points), goal=_GOAL, points=points, notes=notes)


def _slope(points: Points) -> float:
    """Of the least squares line through the last half of the points, at least three, on logarithmic axes."""
    last = points[-max(3, -(-len(points) // 2)) :]
    line = statistics.linear_regression([math.log(x) for x, _ in last], [math.log(y) for _, y in last])
    return line.slope


def _at(world_size: int) -> tuple[dict[str, float], int]:
    """Seconds of every path at this many ranks, and the bytes of the manifest."""
    receipts = [_receipt(rank, world_size) for rank in range(world_size)]
    with workplace() as folder:
        store = Store.open(str(folder))
        steps = iter(range(1, 1 << 30))
        commit_s = _seconds(lambda: commit(store, receipts, _info(next(steps))))
        manifest = commit(store, receipts, _info(next(steps)))
        for file in manifest.files:
            (folder / manifest.ref.folder / file.name).touch()
        newest_s = _seconds(lambda: newest_stable(store))
    data = manifest.to_bytes()
    whole = [_destination(spec, 0, spec.num_rows) for spec in _SPECS]
    rows = _SPECS[0].num_rows // world_size
    shard = [_destination(spec, world_size // 2 * rows, rows) for spec in _SPECS]
    times = {
        "commit": commit_s,
        "write a manifest": _seconds(manifest.to_bytes),
        _READ: _seconds(lambda: Manifest.from_bytes(data, "")),
        _NEWEST: newest_s,
        _PLAN: _seconds(lambda: plan(manifest, shard)),
        "plan a restore on one rank": _seconds(lambda: plan(manifest, whole)),
        _LIFE: _seconds(lambda: attempt_and_save(world_size, receipts)),
    }
    return times, len(data)


def _seconds(call: Callable[[], object]) -> float:
    """The median of some calls, without what the garbage collector does in between."""
    times = []
    for _ in range(_REPEATS):
        gc.collect()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _receipt(rank: int, world_size: int) -> ShardReceipt:
    chunks, end = [], 0
    for index, spec in enumerate(_SPECS):
        rows = spec.num_rows // world_size
        begin, end = end, end + rows * spec.row_bytes
        chunks.append(
            ChunkReceipt(
                spec=spec,
                row_offset=rank * rows,
                num_rows=rows,
                begin=begin,
                end=end,
                hash=_HASH,
                fingerprint=rank * 1_000_003 + index,
            )
        )
    name = shard_name(rank, world_size)
    file = FileEntry(name=name, size_bytes=end, hash=_HASH, header_hash=_HASH, header_bytes=0)
    return ShardReceipt(file=file, chunks=tuple(chunks))


def _info(step: int) -> CommitInfo:
    return CommitInfo(
        run_id=uuid.uuid4().hex[:12],
        attempt=1,
        progress=Progress(step, step),
        reason="interval",
        strategy="fsdp",
        config_hash="",
        versions={},
        scalars={},
        health={"ok": True},
    )


def _destination(spec: TensorSpec, first: int, num_rows: int) -> Destination:
    out = memoryview(bytearray(num_rows * spec.row_bytes))
    return Destination(spec=spec, row_offset=first, num_rows=num_rows, out=out)


def _listing(counts: Sequence[int]) -> dict[str, Points]:
    """Milliseconds of what looks at checkpoints, by how many there are."""
    paths: dict[str, Points] = {}
    manifest = commit(Store.open(f"memory://{uuid.uuid4().hex}"), [_receipt(0, 1)], _info(1))
    with workplace() as folder:
        store, made = Store.open(str(folder)), 0
        for count in counts:
            for step in range(made + 1, count + 1):
                _put(folder, replace(manifest, progress=Progress(step, step)))
            made = count
            infos = list_checkpoints(store)
            assert len(infos) == count and all(info.state == "stable" for info in infos)
            calls: dict[str, Callable[[], Any]] = {
                "list all checkpoints": lambda: list_checkpoints(store),
                "find the newest of them": lambda: newest_stable(store),
                "judge what is kept": lambda infos=infos: judge(infos, RetentionConfig(every_steps=10), 1),
            }
            for name, call in calls.items():
                paths.setdefault(name, []).append((count, 1000 * _seconds(call)))
    return paths


def _put(folder: Path, manifest: Manifest) -> None:
    """A checkpoint as a commit leaves it, but not made durable: that is 10,000 waits for the disk."""
    place = folder / manifest.ref.folder
    place.mkdir(parents=True)
    (folder / manifest.ref.manifest).write_bytes(manifest.to_bytes())
    for file in manifest.files:
        (place / file.name).touch()
