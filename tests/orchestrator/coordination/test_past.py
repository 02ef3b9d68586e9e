"""What the record says of earlier attempts, and which of its rows bind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.keys import EVENTS, METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.past import PastReader, binding_steps
from orchestrator.messages.attempts import Event
from orchestrator.tracking.record import encode, event_row, step_row
from tests.orchestrator.group import make_spec
from trainers.exclusions import Exclusions

VERSIONS = {"torch": "2.13"}


def event(kind: str, time_s: float = 0.0, /, **fields: Any) -> Event:
    return Event(kind=kind, fields=fields, time_s=time_s)


def life(session: str, *attempts: int, **versions: str) -> list[Event]:
    started = event("started", session=session, versions=versions or VERSIONS)
    return [started, *(event("attempt", session=session, attempt=attempt) for attempt in attempts)]


def row(attempt: int, step: int, **metrics: Any) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "time_s": 0.0, "loss": attempt + step / 8, "grad_norm": 1.0} | metrics


def bound(rows: list[dict[str, Any]], events: list[Event], exclusions: Exclusions | None = None, **config: Any) -> Any:
    spec = make_spec("/run", versions=VERSIONS, config={"train": {"microbatch_size": 1}, **config})
    found = binding_steps(rows, events, 4, spec, exclusions or Exclusions())
    return {step: row["attempt"] for step, row in found.items()}


def test_the_newest_row_of_each_later_step_binds() -> None:
    rows = [row(1, step) for step in (3, 4, 5, 6, 7)] + [row(2, step) for step in (5, 6)]
    assert bound(rows, life("a", 1, 2)) == {5: 2, 6: 2, 7: 1}


def test_steps_without_numbers_do_not_bind() -> None:
    skipped = {"attempt": 1, "step": 6, "time_s": 0.0, "skipped": 1.0}
    assert bound([row(1, 5, loss=None), skipped, row(1, 7, grad_norm=None), row(1, 8)], life("a", 1)) == {8: 1}


def test_other_versions_other_drivers_of_unknown_kind_and_fast_reduction_bind_nothing() -> None:
    rows = [row(1, 5), row(2, 6), row(3, 7)]
    events = life("a", 1) + life("b", 2, torch="2.14") + [event("attempt", session="c", attempt=3)]
    assert bound(rows, events) == {5: 1}
    assert bound(rows, events, parallel={"reduction": "fast"}) == {}


@pytest.mark.parametrize(
    ("exclusions", "expected"),
    [(Exclusions(steps=((7, 8),)), {5: 1, 6: 1, 9: 2}), (Exclusions(), {5: 1, 6: 1})],
    ids=["known to the checkpoint", "not known"],
)
def test_rows_from_before_a_rollback_do_not_bind(exclusions: Exclusions, expected: dict[int, int]) -> None:
    rows = [row(1, step) for step in (5, 6, 7, 8)] + [row(2, 9)]
    events = [*life("a", 1, 2), event("diverged", attempt=1, skip=[7, 8])]
    assert bound(rows, events, exclusions) == expected


@pytest.mark.parametrize(("known", "expected"), [(True, {5: 1, 7: 2}), (False, {5: 1})])
def test_rows_from_before_samples_were_left_out_do_not_bind(known: bool, expected: dict[int, int]) -> None:
    rows = [row(1, 5), row(1, 6), row(2, 7)]
    events = [*life("a", 1, 2), event("left_out", attempt=1, step=6, samples=[30, 31])]
    exclusions = Exclusions(samples=((6, 30), (6, 31))) if known else Exclusions()
    assert bound(rows, events, exclusions) == expected


def test_reading_it(tmp_path: Path) -> None:
    store, reported = Store.open(str(tmp_path)), []
    events = [
        event("started", 0.0, versions=VERSIONS, num_steps=9),
        event("attempt", 1.0, attempt=1, world_size=2),
        event("training", 2.0, attempt=1, step=0),
        event("step", 3.0, attempt=1, step=1),
        event("down", 4.0, attempt=1, kind="killed"),
        event("attempt", 5.0, attempt=2, world_size=2),
        event("training", 6.0, attempt=2, step=0),
        event("step", 7.0, attempt=2, step=1),
        event("attempt", 8.0, attempt=3, world_size=2),
    ]
    rows = [event_row(entry, "session", "abcdef01", seq) for seq, entry in enumerate(events)]
    store.write(f"{EVENTS}/{RowsRef(2, 1, 'abcdef01', 0)}", [encode(rows)])
    steps = [
        step_row(event("step", step=1, attempt=attempt, metrics={"loss": 0.1, "grad_norm": 1.0}))
        for attempt in (1, 2, 3)
    ]
    store.write(f"{METRICS}/{RowsRef(2, 2, 'abcdef01', 0)}", [encode(steps)])
    reader = PastReader(make_spec(store.url, versions=VERSIONS), lambda kind, **fields: reported.append((kind, fields)))
    reader._read(3, 0, Exclusions())
    past = reader.past
    assert past is not None and reported == []
    assert past.steps[1]["attempt"] == 2 and past.steps[1]["loss"] == 0.1, "not the row of the attempt that begins"
    assert (past.failures, past.trained_s) == (1, 7.0)


def test_a_row_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    store, reported = Store.open(str(tmp_path)), []
    started = event_row(event("started", versions=VERSIONS), "session", "abcdef01", 1)
    store.write(f"{EVENTS}/{RowsRef(1, 1, 'abcdef01', 0)}", [encode([started])])
    store.write(f"{METRICS}/{RowsRef(1, 2, 'abcdef01', 0)}", [encode([row(1, 5) | {"step": "5"}])])
    reader = PastReader(make_spec(store.url), lambda kind, **fields: reported.append((kind, fields["error"])))
    reader._read(2, 0, Exclusions())
    ((kind, error),) = reported
    assert kind == "past_unread" and error.startswith("TypeError") and reader.past is None


def test_a_first_attempt_has_no_past(tmp_path: Path) -> None:
    reader = PastReader(make_spec(str(tmp_path)), lambda kind, **fields: None)
    reader.begin(1, 0, Exclusions())
    reader.begin(2, 0, Exclusions())
    assert reader.past is None
