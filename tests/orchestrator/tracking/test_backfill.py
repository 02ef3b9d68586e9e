"""A driver on another machine: its journal begins with what the record in storage has."""

from __future__ import annotations

import math
import uuid
from dataclasses import replace

import pytest

from orchestrator.checkpoint.keys import METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import StorageError
from orchestrator.tracking.backfill import fill_journal
from orchestrator.tracking.journal import NAME, Journal, follow
from orchestrator.tracking.merging import SEALED
from orchestrator.tracking.record import encode
from orchestrator.tracking.recorder import Recorder
from tests.orchestrator.tracking.made_up import attempt, event, opened


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def record(store: Store, session: str, *events) -> None:
    """A life of a driver, with a second between any two events."""
    first_s = 1e9 + 1e6 * len(session)
    events = [replace(one, time_s=first_s + second) for second, one in enumerate(events)]
    recorder = Recorder("memory://x", session, report=print, open_store=lambda _: store)
    for one in events:
        recorder.take(one)
    recorder.close()


def journal(folder) -> list:
    path = folder / NAME
    return [event for event, _ in follow(path, lambda: path.stat().st_size)]


def test_the_past_is_taken_from_the_record_with_every_step_once(store, tmp_path) -> None:
    record(store, "first", *attempt(1, 0, 10, save=8))
    record(store, "second", event("down", rank=0, kind="killed", message=""), *attempt(2, 8, 14))
    introduction = opened(tmp_path, mode="offline")
    assert fill_journal(tmp_path, introduction, store, "third") == 10 + 6 + 2 * 2 + 2
    found = journal(tmp_path)
    assert found[0] == introduction
    steps = [one for one in found if one.kind == "step"]
    assert [one.fields["step"] for one in steps] == list(range(1, 15))
    assert [one.fields["metrics"]["loss"] for one in steps] == [1 / step for step in range(1, 15)]
    assert [one.fields["attempt"] for one in steps] == [1] * 10 + [2] * 4
    kinds = [one.kind for one in found if one.kind != "step"]
    assert kinds == ["opened", "attempt", "training", "saved", "down", "attempt", "training"]


def test_nothing_is_taken_where_there_is_a_journal_or_no_past(store, tmp_path) -> None:
    introduction = opened(tmp_path, mode="offline")
    assert fill_journal(tmp_path, introduction, store, "first") == 0 and not (tmp_path / NAME).exists()
    record(store, "first", *attempt(1, 0, 3))
    assert fill_journal(tmp_path, introduction, store, "first") > 0  # rows of steps do not say whose they are
    before = (tmp_path / NAME).read_bytes()
    record(store, "second", *attempt(2, 3, 6))
    assert fill_journal(tmp_path, introduction, store, "third") == 0
    assert (tmp_path / NAME).read_bytes() == before


def test_a_record_that_cannot_be_read_leaves_no_journal(store, tmp_path, monkeypatch) -> None:
    record(store, "first", *attempt(1, 0, 3))

    def away(folder: str) -> None:
        raise StorageError("unreachable")

    monkeypatch.setattr(store, "list", away)
    with pytest.raises(StorageError):
        fill_journal(tmp_path, opened(tmp_path, mode="offline"), store, "second")
    assert list(tmp_path.iterdir()) == []


def test_a_validation_that_was_not_finite_is_a_number_again(store, tmp_path) -> None:
    validated = event("validation", step=2, metrics={"loss": math.nan, "kid/x": 1.5})
    record(store, "first", *attempt(1, 0, 2), validated)
    fill_journal(tmp_path, opened(tmp_path, mode="offline"), store, "second")
    (found,) = [one.fields["metrics"] for one in journal(tmp_path) if one.kind == "validation"]
    assert math.isnan(found["loss"]) and found["kid/x"] == 1.5


def seal(store: Store, attempt: int, first: int, num: int) -> None:
    rows = [{"step": step, "attempt": attempt, "time_s": 1e9 + step, "loss": 1.0} for step in range(first, first + num)]
    store.write(f"{METRICS}/{RowsRef(attempt, first, 'c' * 8, SEALED)}", [encode(rows)])


def test_the_record_of_a_long_run_is_written_while_it_is_read(store, tmp_path, monkeypatch) -> None:
    for first in range(1, 1001, 50):
        seal(store, 1, first, 50)
    log, read, append = [], Store.read, Journal.append
    monkeypatch.setattr(Store, "read", lambda self, key, *rest: (log.append("read"), read(self, key, *rest))[1])
    monkeypatch.setattr(Journal, "append", lambda self, line: (log.append("wrote"), append(self, line))[1])
    assert fill_journal(tmp_path, opened(tmp_path, mode="offline"), store, "second") == 1000
    assert [one.fields["step"] for one in journal(tmp_path)[1:]] == list(range(1, 1001))
    reads_after = [log[index:].count("read") for index in (log.index("wrote"), len(log) // 2)]
    assert reads_after[0] >= 10 and reads_after[1] >= 2, "it is not held as a whole"


def test_a_record_that_is_away_in_the_middle_leaves_no_half_of_a_past(store, tmp_path, monkeypatch) -> None:
    for first in range(1, 1001, 50):
        seal(store, 1, first, 50)
    reads, read = [], Store.read

    def away_later(self, key, *rest):
        reads.append(key)
        if len(reads) > 32:  # all twenty have been looked at, and some of them are written already
            raise StorageError("unreachable")
        return read(self, key, *rest)

    monkeypatch.setattr(Store, "read", away_later)
    with pytest.raises(StorageError):
        fill_journal(tmp_path, opened(tmp_path, mode="offline"), store, "second")
    assert list(tmp_path.iterdir()) == []
