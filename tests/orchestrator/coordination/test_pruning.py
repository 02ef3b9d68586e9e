"""The thread that prunes: asked, never waited for, and never the end of anything."""

from __future__ import annotations

import queue
import uuid

import pytest

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import list_checkpoints
from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.pruning import BackgroundPruner
from orchestrator.errors import StorageError
from orchestrator.messages.attempts import Event
from tests.orchestrator.checkpoint.states import make_state, save


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def start(store: Store, grace_s: float, undo_steps: int = 0) -> tuple[BackgroundPruner, queue.Queue[Event]]:
    events: queue.Queue[Event] = queue.Queue()
    keep = RetentionConfig(last=1, grace_s=grace_s)
    return BackgroundPruner(lambda: Store.open(store.url), keep, events.put, undo_steps), events


def test_removes_on_request_and_comes_back_by_itself_after_the_grace_period(store: Store) -> None:
    claim_attempt(store, {})
    first, second = (save(store, make_state(step), step=step).ref for step in (1, 2))
    pruner, events = start(store, grace_s=0.2)
    pruner.request(1)
    event = events.get(timeout=10)
    assert (event.kind, event.fields) == ("pruned", {"checkpoint": str(first), "reason": "older than the newest 1"})
    assert [info.ref for info in list_checkpoints(store)] == [second]


def test_what_may_be_undone_yet_is_not_all_there_is(store: Store) -> None:
    claim_attempt(store, {})
    refs = [save(store, make_state(step), step=step).ref for step in range(1, 6)]
    pruner, events = start(store, grace_s=0.0, undo_steps=3)
    pruner.request(1)
    assert {events.get(timeout=10).fields["checkpoint"] for _ in range(2)} == {str(refs[at]) for at in (0, 3)}
    assert [info.ref for info in list_checkpoints(store)] == [refs[4], refs[2], refs[1]]


def test_a_failed_pass_is_reported_and_the_next_one_works(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    claim_attempt(store, {})
    for step in (1, 2):
        save(store, make_state(step), step=step)
    pruner, events = start(store, grace_s=0.0)
    for error, text in ((StorageError("unreachable"), "unreachable"), (KeyError("a bug"), "KeyError: 'a bug'")):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "delete", lambda *_, error=error: (_ for _ in ()).throw(error))
            pruner.request(1)
            event = events.get(timeout=10)
        assert (event.kind, event.fields["error"]) == ("prune_failed", text)
    pruner.request(1)
    assert events.get(timeout=10).kind == "pruned"


def test_a_superseded_attempt_prunes_nothing_and_says_nothing(store: Store) -> None:
    claim_attempt(store, {})
    for step in (1, 2):
        save(store, make_state(step), step=step)
    claim_attempt(store, {})
    pruner, events = start(store, grace_s=0.0)
    pruner.request(1)
    with pytest.raises(queue.Empty):
        events.get(timeout=0.3)
    assert len(list_checkpoints(store)) == 2
    pruner.request(2)
    assert events.get(timeout=10).kind == "pruned"
