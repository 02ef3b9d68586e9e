from __future__ import annotations

import pytest

from orchestrator.checkpoint.catalog import (
    CheckpointState,
    list_checkpoints,
    load_manifest,
    newest_stable,
    quarantine,
)
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import DamagedCheckpointError, MissingObjectError, StorageError
from tests.orchestrator.checkpoint.states import make_state, save, write_shards


def states(store: Store) -> list[tuple[int, str]]:
    return [(info.ref.samples_seen, str(info.state)) for info in list_checkpoints(store)]


def flip(store: Store, key: str, byte: int) -> None:
    data = bytearray(store.read(key))
    data[byte] ^= 1
    store.write(key, [data])


def test_a_new_run_has_none(any_store):
    assert list_checkpoints(any_store) == [] and newest_stable(any_store) is None


def test_every_state_is_told_apart_newest_first(any_store):
    refs = [save(any_store, make_state(step), step=step).ref for step in range(4)]
    flip(any_store, refs[2].manifest, 100)
    quarantine(any_store, refs[3], "a bit flipped", attempt=1)
    save(any_store, make_state(4), step=4, health={"ok": False, "reason": "loss is NaN"})
    write_shards(any_store, make_state(5), 2, CheckpointRef(50, 1))
    assert states(any_store) == [
        (50, "writing"), (40, "unhealthy"), (30, "quarantined"), (20, "damaged"), (10, "stable"), (0, "stable")
    ]  # fmt: skip
    details = {str(info.state): info.detail for info in list_checkpoints(any_store)}
    assert "loss is NaN" in details["unhealthy"] and details["quarantined"] == "a bit flipped"
    assert "manifest.json is damaged" in details["damaged"]
    assert newest_stable(any_store).ref == refs[1]
    assert newest_stable(any_store).manifest == load_manifest(any_store, refs[1])


def test_of_one_progress_the_newest_attempt_counts(store):
    for attempt in (1, 3, 2):
        save(store, make_state(0), step=7, attempt=10 - attempt)
    assert newest_stable(store).ref == CheckpointRef(70, 9)


def test_foreign_files_are_left_alone(store):
    save(store, make_state(0), step=1)
    for key in ("checkpoints/README", "checkpoints/old/manifest.json", "checkpoints/0000000000099-0001.bak/x"):
        store.write(key, [b"x"])
    assert states(store) == [(10, "stable")]


def test_a_manifest_of_another_checkpoint_is_damage(store):
    first, second = (save(store, make_state(step), step=step).ref for step in (1, 2))
    store.write(second.manifest, [store.read(first.manifest)])
    with pytest.raises(DamagedCheckpointError, match="is the manifest of checkpoint 0000000000010-0001"):
        load_manifest(store, second)
    assert newest_stable(store).ref == first


def test_what_was_never_committed_is_missing_not_damaged(store):
    with pytest.raises(MissingObjectError):
        load_manifest(store, CheckpointRef(10, 1))


def test_the_first_reason_of_a_quarantine_stays(any_store):
    ref = save(any_store, make_state(0), step=1).ref
    quarantine(any_store, ref, "first", attempt=1)
    quarantine(any_store, ref, "second", attempt=2)
    assert list_checkpoints(any_store)[0].detail == "first"


def test_a_damaged_marker_still_counts(store):
    ref = save(store, make_state(0), step=1).ref
    store.write(ref.quarantine, [b"{"])
    (info,) = list_checkpoints(store)
    assert info.state is CheckpointState.QUARANTINED and "cannot be read" in info.detail


def test_a_store_that_is_down_is_not_an_empty_one(store, monkeypatch):
    save(store, make_state(0), step=1)

    def down(*args, **kwargs):
        raise TimeoutError("no answer")

    monkeypatch.setattr(store.backend, "read", down)
    with pytest.raises(StorageError, match="no answer"):
        newest_stable(store)
