"""Reading rows out of a checkpoint, whatever the world size that wrote it, and never a wrong byte silently.

Whole chunks are checked by their hash as they arrive. A chunk of which only some rows are wanted (another world size)
cannot be; those rows are covered by the tensor's fingerprint, which the caller compares once all ranks have loaded:
`combine(partial_fingerprint(...) of every rank) == expected_fingerprints(manifest)[name]`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from orchestrator.checkpoint.catalog import load_manifest
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


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file and their place in memory."""

    begin: int
    end: int
    out: memoryview


@dataclass(frozen=True)
class _Check:
    """A chunk that is read whole."""

    name: str
    chunk: ChunkEntry
    out: memoryview


def read_rows(store: Store, manifest: Manifest, wanted: Sequence[Destination]) -> None:
    """Fill every destination, reading only the byte ranges needed.

    Collective: local. See the module docstring for what the caller has to check across ranks afterwards.

    Raises:
        DamagedCheckpointError: a file is missing, has another length or other bytes. Destinations hold garbage.
        RunMismatchError: the checkpoint is intact, but has no such tensor, or in another dtype or shape.
        StorageError: the store failed; reading again may work. Destinations hold garbage.
    """
    pieces, checks = plan(manifest, [destination for destination in wanted if destination.num_rows])
    reads = [(file, group) for file, found in pieces.items() for group in _coalesce(found)]
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="checkpoint-read") as pool:
        # Each map raises its first error; the order makes a short or foreign file known before its bytes are used.
        list(pool.map(lambda file: _check_file(store, manifest.ref, manifest.files[file]), pieces))
        list(pool.map(lambda read: _fill(store, manifest.ref, manifest.files[read[0]], read[1]), reads))
        list(pool.map(lambda check: _check_chunk(manifest, check), checks))


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


def plan(manifest: Manifest, wanted: Sequence[Destination]) -> tuple[dict[int, list[_Piece]], list[_Check]]:
    """The pieces to read from each file, and the chunks that can be checked by their hash afterwards.

    Each rank makes its own, so it looks only at the chunks that it needs: with all of them in every rank's plan, the
    work of a restore would grow with the square of the number of ranks.
    """
    pieces: dict[int, list[_Piece]] = {}
    checks: list[_Check] = []
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
            pieces.setdefault(chunk.file, []).extend(_cut(at, target))
            if end - begin == chunk.num_rows:
                checks.append(_Check(destination.spec.name, chunk, target))
    return pieces, checks


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


def _cut(begin: int, out: memoryview) -> Iterator[_Piece]:
    """Pieces small enough that one large tensor is read by several threads."""
    for offset in range(0, len(out), _RANGE_BYTES):
        part = out[offset : offset + _RANGE_BYTES]
        yield _Piece(begin + offset, begin + offset + len(part), part)


def _coalesce(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Groups of neighbours, each to be read as one range."""
    groups: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        group = groups[-1] if groups else []
        if group and piece.begin - group[-1].end <= _GAP_BYTES and piece.end - group[0].begin <= _RANGE_BYTES:
            group.append(piece)
        else:
            groups.append([piece])
    return groups


def _fill(store: Store, ref: CheckpointRef, file: FileEntry, group: Sequence[_Piece]) -> None:
    begin, end = group[0].begin, max(piece.end for piece in group)
    data = memoryview(_fetch(store, ref, file, begin, end))
    for piece in group:
        piece.out[:] = data[piece.begin - begin : piece.end - begin]


def _fetch(store: Store, ref: CheckpointRef, file: FileEntry, begin: int, end: int) -> bytes:
    try:
        data = store.read(ref.file(file.name), begin, end)
    except MissingObjectError as error:
        raise DamagedCheckpointError(f"{ref}/{file.name} is missing") from error
    if len(data) != end - begin:
        raise DamagedCheckpointError(f"{ref}/{file.name} ends at byte {begin + len(data)} of {file.size_bytes}")
    return data


def _check_file(store: Store, ref: CheckpointRef, file: FileEntry) -> None:
    """Length and header, before anything else is read: a range past the end is an error of its own kind on S3."""
    try:
        size_bytes = store.size(ref.file(file.name))
    except MissingObjectError as error:
        raise DamagedCheckpointError(f"{ref}/{file.name} is missing") from error
    if size_bytes != file.size_bytes:
        raise DamagedCheckpointError(f"{ref}/{file.name} has {size_bytes} bytes, written were {file.size_bytes}")
    header = _fetch(store, ref, file, 0, file.header_bytes)
    if xxhash.xxh3_128_hexdigest(header) != file.header_hash:
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
    whole = xxhash.xxh3_128(_fetch(store, manifest.ref, file, 0, file.header_bytes))
    by_range = {(chunk.begin, chunk.end): (name, chunk) for name, chunk in chunks if chunk.begin < chunk.end}
    for group in _coalesce([_Piece(begin, end, memoryview(b"")) for begin, end in by_range]):
        data = memoryview(_fetch(store, manifest.ref, file, group[0].begin, group[-1].end))
        whole.update(data)
        for piece in group:
            name, chunk = by_range[piece.begin, piece.end]
            rows = data[piece.begin - group[0].begin : piece.end - group[0].begin]
            partials[name].append(partial_fingerprint(manifest.spec(name), chunk.row_offset, rows))
            if xxhash.xxh3_128_hexdigest(rows) != chunk.hash:
                problems.append(_damage(manifest, name, chunk))
    if not problems and whole.hexdigest() != file.hash:
        problems.append(f"{manifest.ref}/{file.name} does not match the hash of the whole file in the manifest")
    return problems
