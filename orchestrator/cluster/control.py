"""What goes between the driver and the group of agents, wherever they run: events to the driver, orders to the group.

Also what the driver knows of the cluster's nodes: which are about to be taken away, and is there room for more workers?
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import state as cluster
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.keepers import Keepers
from orchestrator.cluster.placing import count_workers, live_nodes
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.messages.attempts import Event

NODE_POLL_S = 1.0


class _Mailbox:
    """Carries events to the driver, and the driver's orders to the coordinator."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._orders: list[HaltOrder] = []
        self._ordered = asyncio.Condition()

    async def put(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def take(self) -> list[Event]:
        """The events since the last call; waits for the first one."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events

    async def order(self, order: HaltOrder) -> None:
        async with self._ordered:
            self._orders.append(order)
            self._ordered.notify_all()

    async def orders_so_far(self) -> int:
        """What a new group passes over: those were for the group before. The end is for every group."""
        done = len(self._orders)
        return done - 1 if done and self._orders[-1].purpose is Purpose.END else done

    async def next_order(self, seen: int) -> HaltOrder:
        """Order number `seen`; waits for it. Asking takes nothing away: a caller may die while it waits."""
        async with self._ordered:
            await self._ordered.wait_for(lambda: len(self._orders) > seen)
        return self._orders[seen]


def make_mailbox() -> Any:
    """A mailbox on the driver's own node: it is lost only together with the driver."""
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()


def take_orders(mailbox: Any, obey: Callable[[HaltOrder], None]) -> None:
    """Pass the driver's orders on from a thread, for as long as the driver lives."""
    seen: int = ray.get(mailbox.orders_so_far.remote())

    def work() -> None:
        nonlocal seen
        with suppress(RayError):  # the driver is gone, and takes this process with it
            while True:
                obey(ray.get(mailbox.next_order.remote(seen)))
                seen += 1

    threading.Thread(target=work, name="orders", daemon=True).start()


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
            case "attempt":
                self._seen, self._world_size = {}, event.fields["world_size"]
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
        while True:
            try:
                events = ray.get(self._mailbox.take.remote(), timeout=None if not self._done.is_set() else 1)
            except (RayError, TimeoutError):
                return
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
    ) -> None:
        """Args: max_workers: 0 for a fixed number of workers; resources: of one worker."""
        self._listener = listener
        self._order = order
        self._max_workers = max_workers
        self._resources = resources
        self._keepers = keepers
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
        while not self._closed.wait(NODE_POLL_S):
            try:
                self._look()
            except RayError:
                continue  # the head is away; if it stays away, the driver ends for that

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
        if room > len(group):  # or does Ray only not know yet that a node is lost?
            room = count_workers(self._resources, live_nodes(ask=True), self._max_workers)
        # Twice in a row: a node that is lost while a group starts may still be counted.
        self._roomy_polls = self._roomy_polls + 1 if room > len(group) else 0
        if self._roomy_polls >= 2:
            self._order_once(Purpose.GROW, f"there is room for {room} workers instead of {len(group)}")

    def _order_once(self, purpose: Purpose, reason: str, *about: str) -> None:
        """Once for each group of agents."""
        if (key := (purpose.value, *about)) not in self._ordered:
            self._ordered.add(key)
            self._order(HaltOrder(purpose=purpose, reason=reason))
