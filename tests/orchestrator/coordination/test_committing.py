"""What is said of a commit."""

from __future__ import annotations

import uuid

import pytest

from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.committing import CommitEnded, CommitJob, carry_out
from orchestrator.errors import StorageError, UnknownOutcomeError
from tests.orchestrator.checkpoint.states import make_info, make_state, write_shards
from trainers.progress import Progress

REF = CheckpointRef(50, 1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StorageError("unreachable"), "unreachable"),
        (UnknownOutcomeError("no answer"), "no answer"),
        (KeyError("a bug"), "KeyError('a bug')"),
    ],
)
def test_a_commit_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    shards = write_shards(store, make_state(5), 2, REF)
    job = CommitJob(shards=shards, info=make_info(5, 1), tier="storage")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", lambda *_: (_ for _ in ()).throw(error))
        ended = carry_out(store, job, lambda: False)
    assert ended == CommitEnded(attempt=1, progress=Progress(5, 50), tier="storage", error=said)
    assert newest_stable(store) is None
    ended = carry_out(store, job, lambda: False)
    assert ended.error is None and ended.size_bytes > 0
    found = newest_stable(store)
    assert found is not None and found.ref == REF
