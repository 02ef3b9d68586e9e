"""The box between the driver and the group of agents, wherever they run: events to the driver, orders to the group."""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.messages.attempts import Event

_WAIT_S = 60.0


class _Mailbox:
    """Carries events to the driver, and the driver's orders to the coordinator.

    Every call may be made again, and calls may overtake each other: Ray repeats what the network has lost.
    """

    def __init__(self, again: bool = False) -> None:
        """Args: again: it takes the place of one that has died, with what that one held; others have counted on."""
        self._again = again
        self._events: list[Event] = []
        self._num_taken = None if again else 0
        """None, here and below: whoever asks next says so."""
        self._num_ordered = None if again else 0
        """Orders before those that are here."""
        self._num_idle = 0
        self._early: dict[str, dict[int, Event]] = {}
        """By sender and number, those that wait for an earlier one."""
        self._due: dict[str, int] = {}
        """By sender, the number that comes next."""
        self._orders: dict[str, HaltOrder] = {}
        self._changed = asyncio.Condition()

    async def put(self, sender: str, number: int, event: Event) -> None:
        """Args: number: senders count their events, from 0 on."""
        async with self._changed:
            due, early = self._due.get(sender, number if self._again else 0), self._early.setdefault(sender, {})
            if number >= due:  # else it is here already
                early[number] = event
            while due in early:
                self._events.append(early.pop(due))
                self._count(self._events[-1].kind)
                due += 1
            self._due[sender] = due
            self._changed.notify_all()

    async def take(self, seen: int) -> list[Event]:
        """All events but the first `seen`, which are forgotten; waits for one."""
        async with self._changed:
            taken = seen if self._num_taken is None else self._num_taken
            del self._events[: max(0, seen - taken)]
            self._num_taken = max(seen, taken)
            await self._changed.wait_for(lambda: self._events)
            return self._events.copy()

    async def order(self, token: str, order: HaltOrder) -> None:
        """Args: token: unlike that of any other order."""
        async with self._changed:
            self._orders.setdefault(token, order)
            self._changed.notify_all()

    async def orders_so_far(self) -> int:
        """What a new group passes over: those were for the group before. The end is for every group."""
        orders, self._num_ordered = list(self._orders.values()), self._num_ordered or 0
        return self._num_ordered + len(orders) - (bool(orders) and orders[-1].purpose is Purpose.END)

    async def next_order(self, seen: int) -> HaltOrder | None:
        """Order number `seen`; waits for it, a while. Asking takes nothing away: a caller may die while it waits."""
        with suppress(TimeoutError):  # or those who have died would fill the calls that an actor may have
            async with asyncio.timeout(_WAIT_S), self._changed:
                before = self._num_ordered = seen if self._num_ordered is None else self._num_ordered
                await self._changed.wait_for(lambda: before + len(self._orders) > seen)
                return list(self._orders.values())[seen - before]

    async def num_idle(self) -> int:
        """Groups of agents in a row, the last one too, that have begun no attempt."""
        return self._num_idle

    def _count(self, kind: str) -> None:
        if kind in ("placed", "attempt"):
            self._num_idle = self._num_idle + 1 if kind == "placed" else 0


class _MailboxActor(_Mailbox):
    def __init__(self) -> None:
        super().__init__(again=bool(ray.get_runtime_context().was_current_actor_reconstructed))


def make_mailbox() -> Any:
    """A mailbox on the driver's own node: it is lost only together with the driver.

    If its process dies, such as by Ray's memory monitor, Ray starts another one. What lay in it is lost.
    """
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: Any = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(**options)(_MailboxActor).remote()


class Outbox:
    """Sends events to a mailbox: each arrives once, and in this order. Waits for nothing."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._sender = uuid.uuid4().hex
        self._numbers = itertools.count()

    def put(self, event: Event) -> None:
        self._mailbox.put.remote(self._sender, next(self._numbers), event)


def send_order(mailbox: Any, order: HaltOrder) -> None:
    """The driver's order to the coordinator."""
    mailbox.order.remote(uuid.uuid4().hex, order)


def take_orders(mailbox: Any, obey: Callable[[HaltOrder], None]) -> None:
    """Pass the driver's orders on from a thread, for as long as the driver lives."""
    seen: int = ray.get(mailbox.orders_so_far.remote())

    def work() -> None:
        nonlocal seen
        with suppress(RayError):  # the driver is gone, and takes this process with it
            while True:
                order: HaltOrder | None = ray.get(mailbox.next_order.remote(seen))
                if order is not None:
                    obey(order)
                    seen += 1

    threading.Thread(target=work, name="orders", daemon=True).start()
