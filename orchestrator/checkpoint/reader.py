"""Reading rows out of a checkpoint, whatever the world size that wrote it, and never a wrong byte silently.

Whole chunks are checked by their hash as they arrive. A chunk of which only some rows are wanted (another world size)
cannot be; those rows are covered by the tensor's fingerprint, which the caller compares once all ranks have loaded:
`combine(partial_fingerprint(...) of every rank) == expected_fingerprints(manifest)[name]`.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import xxhash

from orchestrator.checkpoint.catalog import load_manifest
from orchestrator.checkpoint.collector import collector_paused
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import ChunkEntry, FileEntry, Manifest
from orchestrator.checkpoint.store import Store
from orchestrator.errors import DamagedCheckpointError, MissingObjectError, RunMismatchError
from trainers.fingerprint import combine, format_fingerprint, partial_fingerprint
from trainers.shards import TensorSpec

_NUM_THREADS = 8
_RANGE_BYTES = 16 << 20
_GAP_BYTES = 32 << 10  # reading over a small gap is cheaper than another request


_NamedChunk = tuple[str, ChunkEntry]


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Rows that are wanted, and where to."""

    spec: TensorSpec
    row_offset: int
    num_rows: int
    out: memoryview
    """Writable, contiguous, exactly as long as the rows."""


@dataclass
class _Check:
    """A chunk that is read whole, and hashed by whoever reads its last piece."""

    name: str
    chunk: ChunkEntry
    out: memoryview
    num_missing: int = 0
    """Pieces."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def complete(self) -> bool:
        """Take note of another piece; whether it was the last one."""
        with self.lock:
            self.num_missing -= 1
            return self.num_missing == 0


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file and their place in memory."""

    begin: int
    end: int
    out: memoryview
    check: _Check | None = None


def read_rows(store: Store, manifest: Manifest, wanted: Sequence[Destination]) -> None:
    """Fill every destination, reading only the byte ranges needed.

    Collective: local. See the module docstring for what the caller has to check across ranks afterwards.

    Raises:
        DamagedCheckpointError: a file is missing, has another length or other bytes. Destinations hold garbage.
        RunMismatchError: the checkpoint is intact, but has no such tensor, or in another dtype or shape.
        StorageError: the store failed; reading again may work. Destinations hold garbage.
    """
    pieces = plan(manifest, [destination for destination in wanted if destination.num_rows])
    jobs = [partial(_check_file, store, manifest.ref, manifest.files[file]) for file in pieces]
    jobs += [partial(_fill, store, manifest, file, group) for file in pieces for group in _coalesce(pieces[file])]
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="checkpoint-read") as pool:
        # Raises the first error in this order: that a file is short or foreign says more than what follows from it.
        for _ in pool.map(lambda job: job(), jobs):
            pass


def expected_fingerprints(manifest: Manifest) -> dict[str, str]:
    """For every tensor, the 16 hex digits that the loaded state must give."""
    return {name: entry.fingerprint for name, entry in manifest.tensors.items()}


def verify(store: Store, ref: CheckpointRef, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """Read all of a checkpoint and say what is wrong with it; nothing is wrong if the list is empty.

    Args:
        advance: told the number of bytes of each file that is done.

    Raises:
        MissingObjectError: it was never committed.
        StorageError: the store failed, which says nothing about the checkpoint.
    """
    try:
        manifest = load_manifest(store, ref)
    except DamagedCheckpointError as error:
        return [str(error)]
    problems: list[str] = []
    partials: dict[str, list[int]] = {name: [] for name in manifest.tensors}
    chunks: list[list[_NamedChunk]] = [[] for _ in manifest.files]
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            chunks[chunk.file].append((name, chunk))
    for file, in_file in zip(manifest.files, chunks, strict=True):
        try:
            _check_file(store, ref, file)
            problems += _verify_data(store, manifest, file, in_file, partials)
        except DamagedCheckpointError as error:
            problems.append(str(error))
        advance(file.size_bytes)
    if problems:
        return problems  # the sums below would be wrong for a reason already given
    for name, expected in expected_fingerprints(manifest).items():
        found = format_fingerprint(combine(partials[name]))
        if found != expected:
            problems.append(f"{ref}: {name} has the fingerprint {found}, the manifest says {expected}")
    return problems


@collector_paused()
def plan(manifest: Manifest, wanted: Sequence[Destination]) -> dict[int, list[_Piece]]:
    """The pieces to read from each file. Those of a chunk that is read whole know how it is checked.

    Each rank makes its own, so it looks only at the chunks that it needs: with all of them in every rank's plan, the
    work of a restore would grow with the square of the number of ranks.
    """
    pieces: dict[int, list[_Piece]] = {}
    for destination in wanted:
        _check_spec(manifest, destination.spec)
        row_bytes = destination.spec.row_bytes
        first, last = destination.row_offset, destination.row_offset + destination.num_rows
        assert 0 <= first <= last <= destination.spec.num_rows, destination
        assert destination.out.nbytes == destination.num_rows * row_bytes, destination
        if not row_bytes:
            continue
        out = destination.out.cast("B")
        chunks = manifest.tensors[destination.spec.name].chunks  # in order of rows, as every manifest is checked for
        nearest = bisect_right(chunks, first, key=lambda chunk: chunk.row_offset) - 1
        for index in range(nearest, len(chunks)):
            chunk = chunks[index]
            begin, end = max(first, chunk.row_offset), min(last, chunk.row_offset + chunk.num_rows)
            if begin >= end:
                break
            target = out[(begin - first) * row_bytes : (end - first) * row_bytes]
            at = chunk.begin + (begin - chunk.row_offset) * row_bytes
            whole = end - begin == chunk.num_rows
            check = _Check(destination.spec.name, chunk, target) if whole else None
            found = list(_cut(at, target, check))
            if check is not None:
                check.num_missing = len(found)
            pieces.setdefault(chunk.file, []).extend(found)
    return pieces


def _check_spec(manifest: Manifest, spec: TensorSpec) -> None:
    if spec.name not in manifest.tensors:
        raise RunMismatchError(
            f"checkpoint {manifest.ref} has no tensor {spec.name}; it was made by another model, optimizer or EMA "
            "configuration: use that one, or another run.name"
        )
    stored = manifest.spec(spec.name)
    if stored != spec:
        raise RunMismatchError(
            f"checkpoint {manifest.ref} has {spec.name} as {stored.dtype} {list(stored.shape)}, wanted is "
            f"{spec.dtype} {list(spec.shape)}; use the configuration it was made with, or another run.name"
        )


def _cut(begin: int, out: memoryview, check: _Check | None) -> Iterator[_Piece]:
    """Pieces small enough that one large tensor is read by several threads."""
    for offset in range(0, len(out), _RANGE_BYTES):
        part = out[offset : offset + _RANGE_BYTES]
        yield _Piece(begin + offset, begin + offset + len(part), part, check)


def _coalesce(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Groups of neighbours, each to be read as one range."""
    groups: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        group = groups[-1] if groups else []
        gap = piece.begin - group[-1].end if group else -1
        if 0 <= gap <= _GAP_BYTES and piece.end - group[0].begin <= _RANGE_BYTES:
            group.append(piece)
        else:
            groups.append([piece])
    return groups


def _fill(store: Store, manifest: Manifest, file: int, group: Sequence[_Piece]) -> None:
    outs, end = [], group[0].begin
    for piece in group:
        if piece.begin > end:
            outs.append(memoryview(bytearray(piece.begin - end)))  # what lies between is read, and not wanted
        outs.append(piece.out)
        end = piece.end
    _fetch(store, manifest.ref, manifest.files[file], group[0].begin, outs)
    for piece in group:
        if piece.check is not None and piece.check.complete():
            _check_chunk(manifest, piece.check)


def _fetch(store: Store, ref: CheckpointRef, file: FileEntry, begin: int, outs: Sequence[memoryview]) -> None:
    try:
        found = store.read_into(ref.file(file.name), begin, outs)
    except MissingObjectError as error:
        raise DamagedCheckpointError(f"{ref}/{file.name} is missing") from error
    if found != sum(map(len, outs)):
        raise DamagedCheckpointError(f"{ref}/{file.name} ends at byte {begin + found} of {file.size_bytes}")


def _header(store: Store, ref: CheckpointRef, file: FileEntry) -> bytearray:
    header = bytearray(file.header_bytes)
    _fetch(store, ref, file, 0, [memoryview(header)])
    return header


def _check_file(store: Store, ref: CheckpointRef, file: FileEntry) -> None:
    """Length and header, before anything else is read: a range past the end is an error of its own kind on S3."""
    try:
        size_bytes = store.size(ref.file(file.name))
    except MissingObjectError as error:
        raise DamagedCheckpointError(f"{ref}/{file.name} is missing") from error
    if size_bytes != file.size_bytes:
        raise DamagedCheckpointError(f"{ref}/{file.name} has {size_bytes} bytes, written were {file.size_bytes}")
    if xxhash.xxh3_128_hexdigest(_header(store, ref, file)) != file.header_hash:
        raise DamagedCheckpointError(f"{ref}/{file.name} is damaged in its first {file.header_bytes} bytes, the header")


def _check_chunk(manifest: Manifest, check: _Check) -> None:
    if xxhash.xxh3_128_hexdigest(check.out) != check.chunk.hash:
        raise DamagedCheckpointError(_damage(manifest, check.name, check.chunk))


def _damage(manifest: Manifest, name: str, chunk: ChunkEntry) -> str:
    rows = f"rows {chunk.row_offset} to {chunk.row_offset + chunk.num_rows - 1} of {name}"
    place = f"{manifest.ref}/{manifest.files[chunk.file].name}"
    return f"{place} is damaged in bytes {chunk.begin} to {chunk.end - 1}, {rows}"


def _verify_data(
    store: Store,
    manifest: Manifest,
    file: FileEntry,
    chunks: Sequence[_NamedChunk],
    partials: dict[str, list[int]],
) -> list[str]:
    """Problems of one file, whose hash and whose chunks' hashes are taken in one pass: chunks tile the data section.

    Adds each chunk's fingerprint to `partials`.
    """
    problems = []
    whole = xxhash.xxh3_128(_header(store, manifest.ref, file))
    by_range = {(chunk.begin, chunk.end): (name, chunk) for name, chunk in chunks if chunk.begin < chunk.end}
    for group in _coalesce([_Piece(begin, end, memoryview(b"")) for begin, end in by_range]):
        begin, data = group[0].begin, memoryview(bytearray(group[-1].end - group[0].begin))
        _fetch(store, manifest.ref, file, begin, [data])
        whole.update(data)
        for piece in group:
            name, chunk = by_range[piece.begin, piece.end]
            rows = data[piece.begin - begin : piece.end - begin]
            partials[name].append(partial_fingerprint(manifest.spec(name), chunk.row_offset, rows))
            if xxhash.xxh3_128_hexdigest(rows) != chunk.hash:
                problems.append(_damage(manifest, name, chunk))
    if not problems and whole.hexdigest() != file.hash:
        problems.append(f"{manifest.ref}/{file.name} does not match the hash of the whole file in the manifest")
    return problems
