from __future__ import annotations

import os
import time

import pytest

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import list_checkpoints, newest_stable, quarantine
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.retention import (
    Claimed,
    Pruner,
    claim_fields,
    expire,
    pin,
    unpin,
)
from orchestrator.checkpoint.selection import select_checkpoint
from orchestrator.checkpoint.store import Store
from orchestrator.errors import StorageError, SupersededError
from tests.orchestrator.checkpoint.dict_store import DictStore
from tests.orchestrator.checkpoint.retained import GRACE_S, Run, leave_upload
from tests.orchestrator.checkpoint.states import make_state, save, write_shards
from trainers.errors import ConfigError


def test_marked_first_and_removed_after_the_grace_period(store):
    run = Run(store, 4, last=2)
    assert run.prune() == GRACE_S
    assert run.steps == [1, 2, 3, 4] and run.expired == [1, 2] and run.removed == []
    assert run.prune(GRACE_S - 1) == 1 and run.steps == [1, 2, 3, 4]
    assert run.prune(1) is None
    assert run.steps == [3, 4] and [store.list(ref.folder) for ref in run.refs[:2]] == [[], []]
    assert [(removal.ref, removal.reason) for removal in run.removed] == [
        (run.refs[1], "older than the newest 2"),
        (run.refs[0], "older than the newest 2"),
    ]


def test_a_store_that_has_no_clock_counts_from_when_this_process_sees_the_mark():
    run = Run(DictStore(), 2, last=1)
    expire(run.store, run.refs[0], "by somebody whose clock we do not know")
    assert run.prune(1e9) == GRACE_S and run.steps == [1, 2]
    run.prune(GRACE_S)
    assert run.steps == [2]


@pytest.mark.parametrize("off_s", [0, 86_400 * 365, -86_400 * 365], ids=["right", "ahead", "behind"])
def test_processes_that_live_shorter_than_the_grace_period_remove_all_the_same(tmp_path, monkeypatch, off_s):
    run = Run(Store.open(str(tmp_path)), 3, last=1)
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + off_s)  # whatever this machine takes for the time
    for ref, age_s in zip(run.refs, (GRACE_S + 10, 30), strict=False):
        expire(run.store, ref, "by a process that has ended")
        os.utime(tmp_path / ref.expired, (now_s - age_s,) * 2)
    waits = run.prune()
    assert run.steps == [2, 3] and GRACE_S - 40 < waits <= GRACE_S - 30 + 1
    left = leave_upload(run.store, f"checkpoints/0000000000040-{run.attempt:04d}", 40 + off_s)
    run.prune()
    assert left.exists(), "it is being written"


def test_a_mark_of_the_future_counts_from_when_it_is_seen(tmp_path):
    run = Run(Store.open(str(tmp_path)), 2, last=1)
    expire(run.store, run.refs[0], "by a process that has ended")
    os.utime(tmp_path / run.refs[0].expired, (time.time() + 3600,) * 2)
    assert run.prune() == GRACE_S


def test_a_mark_that_was_taken_away_and_set_again_counts_from_the_second_time(store):
    run = Run(store, 2, last=1)
    run.prune()
    store.delete(run.refs[0].expired)
    assert run.prune(GRACE_S) == GRACE_S and run.expired == [1]


def test_nobody_begins_to_read_what_is_expired(store):
    run = Run(store, 2, last=1)
    run.prune()
    with pytest.raises(ConfigError, match=r"step=1 .* is being removed"):
        select_checkpoint(store, 1)
    assert select_checkpoint(store, 2).ref == run.refs[1]


def test_a_run_with_nothing_newer_goes_on_from_an_expired_one_and_it_stays(store):
    run = Run(store, 2, last=1)
    run.prune()
    quarantine(store, run.refs[1], "rotten", run.attempt)
    assert newest_stable(store).ref == run.refs[0]
    run.prune(GRACE_S)
    assert run.steps == [1] and run.expired == []


def test_pinned_while_it_was_being_marked(store):
    run = Run(store, 2, last=1)
    run.prune()
    assert pin(store, run.refs[0], "for the paper") and not pin(store, run.refs[0], "again")
    run.prune(GRACE_S)
    assert run.steps == [1, 2] and run.expired == []
    assert list_checkpoints(store)[1].pinned == "for the paper"
    unpin(store, run.refs[0])
    run.prune()
    assert run.expired == [1]
    run.prune(GRACE_S)
    assert run.steps == [2]


@pytest.mark.parametrize("num_deletes", range(5))
def test_an_interrupted_removal_is_completed_at_once_by_another(store, monkeypatch, num_deletes):
    run = Run(store, 2, last=1)
    run.prune()
    deletes = iter(range(num_deletes))
    delete = store.delete

    def fail_later(key):
        if next(deletes, None) is None:
            raise StorageError("down")
        delete(key)

    monkeypatch.setattr(store, "delete", fail_later)
    if num_deletes < 4:  # manifest, two shards, the mark
        with pytest.raises(StorageError):
            run.prune(GRACE_S)
    else:
        run.prune(GRACE_S)
    monkeypatch.undo()
    assert run.steps == ([1, 2] if num_deletes == 0 else [2])
    other = Pruner(store, RetentionConfig(last=1, grace_s=0.0 if num_deletes == 0 else GRACE_S))
    other.prune(run.attempt, run.removed.append)
    assert store.list(run.refs[0].folder) == [] and run.steps == [2]


def test_quarantined_ones_go_with_the_stable_ones_of_their_age(store):
    run = Run(store, 4, last=2, grace_s=0.0)
    for ref in (run.refs[0], run.refs[2]):
        quarantine(store, ref, "rotten", run.attempt)
    save(store, make_state(5), step=5)
    run.prune()
    assert [(info.ref.samples_seen, str(info.state)) for info in list_checkpoints(store)] == [
        (50, "stable"),
        (40, "stable"),
    ]


def test_what_a_dead_attempt_never_committed_goes_but_its_place_stays_taken(store):
    run = Run(store, 1)
    dead = CheckpointRef(90, run.attempt)
    receipts_of = write_shards(store, make_state(9), 2, dead)
    run.attempt = claim_attempt(store, {})
    own = CheckpointRef(90, run.attempt)
    write_shards(store, make_state(9), 2, own)
    run.prune()
    assert store.list(dead.folder) == ["manifest.json"] and len(store.list(own.folder)) == 2
    store.write(dead.shard(0, 2), [b"of a writer that still lives"])
    run.prune()
    assert store.list(dead.folder) == ["manifest.json"]
    assert [removal.reason for removal in run.removed] == ["never committed by attempt 1"] * 2 and receipts_of


def test_a_manifest_that_comes_back_after_its_removal_is_damage_and_goes_again(store):
    run = Run(store, 2, last=1, grace_s=0.0)
    data = store.read(run.refs[0].manifest)
    run.prune()
    store.create(run.refs[0].manifest, data)  # by an attempt that never learnt that its first request had succeeded
    assert [info.state for info in list_checkpoints(store)] == ["stable", "damaged"]
    with pytest.raises(ConfigError, match="there are steps 2"):
        select_checkpoint(store, 1)
    run.prune()
    assert [info.ref for info in list_checkpoints(store)] == [run.refs[1]]


def test_a_superseded_attempt_removes_nothing(store):
    run = Run(store, 3, last=1, grace_s=0.0)
    claim_attempt(store, {})
    with pytest.raises(SupersededError):
        run.prune()
    assert run.steps == [1, 2, 3] and run.expired == []


def test_a_pass_reads_only_what_has_changed_since_the_last_one(store, monkeypatch):
    run, read = Run(store, 4, last=2), []
    real = store.read
    monkeypatch.setattr(store, "read", lambda key, *span: read.append(key) or real(key, *span))
    run.prune()
    assert sorted(read) == [ref.manifest for ref in run.refs]
    read.clear()
    quarantine(store, run.refs[3], "rotten", run.attempt)
    run.prune()
    assert run.refs[2].manifest not in read and run.refs[3].quarantine in read
    run.prune(GRACE_S)
    assert [removal.ref for removal in run.removed] == run.refs[:1], "2 and 3 are the newest two that are sound"


def test_keep_everything(store):
    run = Run(store, 12, last=None, grace_s=0.0)
    assert run.prune() is None and len(run.steps) == 12


def test_commands_keep_to_what_the_newest_attempt_was_given(store):
    assert Claimed.of(store) == Claimed(attempt=0, config=RetentionConfig(), undo_steps=0)
    claim_attempt(store, claim_fields(RetentionConfig(last=3)))
    newest = RetentionConfig(last=4, every_steps=8, grace_s=1.0)
    claim_attempt(store, claim_fields(newest))
    assert Claimed.of(store) == Claimed(attempt=2, config=newest)
    claim_attempt(store, claim_fields(newest, undo_steps=20))
    assert Claimed.of(store) == Claimed(attempt=3, config=newest, undo_steps=20)
    claim_attempt(store, {"host": "of a version that said nothing"})
    assert Claimed.of(store) == Claimed(attempt=4)


def test_what_a_rollback_could_go_back_to_stays(store):
    run = Run(store, 6, last=1, grace_s=0.0)
    run.pruner = Pruner(store, RetentionConfig(last=1, grace_s=0.0), undo_steps=3)
    run.prune()
    assert run.steps == [3, 4, 6]
    save(store, make_state(7), step=7, world_size=2)
    run.prune()
    assert run.steps == [4, 6, 7], "the one that follows takes its place"


def test_a_pin_set_during_a_pass_that_takes_long_is_respected(store, monkeypatch):
    run = Run(store, 2, last=1)
    run.prune()
    listed = store.list

    def list_slowly(folder):
        names = listed(folder)
        if folder == run.refs[0].folder and run.now_s < GRACE_S:
            pin(store, run.refs[0], "by somebody who looked before it was marked")
            run.now_s += 2 * GRACE_S
        return names

    monkeypatch.setattr(store, "list", list_slowly)
    run.prune(1.0)
    assert run.steps == [1, 2]
