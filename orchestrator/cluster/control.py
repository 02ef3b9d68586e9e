"""What the driver hears of its group of agents, and knows of the cluster's nodes: which are about to be taken away, and
is there room for more workers?
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import state as cluster
from ray.exceptions import RayError

from orchestrator.cluster.keepers import Keepers
from orchestrator.cluster.placing import count_workers, live_nodes
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.messages.attempts import Event

NODE_POLL_S = 1.0
_AGAIN_S = 1.0


class Listener:
    """The driver's end: passes events on in a thread, and remembers the outcome and where the agents are."""

    def __init__(self, mailbox: Any, show: Callable[[Event], None]) -> None:
        self._mailbox = mailbox
        self._show = show
        self._outcome: dict[str, Any] | None = None
        self._done = threading.Event()
        self._seen: dict[int, str] = {}
        self._attempt = self._world_size = 0
        self._thread = threading.Thread(target=self._listen, name="mailbox", daemon=True)
        self._thread.start()

    def finish(self) -> dict[str, Any] | None:
        """Stop listening; the outcome, if one arrived."""
        self._done.set()
        self._thread.join(timeout=5)
        if self._outcome is None:
            with suppress(RayError):  # its node may be what was lost
                ray.kill(self._mailbox)  # or its process, and the thread that waits for it, would stay
        return self._outcome

    @property
    def nodes(self) -> Mapping[int, str]:
        """Node of each rank of the group that is at work; empty while it is not complete."""
        seen = dict(self._seen)
        return seen if len(seen) == self._world_size else {}

    def _note(self, event: Event) -> None:
        match event.kind:
            case "outcome":
                self._outcome = dict(event.fields)
            case "attempt" if event.fields["attempt"] >= self._attempt:  # else it is late: of a group that was cut off
                if event.fields.get("memory") is None:  # else it is the same group, and it has something to save
                    self._seen = {}
                self._world_size = event.fields["world_size"]
                self._attempt = event.fields["attempt"]
            case "trainer":
                self._seen = {**self._seen, event.fields["rank"]: event.fields["node"]}
            case "agent_lost" | "group_lost" | "regroup":
                self._seen = {}

    def _tell(self, event: Event) -> None:
        try:
            self._show(event)
        except Exception:  # a bug there must go unnoticed no more than it may make the driver deaf to the outcome
            traceback.print_exc()

    def _listen(self) -> None:
        seen = 0
        while True:
            try:
                events = ray.get(self._mailbox.take.remote(seen), timeout=None if not self._done.is_set() else 1)
            except (RayError, TimeoutError):
                if self._done.wait(_AGAIN_S):
                    return
                continue  # whatever it was: nobody else would hear of the outcome
            seen += len(events)
            for event in events:
                # A group that was cut off, and replaced, finds out when it is back that it is superseded: this run is
                # not, for who has superseded it is the next group.
                if event.kind != "outcome" or event.fields.get("attempt", self._attempt) >= self._attempt:
                    self._note(event)
                    self._tell(event)
            if self._outcome is not None:
                return


class NodeWatch:
    """Looks at the cluster's nodes, in a thread, and orders what follows: a keeper, a drain, or growth."""

    def __init__(
        self,
        listener: Listener,
        order: Callable[[HaltOrder], None],
        max_workers: int,
        resources: Mapping[str, float],
        keepers: Keepers,
        note: Callable[[Event], None],
    ) -> None:
        """
        Args:
            max_workers: 0 for a fixed number of workers.
            resources: of one worker.
            note: told, from the thread, what keeps it from looking.
        """
        self._listener = listener
        self._order = order
        self._max_workers = max_workers
        self._resources = resources
        self._keepers = keepers
        self._note = note
        self._ordered: set[tuple[str, ...]] = set()
        self._roomy_polls = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="nodes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more: Ray must not be shut down under a thread that asks it something."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        told = ""
        while not self._closed.wait(NODE_POLL_S):
            try:
                self._look()
            except RayError:
                continue  # the head is away; if it stays away, the driver ends for that
            except Exception as error:  # a bug, ours or Ray's: the next look may go well, and drains must be seen
                why = f"{type(error).__name__}: {error}"
                if why != told:
                    self._note(Event(kind="nodes_unseen", fields={"error": why}, time_s=time.time()))
                told = why

    def _look(self) -> None:
        nodes, group = live_nodes(), self._listener.nodes
        self._keepers.tend(nodes, group.values())
        if not group:
            self._ordered, self._roomy_polls = set(), 0
            return
        draining = cluster.get_draining_nodes()
        for node in sorted(set(group.values()) & set(draining)):
            left_s = draining[node] / 1000 - time.time()
            when = f"gone in {left_s:.0f} s" if draining[node] else "no deadline given"
            self._order_once(Purpose.DRAIN, f"node {node[:8]} is being drained, {when}", node)
        room = count_workers(self._resources, nodes, self._max_workers)
        if room > len(group):  # or does Ray only not know yet that a node is lost? Or does somebody else use it?
            nodes = live_nodes(ask=True)
            free = {node: has for node, has in cluster.available_resources_per_node().items() if node in nodes}
            more = count_workers(self._resources, free, self._max_workers)
            room = min(count_workers(self._resources, nodes, self._max_workers), len(group) + more)
        # Twice in a row: a node that is lost while a group starts may still be counted.
        self._roomy_polls = self._roomy_polls + 1 if room > len(group) else 0
        if self._roomy_polls >= 2:
            self._order_once(Purpose.GROW, f"there is room for {room} workers instead of {len(group)}")

    def _order_once(self, purpose: Purpose, reason: str, *about: str) -> None:
        """Once for each group of agents."""
        if (key := (purpose.value, *about)) not in self._ordered:
            self._ordered.add(key)
            self._order(HaltOrder(purpose=purpose, reason=reason))
