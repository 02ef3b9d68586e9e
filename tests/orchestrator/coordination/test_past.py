"""What the record says of earlier attempts, and which of its rows bind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.keys import EVENTS, METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.past import Past, PastReader, _outline, binding_steps
from orchestrator.messages.attempts import Event
from orchestrator.sections import CheckpointConfig
from orchestrator.tracking.record import encode, event_row, step_row
from tests.orchestrator.group import make_spec
from trainers.exclusions import Exclusions

VERSIONS = {"torch": "2.13"}
NUMBERS = {"loss": 0.1, "grad_norm": 1.0}


def event(kind: str, time_s: float = 0.0, /, **fields: Any) -> Event:
    return Event(kind=kind, fields=fields, time_s=time_s)


def row(attempt: int, step: int, **metrics: Any) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "time_s": 0.0, "loss": attempt + step / 8, "grad_norm": 1.0} | metrics


def bound(rows: list[dict[str, Any]], *events: Event, exclusions: Exclusions | None = None) -> dict[int, int]:
    found = binding_steps(rows, {1, 2}, events, exclusions or Exclusions())
    return {step: row["attempt"] for step, row in found.items()}


def test_the_newest_row_of_each_step_binds_of_attempts_that_are_alike() -> None:
    rows = [row(1, step) for step in (5, 6, 7)] + [row(2, step) for step in (5, 6)] + [row(3, 6)]
    assert bound(rows) == {5: 2, 6: 2, 7: 1}


def test_steps_without_numbers_do_not_bind() -> None:
    skipped = {"attempt": 1, "step": 6, "time_s": 0.0, "skipped": 1.0}
    assert bound([row(1, 5, loss=None), skipped, row(1, 7, grad_norm=None), row(1, 8)]) == {8: 1}


@pytest.mark.parametrize(
    ("exclusions", "expected"),
    [(Exclusions(steps=((7, 8),)), {5: 1, 6: 1, 9: 2}), (Exclusions(), {5: 1, 6: 1})],
    ids=["known to the checkpoint", "not known"],
)
def test_rows_from_before_a_rollback_do_not_bind(exclusions: Exclusions, expected: dict[int, int]) -> None:
    rows = [row(1, step) for step in (5, 6, 7, 8)] + [row(2, 9)]
    assert bound(rows, event("diverged", attempt=1, skip=[7, 8]), exclusions=exclusions) == expected


@pytest.mark.parametrize(("known", "expected"), [(True, {5: 1, 7: 2}), (False, {5: 1})])
def test_rows_from_before_samples_were_left_out_do_not_bind(known: bool, expected: dict[int, int]) -> None:
    rows = [row(1, 5), row(1, 6), row(2, 7)]
    left_out = event("left_out", attempt=1, step=6, samples=[30, 31])
    exclusions = Exclusions(samples=((6, 30), (6, 31))) if known else Exclusions()
    assert bound(rows, left_out, exclusions=exclusions) == expected


def test_rows_of_a_state_that_may_have_been_corrupted_do_not_bind() -> None:
    rows = [row(1, step) for step in (5, 6, 7)] + [row(2, 7)]
    assert bound(rows, event("corrupted", attempt=1, since=6)) == {5: 1, 7: 2}


class Record:
    """What earlier attempts have left in storage: each event in an object of its own, as the merges leave it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.open(str(folder))
        self.read: list[str] = []
        self._number = 0

    def claim(self, **versions: str) -> None:
        claim_attempt(self.store, {"versions": versions or VERSIONS})

    def events(self, attempt: int, *events: Event) -> None:
        for entry in events:
            self._number += 1
            rows = [event_row(entry, "session", "abcdef01", self._number)]
            self.store.write(f"{EVENTS}/{RowsRef(attempt, self._number, 'abcdef01', 0)}", [encode(rows)])

    def steps(self, attempt: int, *steps: int) -> None:
        rows = [step_row(event("step", step=step, attempt=attempt, metrics=NUMBERS)) for step in steps]
        self.store.write(f"{METRICS}/{RowsRef(attempt, 1, 'abcdef01', 0)}", [encode(rows)])

    def past(self, monkeypatch: pytest.MonkeyPatch, attempt: int, step: int, **spec: Any) -> Past:
        """What a group finds that begins with this attempt, after this step."""
        told: list[str] = []
        reader = PastReader(make_spec(self.store.url, versions=VERSIONS, **spec), lambda kind, **_: told.append(kind))
        with monkeypatch.context() as patch:
            real = Store.read
            patch.setattr(Store, "read", lambda store, key, *span: self.read.append(key) or real(store, key, *span))
            reader._read(attempt, step, Exclusions())
        assert reader.past is not None and told == []
        return reader.past


def test_of_a_long_record_only_what_can_matter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path)
    for attempt in (1, 2, 3):
        record.claim()
        record.events(attempt, event("attempt", attempt=attempt, world_size=2), event("saved", attempt=attempt, step=9))
        record.steps(attempt, 3 * attempt - 1, 3 * attempt)
    record.events(3, event("diverged", attempt=3, skip=[9, 9]))
    record.claim()
    assert set(record.past(monkeypatch, 4, 6).steps) == {8}, "9 was undone"
    folders = [key.split("/")[0:2] for key in record.read]
    assert [name for folder, name in folders if folder == "attempts"] == ["0003.json"]
    assert {name[:4] for folder, name in folders if folder == EVENTS} == {"0003"}
    record.read.clear()
    assert record.past(monkeypatch, 4, 9).steps == {}
    assert [key for key in record.read if not key.startswith(METRICS)] == [], "nothing is to be made again"


def test_rows_of_other_versions_and_of_the_attempt_that_begins_do_not_bind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path)
    for attempt, torch in ((1, "2.13"), (2, "2.14"), (3, "2.13")):
        record.claim(torch=torch)
        record.steps(attempt, 4, 4 + attempt)
    claim_attempt(record.store, {"host": "of an unbroken that did not say its versions"})
    record.steps(4, 9)
    assert {step: row["attempt"] for step, row in record.past(monkeypatch, 5, 4).steps.items()} == {5: 1, 7: 3}
    assert set(record.past(monkeypatch, 3, 4).steps) == {5}
    fast = {"train": {"microbatch_size": 1}, "parallel": {"reduction": "fast"}}
    assert record.past(monkeypatch, 5, 4, config=fast).steps == {}, "whose numbers depend on the workers"


def test_time_and_failures_of_the_past_are_those_that_status_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path)
    lives = [
        event("started", 0.0, versions=VERSIONS, num_steps=9),
        event("attempt", 1.0, attempt=1, world_size=2),
        event("training", 2.0, attempt=1, step=0),
        *(event("step", 2.0 + step, attempt=1, step=step) for step in range(1, 6)),
        event("down", 8.0, attempt=1, kind="killed"),
        event("attempt", 9.0, attempt=2, world_size=2),
        event("training", 10.0, attempt=2, step=0),
        event("step", 11.0, attempt=2, step=1),
        event("attempt", 12.0, attempt=3, world_size=2),
    ]
    rows = [event_row(entry, "session", "abcdef01", seq) for seq, entry in enumerate(lives)]
    record.store.write(f"{EVENTS}/{RowsRef(2, 1, 'abcdef01', 0)}", [encode(rows)])
    past = record.past(monkeypatch, 3, 0, checkpoint=CheckpointConfig(every_steps="auto"))
    assert (past.failures, past.trained_s) == (1, 11.0)
    assert [row["seq"] for row in _outline(rows)] == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]


def test_a_row_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    store, reported = Store.open(str(tmp_path)), []
    senseless = event_row(event("down", 8.0, attempt="1", kind="killed"), "session", "abcdef01", 0)
    store.write(f"{EVENTS}/{RowsRef(1, 2, 'abcdef01', 0)}", [encode([senseless])])
    spec = replace(make_spec(store.url), checkpoint=CheckpointConfig(every_steps="auto"))
    reader = PastReader(spec, lambda kind, **fields: reported.append((kind, fields["error"])))
    reader._read(2, 0, Exclusions())
    ((kind, error),) = reported
    assert kind == "past_unread" and error.startswith("TypeError") and reader.past is None


def test_a_first_attempt_has_no_past(tmp_path: Path) -> None:
    reader = PastReader(make_spec(str(tmp_path)), lambda kind, **fields: None)
    reader.begin(1, 0, Exclusions())
    reader.begin(2, 0, Exclusions())
    assert reader.past is None
