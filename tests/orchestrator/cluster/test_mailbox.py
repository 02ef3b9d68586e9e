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


def test_one_that_takes_the_place_of_another_goes_on_where_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "_WAIT_S", 0.001)
    grow, end = HaltOrder(purpose=Purpose.GROW, reason="room"), HaltOrder(purpose=Purpose.END, reason="SIGTERM")

    async def deliver() -> None:
        mailbox = _Mailbox(again=True)
        await mailbox.put("a", 7, event("seven"))
        await mailbox.put("a", 9, event("nine"))
        assert [found.kind for found in await mailbox.take(20)] == ["seven"]
        await mailbox.put("a", 8, event("eight"))
        assert [found.kind for found in await mailbox.take(21)] == ["eight", "nine"]
        await mailbox.order("1", grow)
        assert await mailbox.next_order(3) == grow and await mailbox.next_order(4) is None
        await mailbox.order("2", end)
        assert await mailbox.next_order(4) == end
        assert await mailbox.orders_so_far() == 4, "a new group is to hear of the end too"

    asyncio.run(asyncio.wait_for(deliver(), 30))


def test_groups_that_begin_no_attempt_are_counted() -> None:
    async def deliver() -> list[int]:
        mailbox, counts = _Mailbox(), []
        for number, kind in enumerate(("placed", "group_lost", "placed", "attempt", "group_lost", "placed")):
            await mailbox.put("a", number, event(kind))
            counts.append(await mailbox.num_idle())
        return counts

    assert asyncio.run(deliver()) == [1, 1, 2, 0, 0, 1]
