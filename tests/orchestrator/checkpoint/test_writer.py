from __future__ import annotations

import contextlib
import pickle
import uuid
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import commit
from orchestrator.errors import AlreadyExistsError, StorageError, SupersededError, UnbrokenError
from tests.orchestrator.checkpoint.shards import write_shard
from tests.orchestrator.checkpoint.states import SPECS, make_info, make_state, rows_of, save, snapshot, write_shards
from trainers.shards import Chunk, TensorSpec

REF = CheckpointRef(70, 1)
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "BOOL": torch.bool}


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_safetensors_library_reads_the_shards(tmp_path, world_size):
    store, state = Store.open(str(tmp_path)), make_state(0)
    state["model/mask"] &= 1  # other bytes are no booleans
    write_shards(store, state, world_size, REF)
    for rank in range(world_size):
        with safe_open(str(tmp_path / REF.shard(rank, world_size)), "pt") as file:
            assert file.metadata() == {"rank": str(rank)}
            ranges = {spec: rows_of(spec, rank, world_size) for spec in SPECS}
            held = {spec: (first, last) for spec, (first, last) in ranges.items() if first < last}
            assert set(file.keys()) == {spec.name for spec in held}
            for spec, (first, last) in held.items():
                tensor = file.get_tensor(spec.name)
                if spec.shape:
                    assert tensor.shape == (last - first, *spec.shape[1:])
                assert tensor.dtype == TORCH_DTYPES[spec.dtype]
                assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == state[spec.name][first:last].tobytes()


def test_the_data_section_is_aligned(store):
    (receipt, *_) = write_shards(store, make_state(0), 1, REF)
    assert receipt.file.header_bytes % 8 == 0


def test_a_receipt_travels_between_processes(store):
    for receipt in write_shards(store, make_state(0), 2, REF):
        assert pickle.loads(pickle.dumps(receipt)) == receipt


def test_the_fingerprints_do_not_depend_on_the_world_size(store):
    fingerprints = [
        {name: entry.fingerprint for name, entry in save(store, make_state(0), step=step, world_size=w).tensors.items()}
        for step, w in enumerate([1, 2, 3, 4, 9])
    ]
    assert all(other == fingerprints[0] for other in fingerprints)
    assert fingerprints[0].keys() == {spec.name for spec in SPECS}


class CorruptingStore(Store):
    """Flips a bit of every object that it stores."""

    def write(self, key, parts):
        data = bytearray(b"".join(parts))
        data[-1] ^= 1
        super().write(key, [data])


class ForgetfulStore(Store):
    """Loses the last byte."""

    def write(self, key, parts):
        super().write(key, [b"".join(parts)[:-1]])


@pytest.mark.parametrize(
    ("kind", "verify"),
    [(CorruptingStore, "full"), (ForgetfulStore, "full"), (ForgetfulStore, "sample"), (ForgetfulStore, "size")],
)
def test_what_reads_back_otherwise_gets_no_receipt(kind, verify):
    inner = Store.open(f"memory://{kind.__name__}")
    chunks, data = snapshot(make_state(0), 0, 1)
    with pytest.raises(StorageError, match="reads back"):
        write_shard(kind(inner.url, inner._root, inner.backend), REF.shard(0, 1), chunks, data, {}, verify)


def test_a_tensor_without_rows_is_in_the_manifest(store):
    spec = TensorSpec(name="empty", dtype="F32", shape=(0, 4))
    chunks = [Chunk(spec=spec, row_offset=0, num_rows=0, begin=0, end=0)]
    receipt = write_shard(store, REF.shard(0, 1), chunks, memoryview(b""), {})
    entry = commit(store, [receipt], make_info(7, 1)).tensors["empty"]
    assert entry.shape == (0, 4) and entry.chunks == () and entry.fingerprint == "0" * 16


class TestCommit:
    def test_the_order_of_receipts_does_not_matter(self, store):
        receipts = write_shards(store, make_state(0), 3, REF)
        manifest = commit(store, receipts[::-1], make_info(7, 1))
        assert [file.name for file in manifest.files] == [receipt.file.name for receipt in receipts]

    @pytest.mark.parametrize("kept", [[0, 1], [0, 1, 1], [1], []])
    def test_a_missing_or_doubled_shard_is_refused(self, store, kept):
        receipts = write_shards(store, make_state(0), 3, REF)
        with pytest.raises(UnbrokenError, match="not committed"):
            commit(store, [receipts[i] for i in kept], make_info(7, 1))
        assert not store.exists(REF.manifest)

    def test_a_missing_shard_is_refused_even_if_it_held_no_rows(self, store):
        receipts = write_shards(store, make_state(0), 9, REF)
        assert receipts[8].file.size_bytes == receipts[8].file.header_bytes
        with pytest.raises(UnbrokenError, match="not one shard of each rank"):
            commit(store, receipts[:8], make_info(7, 1))

    def test_missing_rows_are_refused(self, store):
        chunks, data = snapshot(make_state(0), 0, 2)  # half of the rows, and no other rank
        receipt = write_shard(store, REF.shard(0, 1), chunks, data, {})
        with pytest.raises(UnbrokenError, match="end at row"):
            commit(store, [receipt], make_info(7, 1))

    def test_ranks_that_disagree_on_a_shape_are_refused(self, store):
        first, second = write_shards(store, make_state(0), 2, REF)
        odd = replace(second.chunks[0], spec=replace(second.chunks[0].spec, shape=(9, 3, 3, 3)))
        with pytest.raises(UnbrokenError, match="not committed"):
            commit(store, [first, replace(second, chunks=(odd, *second.chunks[1:]))], make_info(7, 1))

    def test_it_may_be_repeated(self, any_store):
        receipts = write_shards(any_store, make_state(0), 2, REF)
        first = commit(any_store, receipts, make_info(7, 1))
        again = commit(any_store, receipts, make_info(7, 1, reason="said later, so the bytes differ"))
        assert again == first

    def test_another_checkpoint_under_the_same_reference_stays(self, any_store):
        first = save(any_store, make_state(0), step=7)
        with pytest.raises(AlreadyExistsError):
            save(any_store, make_state(1), step=7)
        assert newest_stable(any_store).manifest == first

    def test_of_two_attempts_the_superseded_one_stops(self, any_store):
        old, new = claim_attempt(any_store, {}), claim_attempt(any_store, {})
        with pytest.raises(SupersededError, match=f"attempt {old} .* superseded by attempt {new}"):
            save(any_store, make_state(0), step=7, attempt=old)
        assert newest_stable(any_store) is None
        assert save(any_store, make_state(0), step=7, attempt=new).attempt == new


def test_a_large_shard_is_read_back_in_ranges(any_store, monkeypatch):
    monkeypatch.setattr(type(any_store.backend), "piece_bytes", 1000)
    spec = TensorSpec(name="big", dtype="U8", shape=(5500,))
    data = np.random.default_rng(0).integers(0, 256, 5500, np.uint8)
    chunks = [Chunk(spec=spec, row_offset=0, num_rows=5500, begin=0, end=5500)]
    receipt = write_shard(any_store, REF.shard(0, 1), chunks, memoryview(data), {})
    assert receipt.file.size_bytes == any_store.size(REF.shard(0, 1))


@pytest.mark.parametrize(("verify", "reads", "finds"), [("full", 1, True), ("sample", 2, True), ("size", 0, False)])
def test_how_much_is_read_back(verify, reads, finds):
    """The file is of two sample ranges; a bit at its end flips on the way."""
    for damaged in (False, True):
        store, count = Store.open(f"memory://{uuid.uuid4().hex}"), []
        spec = TensorSpec(name="a", dtype="U8", shape=(100_000,))
        chunk = Chunk(spec=spec, row_offset=0, num_rows=100_000, begin=0, end=100_000)
        write, reads_of = store.write, {name: getattr(store, name) for name in ("read", "read_into")}

        def corrupt(key, parts, write=write, damaged=damaged):
            data = bytearray(b"".join(map(bytes, parts)))
            data[-1] ^= damaged
            write(key, [data])

        store.write = corrupt
        for name, read in reads_of.items():
            setattr(store, name, lambda *args, count=count, read=read: count.append(args) or read(*args))
        expected = pytest.raises(StorageError) if damaged and finds else contextlib.nullcontext()
        with expected:
            write_shard(store, REF.shard(0, 1), [chunk], memoryview(bytes(100_000)), {}, verify)
        assert len(count) == reads
