from __future__ import annotations

import pytest

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import (
    CheckpointState,
    abandon,
    list_checkpoints,
    load_manifest,
    newest_stable,
    quarantine,
    take_over,
)
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import DamagedCheckpointError, MissingObjectError, StorageError, SupersededError
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


def test_what_was_seen_is_not_read_again_unless_something_came_or_went(store, monkeypatch):
    refs = [save(store, make_state(step), step=step).ref for step in range(3)]
    known = {info.ref: info for info in list_checkpoints(store)}
    quarantine(store, refs[1], "a bit flipped", attempt=1)
    read, whole = [], store.read
    monkeypatch.setattr(store, "read", lambda key: read.append(key) or whole(key))
    again = list_checkpoints(store, known)
    assert read == [refs[1].quarantine]
    assert again == list_checkpoints(store) and [str(info.state) for info in again] == [
        "stable",
        "quarantined",
        "stable",
    ]


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


class Woken:
    """The store of an attempt that sleeps between its last look at the attempts and the creation of its manifest."""

    def __init__(self, store: Store, meanwhile) -> None:
        self.store, self.meanwhile = store, meanwhile

    def __getattr__(self, name):
        return getattr(self.store, name)

    def create(self, key, data):
        self.meanwhile()
        self.store.create(key, data)


def test_who_is_superseded_between_its_check_and_its_commit_commits_nothing(store):
    old = claim_attempt(store, {})
    first = save(store, make_state(1), step=1, attempt=old).ref
    seen = []

    def taken_over():
        new = claim_attempt(store, {})
        seen.extend(info for info in take_over(store, new) if info.state is CheckpointState.STABLE)

    with pytest.raises(SupersededError, match="superseded by attempt 2"):
        save(Woken(store, taken_over), make_state(2), step=2, attempt=old)
    assert [info.ref for info in seen] == [first] and newest_stable(store).ref == first
    assert states(store) == [(20, "abandoned"), (10, "stable")]


def test_every_older_attempt_is_closed(store):
    for attempt in (1, 2):
        write_shards(store, make_state(attempt), 2, CheckpointRef(10 * attempt, claim_attempt(store, {})))
    new = claim_attempt(store, {})
    assert [info.state for info in take_over(store, new)] == [CheckpointState.ABANDONED] * 2


def test_a_commit_that_comes_before_it_is_closed_counts(store):
    old = claim_attempt(store, {})
    ref = save(store, make_state(1), step=1, attempt=old).ref
    assert abandon(store, ref, attempt=2).state is CheckpointState.STABLE
    assert [info.ref for info in take_over(store, claim_attempt(store, {}))] == [ref]


def test_the_newest_attempt_s_own_save_is_not_closed(store):
    attempt = claim_attempt(store, {})
    write_shards(store, make_state(5), 2, CheckpointRef(50, attempt))
    assert [info.state for info in take_over(store, attempt)] == [CheckpointState.WRITING]


def test_what_a_store_lists_late_is_not_missing(store, monkeypatch):
    ref = save(store, make_state(1), step=1).ref
    real = store.list
    monkeypatch.setattr(store, "list", lambda folder: [name for name in real(folder) if not name.startswith("shard")])
    assert newest_stable(store).ref == ref
    store.delete(ref.shard(0, 3))
    assert newest_stable(store) is None and states(store) == [(10, "damaged")]


def test_a_missing_file_is_seen_without_reading_any(store):
    first, second = (save(store, make_state(step), step=step, world_size=2).ref for step in (1, 2))
    store.delete(second.shard(1, 2))
    info = list_checkpoints(store)[0]
    assert info.state is CheckpointState.DAMAGED and info.detail.endswith("shard-00001-of-00002.safetensors is missing")
    assert newest_stable(store).ref == first


def test_a_checkpoint_that_is_removed_under_our_eyes_is_no_error(store, monkeypatch):
    first, second = (save(store, make_state(step), step=step).ref for step in (1, 2))
    listed = store.list

    def list_then_lose(folder):
        names = listed(folder)
        if folder == second.folder:
            store.delete(second.manifest)
        return names

    monkeypatch.setattr(store, "list", list_then_lose)
    assert [(info.ref, str(info.state)) for info in list_checkpoints(store)] == [(second, "expired"), (first, "stable")]
