"""What dead attempts leave behind goes, and nothing of a living one."""

from __future__ import annotations

import os

import pytest

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.retention import Pruner
from orchestrator.checkpoint.store import Store
from orchestrator.errors import SupersededError
from tests.orchestrator.checkpoint.retained import Run, leave_upload
from tests.orchestrator.checkpoint.states import make_state, write_shards
from tests.s3.stores import abort_all


def test_the_litter_of_killed_writers_goes_after_a_day(tmp_path):
    run = Run(Store.open(str(tmp_path)), 1)
    dead, barely = CheckpointRef(90, run.attempt), CheckpointRef(80, run.attempt)
    write_shards(run.store, make_state(9), 2, dead)
    (tmp_path / barely.folder).mkdir()
    fresh, old = (tmp_path / run.refs[0].file(f".{letter * 32}.tmp") for letter in "ab")
    for path in (fresh, old):
        path.write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    run.attempt = claim_attempt(run.store, {})
    run.prune()
    assert fresh.exists() and not old.exists() and len(run.store.list("checkpoints")) == 3
    for path in (barely.folder, dead.manifest):
        os.utime(tmp_path / path, (0, 0))
    run.prune(600)  # a folder is searched every ten minutes
    assert run.store.list("checkpoints") == [str(run.refs[0])] and run.steps == [1]


def test_uploads_of_attempts_that_are_over_are_swept_after_the_grace_period(tmp_path):
    run = Run(Store.open(str(tmp_path)), 1)
    run.attempt = claim_attempt(run.store, {})
    old, young = (
        leave_upload(run.store, f"checkpoints/{samples:013d}-0001", age) for samples, age in ((7, 150), (8, 40))
    )
    living = [leave_upload(run.store, f"checkpoints/0000000000009-{attempt:04d}", 150) for attempt in (2, 3)]
    foreign, forgotten = leave_upload(run.store, "exports", 150), leave_upload(run.store, "exports/b", 90_000)
    assert 55 < run.prune() <= 60, "when the younger one may go"
    assert not old.exists() and not forgotten.exists()
    assert young.exists() and foreign.exists() and all(path.exists() for path in living)


def test_a_folder_is_not_searched_after_each_save_but_when_something_may_go(tmp_path, monkeypatch):
    run, searched, unfinished = Run(Store.open(str(tmp_path)), 1), [], Store.unfinished_uploads
    monkeypatch.setattr(Store, "unfinished_uploads", lambda self: (searched.append(run.now_s), unfinished(self))[1])
    assert [run.prune(after_s) for after_s in (0, 1, 598)] == [None] * 3 and searched == [0]
    run.prune(1)
    assert searched == [0, 600]
    left = leave_upload(run.store, f"checkpoints/0000000000007-{run.attempt:04d}", 40)
    run.attempt = claim_attempt(run.store, {})
    wait = run.prune(1)
    assert 55 < wait <= 60 and searched[2:] == [601], "what the attempt before has left"
    assert run.prune(30) == pytest.approx(wait - 30) and searched[3:] == [] and left.exists()
    os.utime(left, (0, 0))
    assert run.prune(30) is None and not left.exists()


def test_a_superseded_attempt_sweeps_nothing(tmp_path):
    run = Run(Store.open(str(tmp_path)), 1)
    run.attempt = claim_attempt(run.store, {})
    left = leave_upload(run.store, "checkpoints/0000000000007-0001", 150)
    claim_attempt(run.store, {})
    with pytest.raises(SupersededError):
        run.prune()
    assert left.exists()


@pytest.mark.s3
def test_uploads_are_swept_on_s3(s3_server, s3_url):
    store = Store.open(s3_url)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    keys = [f"{prefix}/checkpoints/0000000000010-{attempt:04d}/shard" for attempt in (1, 2)]
    for key in keys:
        s3_server.client.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    attempts = [claim_attempt(store, {}) for _ in range(2)]
    Pruner(store, RetentionConfig(grace_s=0.0)).prune(attempts[1], lambda _: None)
    assert [f"{bucket}/{key}" for key in keys[1:]] == [upload.path for upload in store.unfinished_uploads()]
    assert abort_all(store) == 1
