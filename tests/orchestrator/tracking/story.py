"""Events of made-up runs, and their record in storage."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from orchestrator.checkpoint.keys import EVENTS, METRICS, RowsRef
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.messages.attempts import Event
from orchestrator.tracking.record import encode, event_row, step_row

T0 = 1_700_000_000.0
CONFIG = {"run": {"name": "tale"}, "train": {"num_steps": 100, "global_batch_size": 8}}


def event(at: float, kind: str, /, **fields: Any) -> Event:
    """Args: at: seconds after T0."""
    return Event(kind=kind, fields=fields, time_s=T0 + at)


def started(at: float, session: str = "a", **fields: Any) -> Event:
    return event(at, "started", session=session, num_steps=100, host="h", pid=1, workers=2, **fields)


def attempt(at: float, number: int, session: str = "a") -> Event:
    return event(at, "attempt", session=session, attempt=number, restore=None, cause="start", world_size=2)


def training(at: float, number: int, step: int, session: str = "a") -> Event:
    return event(at, "training", session=session, attempt=number, step=step)


def step(at: float, number: int, value: int, session: str = "a") -> Event:
    metrics = {"loss": 1.0 / value, "grad_norm": 0.5}
    return event(at, "step", session=session, attempt=number, step=value, metrics=metrics)


def steps(begin: float, number: int, values: Iterable[int], each: float = 1.0, session: str = "a") -> Iterator[Event]:
    """Steps one after the other; the first is done `each` seconds after `begin`."""
    for index, value in enumerate(values):
        yield step(begin + (index + 1) * each, number, value, session)


def down(at: float, session: str = "a", kind: str = "killed") -> Event:
    return event(at, "down", session=session, rank=1, kind=kind, message="the trainer was ended by SIGKILL")


def snapshot(at: float, number: int, value: int, stall_s: float) -> Event:
    return event(at, "snapshot", session="a", attempt=number, step=value, stall_s=stall_s)


def finished(at: float, session: str = "a") -> Event:
    return event(at, "outcome", session=session, ending="finished", message="step 100 is done and committed")


def one_kill() -> list[Event]:
    """Starts in 5 s, saves step 10, is killed in step 21, goes on from 10, and ends with step 30."""
    return [
        started(0),
        attempt(3, 1),
        training(5, 1, 0),
        *steps(5, 1, range(1, 11)),
        snapshot(15.5, 1, 10, 0.5),
        *steps(15.5, 1, range(11, 21)),
        down(27.5),
        attempt(28, 2),
        training(30, 2, 10),
        *steps(30, 2, range(11, 31)),
        finished(52),
    ]


def new_store(config: dict[str, Any] | None = None) -> Store:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    open_or_create(store, CONFIG if config is None else config)
    return store


def record(store: Store, events: Iterable[Event], writer: str = "0" * 8, number: int = 1) -> None:
    """Store `events` in one object a folder, as one writer, every step as an event too."""
    taken = list(events)
    rows = [event_row(one, one.fields.get("session", "a"), writer, seq) for seq, one in enumerate(taken)]
    metrics = [step_row(one) for one in taken if one.kind == "step"]
    store.write(f"{EVENTS}/{RowsRef(1, number, writer, 0)}", [encode(rows)])
    if metrics:
        store.write(f"{METRICS}/{RowsRef(1, number, writer, 0)}", [encode(metrics)])
