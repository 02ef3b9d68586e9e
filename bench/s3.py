"""Saves and restores on S3 beside uploads and ranged downloads of bare clients, of the same bytes, in turn.

On a sink that drains what is sent and serves zeros: what the client costs, without hashes. On a real server, which
shares the cores with it: from a snapshot to its commit, hashed and read back, all of it or 1 %; and a restore, checked.
The goal is about the fastest of all bare clients, so without boto3 and obstore (extra `bench`) it is not judged.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from botocore.config import Config

from bench.comparison import Comparison
from bench.not_measured import NotMeasured
from bench.packages import INSTALL, versions
from bench.room import missing_room
from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import load_manifest
from orchestrator.checkpoint.keys import CheckpointRef, shard_name
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.policy import Verify
from orchestrator.checkpoint.reader import Destination, read_rows
from orchestrator.checkpoint.s3_requests import OPTIONS
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import CommitInfo, commit, hash_shard, lay_out_shard, store_shard
from tests.s3.server import BUCKET, KEY, SECRET, S3Server
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

_UPLOAD_GOAL, _DOWNLOAD_GOAL = 1.25, 1.3
_RANGE_BYTES = 16 << 20
_AT_ONCE = 8
_WARM_UP = 1
_IN_MEMORY = "/dev/shm"
"""A container has 64 MB of it, unless it is asked for more."""
_OTHER_OBJECTS = 6
_BARE = versions(("boto3", "obstore"))
_OURS, _SAMPLED = "", " (1 % read back)"
"""Names of our arms: what they add to the name of a comparison. The first one reads everything back."""

Arms = dict[str, Callable[[], object]]


def measure(quick: bool) -> list[Comparison] | list[NotMeasured]:
    """Ours beside each bare client; the fastest of them is the one that the goal is about."""
    num_pairs, size = (2, 32 << 20) if quick else (10, 256 << 20)
    # In memory, so that no disk is measured: every checkpoint of both arms of ours, and what each other one stores.
    kept = size * (2 * (_WARM_UP + num_pairs) + _OTHER_OBJECTS)
    if (reason := missing_room(disk_bytes=kept, memory_bytes=kept, folder=_IN_MEMORY)) is not None:
        return [NotMeasured(name="s3", reason=reason)]
    comparisons = []
    for target, endpoint in (("sink", _sink), ("server", _server)):
        with endpoint() as url, tempfile.NamedTemporaryFile(dir=_IN_MEMORY) as file:
            data = os.urandom(1 << 20) * (size >> 20)
            file.write(data)
            file.flush()
            up, down = _arms(url, data, file.name)
            words = ("Store.write", "Store.read_into")
            if target == "server":
                words, checkpoint = ("save, committed", "restore"), _Checkpoint(memoryview(data))
                up[_OURS], up[_SAMPLED] = checkpoint.save, partial(checkpoint.save, "sample")
                down[_OURS] = checkpoint.restore
            for what, goal, arms in zip(words, (_UPLOAD_GOAL, _DOWNLOAD_GOAL), (up, down), strict=True):
                comparisons += _compare(f"{size >> 20} MiB, {target}: {what}", arms, num_pairs, goal, size)
    comparisons[0].notes |= {"versions": _BARE}
    return comparisons


def _compare(name: str, arms: Arms, num_pairs: int, goal: float, size: int) -> Iterator[Comparison]:
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    cpu: dict[str, float] = dict.fromkeys(arms, 0.0)
    for pair in range(_WARM_UP + num_pairs):
        for arm in (arms, reversed(arms))[pair % 2]:
            began, used = time.perf_counter(), time.process_time()
            arms[arm]()
            times[arm].append(time.perf_counter() - began)
            cpu[arm] += (time.process_time() - used) if pair >= _WARM_UP else 0.0
    bare = [arm for arm in arms if arm not in (_OURS, _SAMPLED)]
    fastest = min(bare, key=lambda arm: sorted(times[arm][_WARM_UP:])[num_pairs // 2])
    for ours, arm in [(_OURS, arm) for arm in bare] + [(_SAMPLED, fastest)] * (_SAMPLED in arms):
        yield Comparison(
            name=name + ours,
            reference_name=arm,
            ours_s=times[ours][_WARM_UP:],
            reference_s=times[arm][_WARM_UP:],
            goal=goal if arm == fastest and INSTALL not in _BARE.values() else None,
            notes={f"CPU s/GB, of {arm}": [cpu[one] / num_pairs / size * 1e9 for one in (ours, arm)]},
        )


def _arms(endpoint: str, data: bytes, path: str) -> tuple[Arms, Arms]:
    """Uploads and downloads. Downloads read what the upload of the same arm stored."""
    spans = [(begin, min(begin + _RANGE_BYTES, len(data))) for begin in range(0, len(data), _RANGE_BYTES)]

    def in_threads(read: Callable[[int, int], Any]) -> list[int]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda span: len(read(*span)), spans))

    store, view, out = Store.open(f"s3://{BUCKET}/ours"), memoryview(data), memoryview(bytearray(len(data)))
    fs = fsspec.filesystem("s3", **OPTIONS)
    files, begins, ends = [f"{BUCKET}/s3fs"] * len(spans), [a for a, _ in spans], [b for _, b in spans]
    up: Arms = {
        _OURS: lambda: store.write("object", [view[:1000], view[1000:]]),
        "s3fs put_file": lambda: fs.put_file(path, f"{BUCKET}/s3fs"),
    }
    down: Arms = {
        _OURS: lambda: in_threads(lambda begin, end: out[: store.read_into("object", begin, [out[begin:end]])]),
        "s3fs cat_ranges": lambda: fs.cat_ranges(files, begins, ends),
    }
    if _BARE["boto3"] != INSTALL:
        options = {name: value for name, value in OPTIONS["config_kwargs"].items() if name != "retries"}
        client = importlib.import_module("boto3").client("s3", config=Config(**options))
        transfer = importlib.import_module("boto3.s3.transfer").TransferConfig(
            multipart_chunksize=_RANGE_BYTES, max_concurrency=_AT_ONCE
        )
        up["boto3 upload_file"] = lambda: client.upload_file(path, BUCKET, "boto3", Config=transfer)
        down["boto3 get_object"] = lambda: in_threads(
            lambda begin, end: client.get_object(Bucket=BUCKET, Key="boto3", Range=f"bytes={begin}-{end - 1}")[
                "Body"
            ].read()
        )
    if _BARE["obstore"] != INSTALL:
        obstore = importlib.import_module("obstore")
        bare = obstore.store.S3Store(
            BUCKET,
            endpoint=endpoint,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            virtual_hosted_style_request=False,
            unsigned_payload=True,
            client_options={"allow_http": True, "timeout": "120s"},
        )
        put = {"chunk_size": _RANGE_BYTES, "max_concurrency": _AT_ONCE}
        up["obstore put file"] = lambda: obstore.put(bare, "obstore", Path(path), **put)
        up["obstore put bytes"] = lambda: obstore.put(bare, "obstore", data, **put)
        down["obstore get_range"] = lambda: in_threads(
            lambda begin, end: obstore.get_range(bare, "obstore", start=begin, end=end)
        )
    return up, down


class _Checkpoint:
    """One of one rank, with a tensor in each MiB."""

    def __init__(self, data: memoryview) -> None:
        self._store = Store.open(f"s3://{BUCKET}/run")
        self._data, self._out = data, memoryview(bytearray(len(data)))
        self._chunks = [
            Chunk(
                spec=TensorSpec(name=f"model/{begin >> 20}", dtype="F32", shape=(512, 512)),
                row_offset=0,
                num_rows=512,
                begin=begin,
                end=begin + (1 << 20),
            )
            for begin in range(0, len(data), 1 << 20)
        ]
        self._attempt = claim_attempt(self._store, {})
        self._step = 0
        self._manifest: Manifest | None = None

    def save(self, verify: Verify = "full") -> None:
        self._step += 1
        info = CommitInfo(
            run_id="bench",
            attempt=self._attempt,
            progress=Progress(self._step, self._step),
            reason="interval",
            strategy="fsdp",
            config_hash="bench",
            versions={},
            scalars={},
            health={"ok": True},
            verify=verify,
        )
        shard = lay_out_shard(shard_name(0, 1), self._chunks, self._data, {})
        with ThreadPoolExecutor(1) as hasher:  # beside it, as an agent does
            hasher.submit(lambda: shard.hashed.set_result(hash_shard(shard)))
            store_shard(self._store, CheckpointRef(self._step, self._attempt), shard, verify)
        self._manifest = commit(self._store, [shard.receipt], info)

    def restore(self) -> None:
        assert self._manifest is not None
        wanted = [
            Destination(spec=chunk.spec, row_offset=0, num_rows=512, out=self._out[chunk.begin : chunk.end])
            for chunk in self._chunks
        ]
        read_rows(self._store, load_manifest(self._store, self._manifest.ref), wanted)


@contextmanager
def _sink() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-m", "bench.s3_sink"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        environment = {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        os.environ.update(environment, AWS_DEFAULT_REGION="us-east-1")
        yield endpoint
    finally:
        process.kill()
        process.wait()


@contextmanager
def _server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=_IN_MEMORY) as folder:
        server = S3Server(Path(folder))
        try:
            server.start()
            os.environ.update(server.environment())
            yield server.endpoint
        finally:
            server.kill()
