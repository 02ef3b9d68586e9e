"""Writing a checkpoint: every rank writes and verifies its shard, then one commits by creating the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from orchestrator.checkpoint import keys, records
from orchestrator.checkpoint.attempts import check_not_superseded
from orchestrator.checkpoint.manifest import ChunkEntry, FileEntry, Manifest, TensorEntry
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, StorageError, UnbrokenError
from trainers.fingerprint import combine, format_fingerprint, partial_fingerprint
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

_READ_BACK_BYTES = 16 << 20


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


def write_shard(
    store: Store, key: str, chunks: Sequence[Chunk], data: memoryview, metadata: Mapping[str, str]
) -> ShardReceipt:
    """Write a rank's chunks as a safetensors file, read it back and verify it.

    Args:
        key: `CheckpointRef.shard(rank, world_size)`.
        chunks: back to back in `data`, at most one of each tensor. For other readers' sake put larger element
            types first: safetensors' torch reader wants every tensor aligned to its element size.
        data: exactly the data section. Must not change meanwhile; it is written from where it lies.
        metadata: the file's `__metadata__`.

    Raises:
        StorageError: writing failed, or the store returned other bytes; writing again is safe.
    """
    data = data.cast("B")
    header = safetensors_header(chunks, len(data), metadata)
    file_hash = xxhash.xxh3_128(header)
    file_hash.update(data)
    receipts = tuple(_receipt(chunk, data[chunk.begin : chunk.end], len(header)) for chunk in chunks)
    store.write(key, [header, data])
    _read_back(store, key, len(header) + len(data), file_hash.hexdigest())
    file = FileEntry(
        name=key.rpartition("/")[2],
        size_bytes=len(header) + len(data),
        hash=file_hash.hexdigest(),
        header_hash=xxhash.xxh3_128_hexdigest(header),
        header_bytes=len(header),
    )
    return ShardReceipt(file=file, chunks=receipts)


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


def _receipt(chunk: Chunk, data: memoryview, header_bytes: int) -> ChunkReceipt:
    return ChunkReceipt(
        spec=chunk.spec,
        row_offset=chunk.row_offset,
        num_rows=chunk.num_rows,
        begin=header_bytes + chunk.begin,
        end=header_bytes + chunk.end,
        hash=xxhash.xxh3_128_hexdigest(data),
        fingerprint=partial_fingerprint(chunk.spec, chunk.row_offset, data),
    )


def _read_back(store: Store, key: str, size_bytes: int, file_hash: str) -> None:
    found = xxhash.xxh3_128()
    found_bytes = store.size(key)
    for begin in range(0, found_bytes, _READ_BACK_BYTES):
        found.update(store.read(key, begin, min(begin + _READ_BACK_BYTES, found_bytes)))
    if (found_bytes, found.hexdigest()) != (size_bytes, file_hash):
        raise StorageError(
            f"{store.url}/{key} reads back as {found_bytes} bytes with hash {found.hexdigest()}, "
            f"written were {size_bytes} with {file_hash}; write it again"
        )


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
        created_at=records.now(),
        files=tuple(receipt.file for receipt in receipts),
        tensors=tensors,
    )
