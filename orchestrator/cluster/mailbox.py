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

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._num_taken = 0
        self._early: dict[str, dict[int, Event]] = {}
        """By sender and number, those that wait for an earlier one."""
        self._due: dict[str, int] = {}
        """By sender, the number that comes next."""
        self._orders: dict[str, HaltOrder] = {}
        self._changed = asyncio.Condition()

    async def put(self, sender: str, number: int, event: Event) -> None:
        """Args: number: senders count their events, from 0 on."""
        async with self._changed:
            due, early = self._due.get(sender, 0), self._early.setdefault(sender, {})
            if number >= due:  # else it is here already
                early[number] = event
            while due in early:
                self._events.append(early.pop(due))
                due += 1
            self._due[sender] = due
            self._changed.notify_all()

    async def take(self, seen: int) -> list[Event]:
        """All events but the first `seen`, which are forgotten; waits for one."""
        async with self._changed:
            if seen > self._num_taken:
                del self._events[: seen - self._num_taken]
                self._num_taken = seen
            await self._changed.wait_for(lambda: self._events)
            return self._events.copy()

    async def order(self, token: str, order: HaltOrder) -> None:
        """Args: token: unlike that of any other order."""
        async with self._changed:
            self._orders.setdefault(token, order)
            self._changed.notify_all()

    async def orders_so_far(self) -> int:
        """What a new group passes over: those were for the group before. The end is for every group."""
        orders = list(self._orders.values())
        return len(orders) - 1 if orders and orders[-1].purpose is Purpose.END else len(orders)

    async def next_order(self, seen: int) -> HaltOrder | None:
        """Order number `seen`; waits for it, a while. Asking takes nothing away: a caller may die while it waits."""
        with suppress(TimeoutError):  # or those who have died would fill the calls that an actor may have
            async with asyncio.timeout(_WAIT_S), self._changed:
                await self._changed.wait_for(lambda: len(self._orders) > seen)
                return list(self._orders.values())[seen]


def make_mailbox() -> Any:
    """A mailbox on the driver's own node: it is lost only together with the driver."""
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, max_task_retries=-1)(_Mailbox).remote()


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
