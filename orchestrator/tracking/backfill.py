"""The journal of a machine that the run is new on: what other machines saw of it, from the run's own record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from heapq import merge
from itertools import chain
from operator import attrgetter
from pathlib import Path

from orchestrator.checkpoint.keys import METRICS
from orchestrator.checkpoint.store import Store
from orchestrator.messages.attempts import Event
from orchestrator.tracking.journal import NAME, Journal, encode
from orchestrator.tracking.record import Row, of_the_owner, read_events
from orchestrator.tracking.streaming import OrderedRows

_OF_A_ROW = ("step", "attempt", "time_s")


def fill_journal(folder: Path, introduction: Event, store: Store, session: str) -> int:
    """Write the run's past into the journal of `folder`, if there is none yet; the number of events taken.

    Without it, W&B and TensorBoard would lack what the first machine had not uploaded when it was lost.

    Args:
        introduction: the driver's, which the sinks need before anything else.
        session: the life of this driver: its own events come to the journal in another way.

    Raises:
        StorageError: the record could not be read; no journal was made.
        OSError: the journal could not be written.
    """
    if (folder / NAME).exists():
        return 0
    past = (event for event in _past(store) if event.fields.get("session") != session)
    oldest = next(past, None)
    if oldest is None:
        return 0
    number = 0
    unfinished = folder / f"{NAME}.{session}"  # whoever dies in here leaves no half of a past
    journal = Journal(unfinished)
    try:
        for number, event in enumerate(chain((introduction, oldest), past)):
            journal.append(encode(event, f"before-{session}", number))
    except BaseException:
        unfinished.unlink()
        raise
    finally:
        journal.close()
    unfinished.rename(folder / NAME)
    return number


def _past(store: Store) -> Iterator[Event]:
    """All that happened, in order of time; steps may be in it twice."""
    marks = ("step", "alive")  # of the steps without their numbers, which the other folder has
    events = (_as_told(event) for event in of_the_owner(read_events(store)) if event.kind not in marks)
    # Two may have the same time: then an attempt's own order counts.
    rows = OrderedRows(store, METRICS, lambda row: (row["time_s"], (row["attempt"], row["step"]), row))
    yield from merge(events, (_step(row) for *_, row in rows), key=attrgetter("time_s"))


def _as_told(event: Event) -> Event:
    """With NaN again where the record, as JSON, has null."""
    if event.kind != "validation":
        return event
    return replace(event, fields={**event.fields, "metrics": _numbers(event.fields["metrics"])})


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _step(row: Row) -> Event:
    metrics = _numbers({name: value for name, value in row.items() if name not in _OF_A_ROW})
    return Event(
        kind="step", fields={"step": row["step"], "attempt": row["attempt"], "metrics": metrics}, time_s=row["time_s"]
    )
