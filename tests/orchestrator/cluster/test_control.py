"""What reaches the driver, without Ray: a mailbox that is a queue."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from orchestrator.cluster import control
from orchestrator.cluster.control import Listener, NodeWatch
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.messages.attempts import Event


class Mailbox:
    """As the actor's handle."""

    def __init__(self, *kinds: tuple[str, dict[str, Any]]) -> None:
        self._events: SimpleQueue[list[Event] | None] = SimpleQueue()
        self._events.put([Event(kind=kind, fields=fields, time_s=0.0) for kind, fields in kinds])
        self.take = SimpleNamespace(remote=lambda seen: self._events)

    def kill(self) -> None:
        self._events.put(None)


def get(events: SimpleQueue[list[Event] | None], timeout: float | None) -> list[Event]:
    if (found := events.get()) is None:
        raise RayActorError
    return found


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "ray", SimpleNamespace(get=get, kill=lambda mailbox: mailbox.kill()))


def attempt(number: int) -> tuple[str, dict[str, Any]]:
    return "attempt", {"attempt": number, "world_size": 1}


def test_a_group_that_was_replaced_does_not_end_the_run() -> None:
    shown: list[Event] = []
    late = ("outcome", {"ending": "superseded", "message": "by attempt 2", "attempt": 1})
    outcome = {"ending": "finished", "message": "done", "attempt": 2}
    listener = Listener(Mailbox(attempt(1), attempt(2), late, ("outcome", outcome)), shown.append)
    assert listener.finish() == outcome
    assert [event.kind for event in shown] == ["attempt", "attempt", "outcome"]


def test_nor_if_its_attempt_is_heard_of_after_the_next_one() -> None:
    late = ("outcome", {"ending": "superseded", "message": "by attempt 2", "attempt": 1})
    outcome = {"ending": "finished", "message": "done", "attempt": 2}
    mailbox = Mailbox(attempt(2), attempt(1), late)
    mailbox._events.put([Event(kind="outcome", fields=outcome, time_s=0.0)])
    assert Listener(mailbox, lambda _: None).finish() == outcome


def test_a_mailbox_that_fails_once_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_AGAIN_S", 0.0)
    outcome = {"ending": "finished", "message": "done", "attempt": 1}
    mailbox = Mailbox(attempt(1))
    listener = Listener(mailbox, lambda _: None)
    mailbox.kill()
    mailbox._events.put([Event(kind="outcome", fields=outcome, time_s=0.0)])
    listener._thread.join(30)
    assert listener.finish() == outcome


def test_a_group_that_gives_up_before_its_first_attempt_ends_it() -> None:
    outcome = {"ending": "gave up", "message": "30 groups of agents in a row"}
    assert Listener(Mailbox(attempt(7), ("outcome", outcome)), lambda _: None).finish() == outcome


def test_a_group_that_begins_again_from_its_memory_can_be_asked_to_save_it() -> None:
    trainer = ("trainer", {"rank": 0, "node": "n"})
    outcome = ("outcome", {"ending": "stopped", "message": "SIGTERM", "attempt": 2})
    for memory, nodes in ((5, {0: "n"}), (None, {})):
        again = ("attempt", {"attempt": 2, "world_size": 1, "memory": memory})
        listener = Listener(Mailbox(attempt(1), trainer, again, outcome), lambda _: None)
        listener.finish()
        assert listener.nodes == nodes


def test_a_screen_that_fails_makes_nobody_deaf(capsys: pytest.CaptureFixture[str]) -> None:
    def show(event: Event) -> None:
        raise KeyError(event.kind)

    outcome = {"ending": "finished", "message": "done", "attempt": 1}
    assert Listener(Mailbox(attempt(1), ("outcome", outcome)), show).finish() == outcome
    assert "KeyError: 'outcome'" in capsys.readouterr().err


def test_without_an_outcome_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener(Mailbox(attempt(1)), lambda _: None)
    join = listener._thread.join
    monkeypatch.setattr(listener._thread, "join", lambda timeout=None: None)
    assert listener.finish() is None
    join(10)
    assert not listener._thread.is_alive()


def test_a_look_at_the_nodes_that_fails_is_told_once_and_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([KeyError("NodeID"), KeyError("NodeID"), RayActorError()])
    looked, told = threading.Event(), list[Event]()

    def live_nodes() -> dict[str, dict[str, float]]:
        if (error := next(looks, None)) is not None:
            raise error
        return {}

    monkeypatch.setattr(control, "NODE_POLL_S", 0.001)
    monkeypatch.setattr(control, "live_nodes", live_nodes)
    keepers: Any = SimpleNamespace(tend=lambda nodes, group: looked.set())
    listener: Any = SimpleNamespace(nodes={})
    watch = NodeWatch(listener, lambda order: None, 0, {}, keepers, told.append)
    assert looked.wait(30)
    watch.close()
    assert [(event.kind, event.fields) for event in told] == [("nodes_unseen", {"error": "KeyError: 'NodeID'"})]


class Cluster:
    """In the place of Ray: nodes of one CPU each, two of which are at work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes, self.draining, self.group = ["a", "b"], {}, {0: "a", 1: "b"}
        self.theirs: set[str] = set()
        """Nodes that somebody else uses."""
        self.orders: list[HaltOrder] = []
        monkeypatch.setattr(control, "NODE_POLL_S", 3600.0)
        monkeypatch.setattr(control, "live_nodes", lambda ask=False: {node: {"CPU": 1.0} for node in self.nodes})
        known = SimpleNamespace(get_draining_nodes=lambda: self.draining, available_resources_per_node=self.free)
        monkeypatch.setattr(control, "cluster", known)
        listener: Any = SimpleNamespace(nodes=self.group)
        keepers: Any = SimpleNamespace(tend=lambda nodes, used: None)
        self.watch = NodeWatch(listener, self.orders.append, 4, {"CPU": 1.0}, keepers, lambda event: None)

    def free(self) -> dict[str, dict[str, float]]:
        return {node: {"CPU": float(node not in {*self.group.values(), *self.theirs})} for node in self.nodes}

    def look(self) -> list[Purpose]:
        """What is ordered, if anything."""
        self.orders.clear()
        self.watch._look()
        return [order.purpose for order in self.orders]


def test_what_the_nodes_of_a_cluster_make_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    assert cluster.look() == []
    cluster.draining = {"c": 0}  # nobody's
    assert cluster.look() == []
    cluster.draining = {"b": 0}
    assert cluster.look() == [Purpose.DRAIN] and cluster.look() == [], "once"
    cluster.nodes = ["a", "b", "c"]
    assert cluster.look() == [], "a node that is lost is counted for a while"
    cluster.nodes = ["a", "b"]
    assert cluster.look() == []
    cluster.nodes = ["a", "b", "c"]
    assert cluster.look() == [] and cluster.look() == [Purpose.GROW] and cluster.look() == []
    cluster.group.clear()  # a new group is placed
    cluster.look()
    cluster.group |= {0: "a", 1: "b"}
    assert cluster.look() == [Purpose.DRAIN], "which does not know yet"
    cluster.watch.close()


def test_what_somebody_else_uses_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    cluster.nodes, cluster.theirs = ["a", "b", "c"], {"c"}
    assert [cluster.look() for _ in range(3)] == [[], [], []], (
        "or each group would be placed anew, to be as small again"
    )
    cluster.theirs.clear()
    assert cluster.look() == [] and cluster.look() == [Purpose.GROW]
    cluster.watch.close()
