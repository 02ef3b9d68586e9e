"""What a group of agents does without who knows the memory of the nodes; Ray is left out."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from orchestrator.agents import agent
from orchestrator.checkpoint.store import Store
from orchestrator.cluster import peer_memory
from orchestrator.errors import StorageError
from orchestrator.messages.attempts import Event
from orchestrator.stores import Stores

pytestmark = pytest.mark.ray  # imports it


@pytest.mark.parametrize("error", [GetTimeoutError(), RayActorError()])
def test_it_begins_without_that_memory_if_nobody_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, error: RayError
) -> None:
    def get(answer: object, timeout: float) -> None:
        assert 60 < timeout < 600, "longer than the directory waits for new nodes, and not for ever"
        raise error

    monkeypatch.setattr(peer_memory, "ray", SimpleNamespace(get=get))
    directory: Any = SimpleNamespace(ring=SimpleNamespace(remote=lambda: "an answer"))
    told: list[Event] = []
    assert agent._find_peers(directory, told.append) is None
    assert [(event.kind, event.fields["error"]) for event in told] == [
        ("peers_lost", f"who knows it does not answer ({type(error).__name__})")
    ]


def test_what_is_meant_for_memory_that_is_not_there_fails_as_storage_does() -> None:
    with pytest.raises(StorageError, match="no memory of nodes"):
        Stores(storage=Store.open(f"memory://{uuid.uuid4().hex}")).of("peer")
