"""What reaches the driver and its agents though calls are lost, made again, and overtake each other; without Ray."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cluster import mailbox as mailbox_module
from orchestrator.cluster.mailbox import Outbox, _Mailbox
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.messages.attempts import Event


def event(kind: str) -> Event:
    return Event(kind=kind, fields={}, time_s=0.0)


def test_each_event_arrives_once_and_in_order() -> None:
    calls: list[tuple[Any, ...]] = []
    handle = SimpleNamespace(put=SimpleNamespace(remote=lambda *call: calls.append(call)))
    for names in ("abc", "xy"):
        outbox = Outbox(handle)
        for name in names:
            outbox.put(event(name))

    async def deliver() -> list[list[str]]:
        mailbox, taken = _Mailbox(), []
        for index in (1, 3, 1, 0, 0, 4, 2, 1):
            await mailbox.put(*calls[index])
        seen = 0
        for _ in range(2):
            for _ in range(2):  # the first answer is lost
                events = await mailbox.take(seen)
                taken.append([found.kind for found in events])
            seen += len(events)
            await mailbox.take(0)  # one that was overtaken
            await mailbox.put("another", seen - 5, event("later"))
        return taken

    assert asyncio.run(deliver()) == [["x", "a", "b", "y", "c"]] * 2 + [["later"]] * 2


def test_an_order_that_is_repeated_is_one_and_none_is_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "_WAIT_S", 0.001)
    grow, end = HaltOrder(purpose=Purpose.GROW, reason="room"), HaltOrder(purpose=Purpose.END, reason="SIGTERM")

    async def order() -> tuple[int, HaltOrder | None, HaltOrder | None]:
        mailbox = _Mailbox()
        for token, what in (("1", grow), ("2", grow), ("1", grow), ("3", end), ("3", end)):
            await mailbox.order(token, what)
        return await mailbox.orders_so_far(), await mailbox.next_order(2), await mailbox.next_order(3)

    assert asyncio.run(order()) == (2, end, None), "the end is for every group"
