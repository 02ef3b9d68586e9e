from __future__ import annotations

import random
import threading
import uuid
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.checkpoint.catalog import load_manifest
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import ChunkEntry
from orchestrator.checkpoint.reader import Destination, plan, read_rows, verify
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import commit
from orchestrator.errors import DamagedCheckpointError, MissingObjectError, RunMismatchError, StorageError
from tests.orchestrator.checkpoint.shards import write_shard
from tests.orchestrator.checkpoint.states import SPECS, equal, load, make_info, make_state, save, write_shards
from trainers.shards import Chunk, TensorSpec

WORLD_SIZE = 3
REF = CheckpointRef(70, 1)


@pytest.fixture
def memory():
    return Store.open(f"memory://{uuid.uuid4().hex}")


def destination(spec: TensorSpec, first: int = 0, last: int | None = None) -> Destination:
    num_rows = (spec.num_rows if last is None else last) - first
    out = memoryview(np.zeros(num_rows * spec.row_bytes, np.uint8))
    return Destination(spec=spec, row_offset=first, num_rows=num_rows, out=out)


@pytest.mark.parametrize("written_by", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("read_by", [1, 2, 3, 4, 9])
def test_every_world_size_reads_every_other_bitwise(store, written_by, read_by):
    manifest = save(store, make_state(0), step=7, world_size=written_by)
    assert equal(load(store, manifest, read_by), make_state(0))


def test_small_ranges_read_by_many_threads_give_the_same(any_store, monkeypatch):
    for name, size in (("_RANGE_BYTES", 100), ("_GAP_BYTES", 7)):
        monkeypatch.setattr(f"orchestrator.checkpoint.reader.{name}", size)
    manifest = save(any_store, make_state(0), step=7)
    assert equal(load(any_store, manifest, 2), make_state(0))
    assert verify(any_store, manifest.ref) == []


class CountingStore(Store):
    """Notes every range that is read."""

    def __init__(self) -> None:
        inner = Store.open(f"memory://{uuid.uuid4().hex}")
        super().__init__(inner.url, inner._root, inner.backend)
        self.ranges, self._lock = [], threading.Lock()

    def read_into(self, key, begin, outs):
        with self._lock:
            self.ranges.append((key, begin, begin + sum(map(len, outs))))
        return super().read_into(key, begin, outs)


def save_large(store: Store, world_size: int):
    """One tensor of 1 MB, each rank a quarter."""
    spec = TensorSpec(name="w", dtype="F32", shape=(1000, 256))
    data = np.random.default_rng(0).integers(0, 256, 1000 * 1024, np.uint8)
    receipts, each = [], 1000 // world_size
    for rank in range(world_size):
        chunk = Chunk(spec=spec, row_offset=rank * each, num_rows=each, begin=0, end=each * 1024)
        part = memoryview(data)[rank * each * 1024 : (rank + 1) * each * 1024]
        key = REF.shard(rank, world_size)
        receipts.append(write_shard(store, key, [chunk], part, {}))
    return spec, data, commit(store, receipts, make_info(7, 1))


def test_only_the_wanted_rows_and_the_headers_of_their_files_are_read():
    store = CountingStore()
    spec, data, manifest = save_large(store, world_size=4)
    store.ranges.clear()
    part = destination(spec, 200, 300)
    read_rows(store, manifest, [part])
    assert bytes(part.out) == data[200 * 1024 : 300 * 1024].tobytes()
    headers = sum(file.header_bytes for file in manifest.files[:2])
    assert {key.rpartition("/")[2] for key, _, _ in store.ranges} == {file.name for file in manifest.files[:2]}
    assert sum(end - begin for _, begin, end in store.ranges) == 100 * 1024 + headers


def test_neighbours_are_read_as_one_range():
    store = CountingStore()
    manifest = save(store, make_state(0), step=7, world_size=1)
    store.ranges.clear()
    load(store, manifest, 1)
    assert len(store.ranges) == 2  # the header, the data


def flip(store: Store, key: str, bit: int) -> bytes:
    """Flip a bit of an object; the original bytes."""
    original = store.read(key)
    damaged = bytearray(original)
    damaged[bit // 8] ^= 1 << (bit % 8)
    store.write(key, [damaged])
    return original


def files_of(store: Store, folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in store.list(folder)]


def test_none_of_2000_bit_flips_over_all_files_loads(memory):
    ref = save(memory, make_state(0), step=7, world_size=WORLD_SIZE).ref
    sizes = {key: 8 * memory.size(key) for key in files_of(memory, ref.folder)}
    assert len(sizes) == WORLD_SIZE + 1
    choose = random.Random(0)
    for _ in range(2000):
        (key,) = choose.choices(list(sizes), list(sizes.values()))
        original = flip(memory, key, choose.randrange(sizes[key]))
        with pytest.raises(DamagedCheckpointError):
            load(memory, load_manifest(memory, ref), WORLD_SIZE)
        assert len(verify(memory, ref)) == 1
        memory.write(key, [original])
    assert equal(load(memory, load_manifest(memory, ref), WORLD_SIZE), make_state(0))


@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_no_bit_flip_in_the_data_loads_at_another_world_size(memory, read_by):
    manifest = save(memory, make_state(0), step=7, world_size=WORLD_SIZE)
    choose = random.Random(read_by)
    for _ in range(200):
        file = choose.choice(manifest.files)
        key = manifest.ref.file(file.name)
        original = flip(memory, key, choose.randrange(8 * file.header_bytes, 8 * file.size_bytes))
        with pytest.raises(DamagedCheckpointError):
            load(memory, manifest, read_by)
        memory.write(key, [original])


def test_a_flip_in_a_chunk_that_no_rank_reads_whole_is_left_to_the_fingerprint(memory):
    manifest = save(memory, make_state(0), step=7, world_size=3)
    spec = SPECS[0]  # rows 0-1, 2-3, 4; two readers want rows 0-2, 3-4
    chunk = manifest.tensors[spec.name].chunks[1]
    flip(memory, manifest.ref.file(manifest.files[chunk.file].name), 8 * chunk.begin)
    for first, last in ((0, 3), (3, 5)):
        read_rows(memory, manifest, [destination(spec, first, last)])
    with pytest.raises(DamagedCheckpointError, match="fingerprint"):
        load(memory, manifest, 2)


def damage_cut(store, key, other):
    store.write(key, [store.read(key)[:-1]])


def damage_empty(store, key, other):
    store.write(key, [b""])


def damage_longer(store, key, other):
    store.write(key, [store.read(key), b"\0"])


def damage_missing(store, key, other):
    store.delete(key)


def damage_other_step(store, key, other):
    store.write(key, [store.read(other)])


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, r"has \d+ bytes, written were"),
        (damage_empty, "has 0 bytes"),
        (damage_longer, r"has \d+ bytes, written were"),
        (damage_missing, "is missing"),
        (damage_other_step, "is damaged in bytes .* rows .* of model/"),
    ],
)
def test_other_damage_is_found_and_named(store, rank, damage, message):
    other = save(store, make_state(1), step=6, world_size=WORLD_SIZE)
    manifest = save(store, make_state(0), step=7, world_size=WORLD_SIZE)
    key = manifest.ref.shard(rank, WORLD_SIZE)
    damage(store, key, other.ref.shard(rank, WORLD_SIZE))
    for read_by in (WORLD_SIZE, 2):
        with pytest.raises(DamagedCheckpointError):
            load(store, manifest, read_by)
    with pytest.raises(DamagedCheckpointError, match=f"shard-0000{rank}-of-00003.safetensors {message}"):
        load(store, manifest, WORLD_SIZE)
    assert all(f"shard-0000{rank}" in problem for problem in verify(store, manifest.ref))
    assert verify(store, manifest.ref) and verify(store, other.ref) == []


def test_a_file_that_shrinks_while_it_is_read_is_damage(any_store, monkeypatch):
    manifest = save(any_store, make_state(0), step=7, world_size=1)
    read = any_store.read_into

    def cut(key, begin, outs):
        return min(read(key, begin, outs), 1000 - begin)

    monkeypatch.setattr(any_store, "read_into", cut)
    with pytest.raises(DamagedCheckpointError, match="ends at byte 1000 of"):
        load(any_store, manifest, 1)


def test_two_shards_that_changed_places_are_found(store):
    manifest = save(store, make_state(0), step=7, world_size=WORLD_SIZE)
    first, second = (manifest.ref.shard(rank, WORLD_SIZE) for rank in (0, 1))
    contents = store.read(first), store.read(second)
    store.write(first, [contents[1]])
    store.write(second, [contents[0]])
    with pytest.raises(DamagedCheckpointError):
        load(store, manifest, WORLD_SIZE)
    assert len(verify(store, manifest.ref)) >= 2


def test_verify_lists_every_damaged_file(any_store):
    manifest = save(any_store, make_state(0), step=7, world_size=WORLD_SIZE)
    assert verify(any_store, manifest.ref) == []
    any_store.delete(manifest.ref.shard(0, WORLD_SIZE))
    flip(any_store, manifest.ref.shard(2, WORLD_SIZE), 8 * manifest.files[2].size_bytes - 1)
    problems = verify(any_store, manifest.ref)
    assert len(problems) == 2 and "is missing" in problems[0] and "is damaged" in problems[1]


def test_verify_compares_the_fingerprints(store):
    state = make_state(0)
    receipts = write_shards(store, state, 1, REF)
    wrong = replace(receipts[0].chunks[1], fingerprint=receipts[0].chunks[1].fingerprint ^ 1)
    chunks = (receipts[0].chunks[0], wrong, *receipts[0].chunks[2:])
    manifest = commit(store, [replace(receipts[0], chunks=chunks)], make_info(7, 1))
    (problem,) = verify(store, manifest.ref)
    assert f"{SPECS[1].name} has the fingerprint" in problem


def test_verify_of_what_was_never_committed_is_an_error_not_a_problem(store):
    write_shards(store, make_state(0), 1, REF)
    with pytest.raises(MissingObjectError):
        verify(store, REF)


@pytest.mark.parametrize(
    "changes", [{"name": "ema/other/proj.weight"}, {"dtype": "I32"}, {"shape": (6, 40)}, {"shape": (7, 80)}]
)
def test_another_model_is_not_damage(store, changes):
    manifest = save(store, make_state(0), step=7)
    with pytest.raises(RunMismatchError, match="proj"):
        read_rows(store, manifest, [destination(replace(SPECS[1], **changes))])


def test_a_store_that_fails_is_not_damage(store, monkeypatch):
    manifest = save(store, make_state(0), step=7)

    def down(*args, **kwargs):
        raise TimeoutError("no answer")

    monkeypatch.setattr(store.backend, "read_into", down)
    with pytest.raises(StorageError, match="no answer"):
        load(store, manifest, WORLD_SIZE)
    with pytest.raises(StorageError, match="no answer"):
        verify(store, manifest.ref)


def test_nothing_wanted_reads_nothing():
    store = CountingStore()
    manifest = save(store, make_state(0), step=7)
    store.ranges.clear()
    read_rows(store, manifest, [destination(SPECS[0], 5, 5)])
    assert store.ranges == []


class CountingChunks(tuple):
    """Counts how often a chunk is looked at."""

    looks = 0

    def __getitem__(self, index):
        CountingChunks.looks += 1
        return super().__getitem__(index)

    def __iter__(self):
        return (self[index] for index in range(len(self)))


def test_a_rank_looks_only_at_the_chunks_near_its_rows(monkeypatch):
    spec, num_chunks = TensorSpec(name="model/w", dtype="F32", shape=(4096, 2)), 1024
    chunks = CountingChunks(ChunkEntry(0, 32 * index, 32 * index + 32, 4 * index, 4, "") for index in range(num_chunks))
    manifest = save(Store.open(f"memory://{uuid.uuid4().hex}"), make_state(0), step=7)
    entry = replace(manifest.tensors[SPECS[0].name], dtype=spec.dtype, shape=spec.shape, chunks=chunks)
    manifest = replace(manifest, tensors={spec.name: entry})
    for first, last, num_checked in ((0, 4, 1), (2044, 2048, 1), (2046, 2054, 1), (4092, 4096, 1), (4095, 4096, 0)):
        monkeypatch.setattr(CountingChunks, "looks", 0)
        pieces = plan(manifest, [destination(spec, first, last)])[0]
        assert sum(len(piece.out) for piece in pieces) == 8 * (last - first)
        assert sum(piece.check is not None for piece in pieces) == num_checked
        assert CountingChunks.looks < 20, f"{CountingChunks.looks} of {num_chunks} chunks"
