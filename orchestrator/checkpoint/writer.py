"""Writing a checkpoint: every rank writes and verifies its shard, then one commits by creating the manifest."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import xxhash

from orchestrator.checkpoint import keys, records
from orchestrator.checkpoint.attempts import check_not_superseded
from orchestrator.checkpoint.collector import collector_paused
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import ChunkEntry, FileEntry, Manifest, TensorEntry
from orchestrator.checkpoint.policy import Verify
from orchestrator.checkpoint.read_ahead import read_ahead
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, StorageError, UnbrokenError
from trainers.fingerprint import combine, format_fingerprint, partial_fingerprint
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

_BLOCK_BYTES = 256 << 10  # stays in a core's cache: three hashes take little more time than one
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class ChunkReceipt:
    """One chunk as it lies in a shard file."""

    spec: TensorSpec
    row_offset: int
    num_rows: int
    begin: int
    """First byte, from the start of the file."""
    end: int
    hash: str
    fingerprint: int
    """These rows' share in the fingerprint of the tensor."""


@dataclass(frozen=True, kw_only=True)
class ShardReceipt:
    """A shard file that was written, read back and found to be what was meant. Can be pickled."""

    file: FileEntry
    chunks: tuple[ChunkReceipt, ...]


@dataclass(frozen=True, kw_only=True)
class CommitInfo:
    """What the manifest says besides the shards. The fields are those of `Manifest`."""

    run_id: str
    attempt: int
    progress: Progress
    reason: str
    strategy: str
    config_hash: str
    versions: Mapping[str, str]
    scalars: Mapping[str, Any]
    health: Mapping[str, Any]
    store: Mapping[str, Any] = field(default_factory=dict)
    verify: Verify = "full"
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rank's file, ready to be stored. Holds no copy of the data."""

    name: str
    header: bytes
    data: memoryview
    chunks: Sequence[Chunk]
    hashed: Future[ShardReceipt] = field(default_factory=Future)
    """It may be written, but not verified, before this is there."""

    @property
    def receipt(self) -> ShardReceipt:
        """Waits until it is hashed; raises what kept it from that."""
        return self.hashed.result()


def lay_out_shard(name: str, chunks: Sequence[Chunk], data: memoryview, metadata: Mapping[str, str]) -> Shard:
    """A rank's chunks as the safetensors file that they will be.

    Args:
        name: `keys.shard_name(rank, world_size)`.
        chunks: back to back in `data`, at most one of each tensor. For other readers' sake put larger element
            types first: safetensors' torch reader wants every tensor aligned to its element size.
        data: exactly the data section. Must not change until it is stored: it is written from where it lies.
        metadata: the file's `__metadata__`.
    """
    data = data.cast("B")
    return Shard(name=name, header=safetensors_header(chunks, len(data), metadata), data=data, chunks=chunks)


def hash_shard(shard: Shard) -> ShardReceipt:
    """Hash all of it."""
    header = shard.header
    file_hash = xxhash.xxh3_128(header)
    receipts = tuple(_receipt(chunk, shard.data, len(header), file_hash) for chunk in shard.chunks)
    file = FileEntry(
        name=shard.name,
        size_bytes=len(header) + len(shard.data),
        hash=file_hash.hexdigest(),
        header_hash=xxhash.xxh3_128_hexdigest(header),
        header_bytes=len(header),
    )
    return ShardReceipt(file=file, chunks=receipts)


def store_shard(store: Store, ref: CheckpointRef, shard: Shard, verify: Verify = "full") -> None:
    """Write a shard, read it back and verify it. May be repeated after any error.

    Args:
        shard: what it should have been when it is read back; may still be being hashed while it is written.
        verify: how much is read back, as `CheckpointConfig.verify` says.

    Raises:
        StorageError: writing failed, or the store returned other bytes.
    """
    key = ref.file(shard.name)
    store.write(key, [shard.header, shard.data])
    _read_back(store, key, shard, verify)


def commit(store: Store, receipts: Sequence[ShardReceipt], info: CommitInfo) -> Manifest:
    """Make the checkpoint exist. May be repeated with the same receipts after any error.

    Raises:
        SupersededError: a newer attempt owns the run; nothing was created.
        AlreadyExistsError: another checkpoint was committed under this reference.
        StorageError: it was not committed.
        UnknownOutcomeError: nobody knows; look before deciding, delete nothing.
        UnbrokenError: the receipts are no whole state; nothing was created.
    """
    manifest = _manifest(receipts, info)
    ref = manifest.ref
    names = [keys.shard_name(rank, manifest.world_size) for rank in range(manifest.world_size)]
    problems = [] if names and names == [file.name for file in manifest.files] else ["not one shard of each rank"]
    problems += manifest.problems()
    if problems:
        raise UnbrokenError(f"checkpoint {ref} is not committed, it would not be whole: {'; '.join(problems[:3])}")
    check_not_superseded(store, info.attempt)
    try:
        store.create(ref.manifest, manifest.to_bytes())
    except AlreadyExistsError:
        # By a newer attempt that closed this checkpoint, or perhaps by an earlier call of ours that never learnt that
        # it had succeeded: compared below.
        check_not_superseded(store, info.attempt)
    committed = Manifest.from_bytes(store.read(ref.manifest), ref.manifest)
    if (committed.files, committed.tensors) != (manifest.files, manifest.tensors):
        raise AlreadyExistsError(f"{store.url}/{ref.manifest} exists with other content; it is left as it is")
    return committed


def safetensors_header(chunks: Sequence[Chunk], data_bytes: int, metadata: Mapping[str, str]) -> bytes:
    """The length in 8 bytes, then JSON, padded with spaces so that the data section is aligned to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    next_byte = 0
    for chunk in chunks:
        spec = chunk.spec
        assert chunk.begin == next_byte and chunk.end - chunk.begin == chunk.num_rows * spec.row_bytes, chunk
        if not chunk.num_rows:
            continue  # a scalar that another rank holds has no shape that says so
        assert spec.name not in entries, f"two chunks of {spec.name} in one shard"
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": [chunk.num_rows, *spec.shape[1:]] if spec.shape else [],
            "data_offsets": [chunk.begin, chunk.end],
        }
        next_byte = chunk.end
    assert next_byte == data_bytes, (next_byte, data_bytes)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _receipt(chunk: Chunk, shard: memoryview, header_bytes: int, file_hash: xxhash.xxh3_128) -> ChunkReceipt:
    """Takes the chunk's hash and fingerprint, and adds it to the file's hash, while a block of rows is in the cache."""
    spec, chunk_hash, fingerprints = chunk.spec, xxhash.xxh3_128(), []
    data = shard[chunk.begin : chunk.end]
    num_rows = max(1, _BLOCK_BYTES // max(1, spec.row_bytes))
    for row in range(0, chunk.num_rows, num_rows):
        block = data[row * spec.row_bytes : (row + num_rows) * spec.row_bytes]
        file_hash.update(block)
        chunk_hash.update(block)
        fingerprints.append(partial_fingerprint(spec, chunk.row_offset + row, block))
    return ChunkReceipt(
        spec=spec,
        row_offset=chunk.row_offset,
        num_rows=chunk.num_rows,
        begin=header_bytes + chunk.begin,
        end=header_bytes + chunk.end,
        hash=chunk_hash.hexdigest(),
        fingerprint=combine(fingerprints),
    )


def _read_back(store: Store, key: str, shard: Shard, verify: Verify) -> None:
    """Compare what the store holds with what was written.

    Raises:
        StorageError: it differs, or could not be read; writing again is safe.
    """
    file, size_bytes = shard.receipt.file, store.size(key)
    if size_bytes != file.size_bytes:
        raise StorageError(
            f"{store.url}/{key} reads back as {size_bytes} bytes, written were {file.size_bytes}; write it again"
        )
    if verify == "full":
        found = xxhash.xxh3_128()
        for piece in read_ahead(store, key, size_bytes):
            found.update(piece)
        if found.hexdigest() != file.hash:
            raise StorageError(
                f"{store.url}/{key} reads back with hash {found.hexdigest()}, written was {file.hash}; write it again"
            )
    elif verify == "sample":
        written = _Joined(shard.header, shard.data)

        def right(place: tuple[int, int]) -> bool:
            return store.read(key, *place) == written[slice(*place)]

        places = _samples(size_bytes)
        with ThreadPoolExecutor(store.backend.pieces_at_once, thread_name_prefix="read-back") as pool:
            for (begin, end), is_right in zip(places, pool.map(right, places), strict=True):
                if not is_right:
                    raise StorageError(
                        f"{store.url}/{key} reads back otherwise in bytes {begin} to {end}; write it again"
                    )


def _samples(size_bytes: int) -> list[tuple[int, int]]:
    """Ranges of `_SAMPLE_BYTES`: both ends, and one of every hundred places between, at random."""
    places = range(_SAMPLE_BYTES, max(_SAMPLE_BYTES, size_bytes - _SAMPLE_BYTES), _SAMPLE_BYTES)
    chosen = random.sample(places, -(-len(places) // 100))
    begins = sorted({0, *chosen, max(0, size_bytes - _SAMPLE_BYTES)})
    return [(begin, min(begin + _SAMPLE_BYTES, size_bytes)) for begin in begins]


class _Joined:
    """Header and data as the bytes of one file, of which slices can be taken without a copy of all."""

    def __init__(self, header: bytes, data: memoryview) -> None:
        self._header, self._data = header, data

    def __getitem__(self, wanted: slice) -> bytes:
        size = len(self._header)
        data = self._data[max(0, wanted.start - size) : max(0, wanted.stop - size)]
        return self._header[wanted.start : wanted.stop] + bytes(data)


@collector_paused()
def _manifest(receipts: Sequence[ShardReceipt], info: CommitInfo) -> Manifest:
    receipts = sorted(receipts, key=lambda receipt: receipt.file.name)
    found: dict[TensorSpec, list[tuple[ChunkEntry, int]]] = {}
    for index, receipt in enumerate(receipts):
        for c in receipt.chunks:
            entry = ChunkEntry(index, c.begin, c.end, c.row_offset, c.num_rows, c.hash)
            found.setdefault(c.spec, []).append((entry, c.fingerprint))
    tensors = {
        spec.name: TensorEntry(
            dtype=spec.dtype,
            shape=spec.shape,
            fingerprint=format_fingerprint(combine(fingerprint for _, fingerprint in parts)),
            chunks=tuple(sorted((entry for entry, _ in parts if entry.num_rows), key=lambda entry: entry.row_offset)),
        )
        for spec, parts in sorted(found.items(), key=lambda item: item[0].name)
    }
    return Manifest(
        run_id=info.run_id,
        attempt=info.attempt,
        progress=info.progress,
        reason=info.reason,
        world_size=len(receipts),
        strategy=info.strategy,
        config_hash=info.config_hash,
        versions=info.versions,
        scalars=info.scalars,
        health=info.health,
        store=info.store,
        verify=info.verify,
        metrics=info.metrics,
        created_at=records.now(),
        files=tuple(receipt.file for receipt in receipts),
        tensors=tensors,
    )
