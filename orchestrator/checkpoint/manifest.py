"""The manifest: what a checkpoint consists of. Creating it is the commit.

JSON for people, exact for programs: the last line is the XXH3-128 of all bytes before it, so no bit of the file can
change unseen. One line a file and one a chunk, the chunk's fields by position, to stay small for thousands of ranks:

    {
      "format": "unbroken-1",
      "run_id": ..., "attempt": ..., "progress": {"step": ..., "samples_seen": ...}, ...,
      "files": [
        {"name": "shard-00000-of-00004.safetensors", "size_bytes": ..., "hash": ..., "header_hash": ..., ...},
      ],
      "tensors": {
        "model/conv_in.weight": {"dtype": "F32", "shape": [128, 3, 3, 3], "fingerprint": "...", "chunks": [
          [file, begin, end, row_offset, num_rows, hash],
        ]},
      },
      "digest": "..."
    }
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import xxhash

from orchestrator.checkpoint.collector import collector_paused
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.errors import DamagedCheckpointError, RunMismatchError
from trainers.progress import Progress
from trainers.shards import TensorSpec

FORMAT = "unbroken-1"

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_DIGEST_LEAD = b',\n  "digest": "'
_DIGEST_TAIL = b'"\n}\n'


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One shard file."""

    name: str
    """File name in the checkpoint's folder."""
    size_bytes: int
    hash: str
    """XXH3-128 of the whole file, 32 hex digits."""
    header_hash: str
    """XXH3-128 of the safetensors header with its 8 bytes of length."""
    header_bytes: int
    """Where the data section begins."""


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """Rows of a tensor, in one place. The order of the fields is the format."""

    file: int
    """Index in `Manifest.files`."""
    begin: int
    """First byte, from the start of the file."""
    end: int
    row_offset: int
    """Global index of the first row."""
    num_rows: int
    hash: str
    """XXH3-128 of the bytes, 32 hex digits."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of the state as a whole."""

    dtype: str
    """In safetensors' words: F32, BF16, I64, ..."""
    shape: tuple[int, ...]
    """Global shape."""
    fingerprint: str
    """As `trainers.fingerprint` defines it, 16 hex digits."""
    chunks: tuple[ChunkEntry, ...]
    """Ordered by row; together every row exactly once."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A committed checkpoint."""

    format: str = FORMAT
    run_id: str
    attempt: int
    """The attempt that wrote it."""
    progress: Progress
    reason: str
    """Why it was taken: interval, final, or what all ranks were stopped for: sigterm, sigint, drain, grow."""
    world_size: int
    """Number of ranks that wrote it; says nothing about who may read it."""
    strategy: str
    config_hash: str
    versions: Mapping[str, str]
    store: Mapping[str, Any] = field(default_factory=dict)
    """`kind`, and whether it has `conditional_create`, as found at the start; empty in older manifests."""
    verify: str = "full"
    """What was read back before the commit: full, sample (1 %), or size; older manifests do not say, and mean full."""
    scalars: Mapping[str, Any]
    """State that is no tensor. Only what the next step may depend on: `unbroken prove` compares all of it."""
    health: Mapping[str, Any]
    """`{"ok": true}`, or `{"ok": false, "reason": ...}`: such a checkpoint is never resumed from."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The numbers of the step, as far as they are finite; empty in older manifests."""
    created_at: str
    """UTC, ISO 8601. Informative."""
    files: tuple[FileEntry, ...]
    tensors: Mapping[str, TensorEntry]

    def __post_init__(self) -> None:
        assert isinstance(self.health["ok"], bool), self.health

    @property
    def ref(self) -> CheckpointRef:
        return CheckpointRef(self.progress.samples_seen, self.attempt)

    def spec(self, name: str) -> TensorSpec:
        entry = self.tensors[name]
        return TensorSpec(name=name, dtype=entry.dtype, shape=entry.shape)

    def to_bytes(self) -> bytes:
        """The exact file. Numbers must be finite."""
        body = _serialise(self)
        return body + _DIGEST_LEAD + xxhash.xxh3_128_hexdigest(body).encode() + _DIGEST_TAIL

    @classmethod
    @collector_paused()
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """The manifest in a file's bytes; `where` names the file in errors.

        Raises:
            DamagedCheckpointError: a bit changed, something is missing, or rows are not covered exactly once.
            RunMismatchError: intact, but of another format.
        """
        body, lead, end = data.rpartition(_DIGEST_LEAD)
        if not lead or end != xxhash.xxh3_128_hexdigest(body).encode() + _DIGEST_TAIL:
            raise DamagedCheckpointError(
                f"{where} is damaged: {len(data)} bytes that do not match the digest at the end"
            )
        content = json.loads(body + b"}")
        if content["format"] != FORMAT:
            raise RunMismatchError(
                f"{where} has the format {content['format']!r}, this version of unbroken reads {FORMAT!r}; update it"
            )
        manifest = _parse(content)
        problems = manifest.problems()
        if problems:
            raise DamagedCheckpointError(f"{where} is inconsistent: {problems[0]} ({len(problems)} problems)")
        return manifest

    def problems(self) -> list[str]:
        """What keeps this from being a whole checkpoint: rows missing or doubled, bytes outside or in no chunk."""
        found: list[str] = []
        by_file: list[list[ChunkEntry]] = [[] for _ in self.files]
        for name, entry in self.tensors.items():
            spec = self.spec(name)
            next_row = 0
            for chunk in entry.chunks:
                if chunk.row_offset != next_row:
                    found.append(f"{name}: expected a chunk from row {next_row}, found row {chunk.row_offset}")
                if chunk.end - chunk.begin != chunk.num_rows * spec.row_bytes or chunk.num_rows < 1:
                    found.append(f"{name}: {chunk.num_rows} rows in {chunk.end - chunk.begin} bytes")
                next_row = chunk.row_offset + chunk.num_rows
                by_file[chunk.file].append(chunk)
            if next_row != spec.num_rows:
                found.append(f"{name}: chunks end at row {next_row} of {spec.num_rows}")
        for file, chunks in zip(self.files, by_file, strict=True):
            next_byte = file.header_bytes
            for chunk in sorted(chunks, key=lambda chunk: (chunk.begin, chunk.end)):
                if chunk.begin != next_byte:
                    found.append(f"{file.name}: expected a chunk from byte {next_byte}, found byte {chunk.begin}")
                next_byte = chunk.end
            if next_byte != file.size_bytes:
                found.append(f"{file.name}: chunks end at byte {next_byte} of {file.size_bytes}")
        return found


def _serialise(manifest: Manifest) -> bytes:
    lines = []
    for entry in fields(Manifest):
        value = getattr(manifest, entry.name)
        if entry.name == "files":
            text = _list([_json(vars(file)) for file in value], "  ")
        elif entry.name == "tensors":
            items = [f"    {_json(name)}: {_tensor(tensor)}" for name, tensor in value.items()]
            text = "{\n" + ",\n".join(items) + "\n  }" if items else "{}"
        else:
            text = _json(asdict(value) if isinstance(value, Progress) else value)
        lines.append(f"  {_json(entry.name)}: {text}")
    return ("{\n" + ",\n".join(lines)).encode()


def _tensor(entry: TensorEntry) -> str:
    chunks = _list(
        [f'[{c.file}, {c.begin}, {c.end}, {c.row_offset}, {c.num_rows}, "{c.hash}"]' for c in entry.chunks], "    "
    )
    head = _json({"dtype": entry.dtype, "shape": entry.shape, "fingerprint": entry.fingerprint})
    return f'{head[:-1]}, "chunks": {chunks}}}'


def _list(items: list[str], indent: str) -> str:
    return "[\n" + ",\n".join(f"{indent}  {item}" for item in items) + f"\n{indent}]" if items else "[]"


def _json(value: Any) -> str:
    return _ENCODER.encode(value)


def _parse(content: dict[str, Any]) -> Manifest:
    """Strict: a field too many or too few is a TypeError, which an intact file of this format cannot cause."""
    content["progress"] = Progress(**content["progress"])
    content["files"] = tuple(FileEntry(**file) for file in content["files"])
    content["tensors"] = {
        name: TensorEntry(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            fingerprint=entry["fingerprint"],
            chunks=tuple(ChunkEntry(*chunk) for chunk in entry["chunks"]),
        )
        for name, entry in content["tensors"].items()
    }
    return Manifest(**content)
