from __future__ import annotations

import json
from dataclasses import replace

import pytest
import xxhash

from orchestrator.checkpoint.manifest import ChunkEntry, FileEntry, Manifest, TensorEntry
from orchestrator.errors import DamagedCheckpointError, UnbrokenError
from trainers.progress import Progress

DIGITS = "0123456789abcdef"


def file_entry(rank: int, data_bytes: int) -> FileEntry:
    name = f"shard-{rank:05d}-of-00002.safetensors"
    return FileEntry(name=name, size_bytes=80 + data_bytes, hash=DIGITS * 2, header_hash=DIGITS * 2, header_bytes=80)


def chunk(file: int, begin: int, end: int, row_offset: int, num_rows: int) -> ChunkEntry:
    return ChunkEntry(file, 80 + begin, 80 + end, row_offset, num_rows, DIGITS * 2)


def tensor(dtype: str, shape: tuple[int, ...], *chunks: ChunkEntry) -> TensorEntry:
    return TensorEntry(dtype=dtype, shape=shape, fingerprint=DIGITS, chunks=chunks)


MANIFEST = Manifest(
    run_id="0123456789ab",
    attempt=3,
    progress=Progress(7, 448),
    reason="interval",
    world_size=2,
    strategy="fsdp",
    config_hash="c0ffee",
    versions={"torch": "2.13.0"},
    store={"kind": "s3", "conditional_create": True},
    scalars={"optimizer": {"step": 7}, "note": "é, \"quoted\""},
    health={"ok": True},
    created_at="2026-11-21T09:00:00+00:00",
    files=(file_entry(0, 28), file_entry(1, 12)),
    tensors={
        "model/weight": tensor("F32", (3, 3), chunk(0, 0, 24, 0, 2), chunk(1, 0, 12, 2, 1)),
        "optimizer/step": tensor("F32", (), chunk(0, 24, 28, 0, 1)),
        "empty": tensor("F32", (0, 4)),
    },
)  # fmt: skip


def changed(name: str, *chunks: ChunkEntry) -> Manifest:
    return replace(MANIFEST, tensors={**MANIFEST.tensors, name: replace(MANIFEST.tensors[name], chunks=chunks)})


def test_the_round_trip_is_exact():
    data = MANIFEST.to_bytes()
    parsed = Manifest.from_bytes(data, "m")
    assert parsed == MANIFEST and parsed.to_bytes() == data


def test_it_is_json_for_people_with_a_line_for_each_chunk():
    text = MANIFEST.to_bytes().decode()
    content = json.loads(text)
    assert content["format"] == "unbroken-1" and content["progress"] == {"step": 7, "samples_seen": 448}
    assert content["tensors"]["model/weight"]["chunks"][1] == [1, 80, 92, 2, 1, DIGITS * 2]
    assert f'      [1, 80, 92, 2, 1, "{DIGITS * 2}"]\n' in text


def test_every_single_bit_flip_is_found():
    data = bytearray(MANIFEST.to_bytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(DamagedCheckpointError):
            Manifest.from_bytes(bytes(data), "m")
        data[bit // 8] ^= 1 << (bit % 8)


def test_every_truncation_and_an_appended_byte_is_found():
    data = MANIFEST.to_bytes()
    for damaged in [*(data[:size] for size in range(len(data))), data + b"\n", b"\n" + data]:
        with pytest.raises(DamagedCheckpointError):
            Manifest.from_bytes(damaged, "m")


def test_another_format_is_not_damage():
    with pytest.raises(UnbrokenError, match="unbroken-2") as caught:
        Manifest.from_bytes(replace(MANIFEST, format="unbroken-2").to_bytes(), "m")
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_a_number_that_json_has_not_is_refused():
    with pytest.raises(ValueError):
        replace(MANIFEST, scalars={"loss": float("nan")}).to_bytes()


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (changed("model/weight", chunk(0, 0, 24, 0, 2)), "end at row 2 of 3"),
        (changed("model/weight", chunk(0, 0, 24, 0, 2), chunk(1, 0, 12, 1, 1)), "expected a chunk from row 2"),
        (changed("model/weight", chunk(0, 0, 24, 0, 2), chunk(1, 0, 12, 2, 2)), "2 rows in 12 bytes"),
        (changed("model/weight", chunk(0, 0, 24, 0, 2), chunk(1, 4, 16, 2, 1)), "expected a chunk from byte 80"),
        (changed("optimizer/step"), "end at row 0 of 1"),
        (changed("optimizer/step", chunk(0, 20, 24, 0, 1)), "expected a chunk from byte 104"),
        (replace(MANIFEST, files=(file_entry(0, 32), file_entry(1, 12))), "end at byte 108 of 112"),
    ],
)
def test_rows_and_bytes_are_covered_exactly_once(broken, problem):
    assert MANIFEST.problems() == []
    assert any(problem in found for found in broken.problems())
    with pytest.raises(DamagedCheckpointError, match="inconsistent"):
        Manifest.from_bytes(broken.to_bytes(), "m")


def test_a_manifest_from_before_the_store_was_probed_is_read():
    body, _, _ = MANIFEST.to_bytes().rpartition(b',\n  "digest": "')
    old = body.replace(b'  "store": {"kind": "s3", "conditional_create": true},\n', b"")
    assert len(old) < len(body)
    data = old + b',\n  "digest": "' + xxhash.xxh3_128_hexdigest(old).encode() + b'"\n}\n'
    assert Manifest.from_bytes(data, "old") == replace(MANIFEST, store={})
