"""Rows: what a chart gets of each step."""

from __future__ import annotations

import pytest

from orchestrator.messages.attempts import Event
from orchestrator.tracking.goodput import Book, Span
from orchestrator.tracking.rows import Rows


def at(time_s: float, kind: str, /, **fields: object) -> Event:
    return Event(kind=kind, fields=fields, time_s=time_s)


def test_rate_and_restart_markers() -> None:
    story = [
        at(0, "attempt", attempt=1, world_size=2),
        at(10, "training", attempt=1, step=0),
        at(12, "step", attempt=1, step=1, metrics={"loss": 0.5}),
        at(13, "step", attempt=1, step=2, metrics={"loss": 0.4}),
        at(20, "down", rank=0),
        at(21, "failure", rank=0),
        at(22, "attempt", attempt=2, world_size=1),
        at(25, "training", attempt=2, step=1),
        at(40, "step", attempt=2, step=3, metrics={"loss": 0.3}),  # step 2 was repeated in between
        at(44, "step", attempt=2, step=4, metrics={"loss": 0.2}),
    ]
    rows = Rows(global_batch_size=8)
    found = [row for row in map(rows.take, story) if row]
    assert [row.step for row in found] == [1, 2, 3, 4]
    goodput = [row.values.pop("run/goodput", None) for row in found]
    # Up to 10 s nothing was trained; from 13 s, the end of step 2, to 25 s it was down, and step 2 was lost.
    assert goodput == [0.0, 0.0, 2 / 25, 2 / 25]
    assert found[0].values == {"train/loss": 0.5, "run/attempt": 1, "run/world_size": 2, "run/samples_per_s": 4.0}
    assert found[2].values == {
        "train/loss": 0.3,
        "run/attempt": 2,
        "run/world_size": 1,
        "restart/attempt": 2,
        "restart/from_step": 1,
        "restart/replayed_steps": 1,
        "restart/world_size": 1,
        "restart/down_s": 5.0,
    }
    assert found[3].values == {"train/loss": 0.2, "run/attempt": 2, "run/world_size": 1, "run/samples_per_s": 2.0}


def test_an_evaluation_between_two_steps_makes_neither_slower() -> None:
    rows = Rows(global_batch_size=8)
    story = [
        at(0, "attempt", attempt=1, world_size=2),
        at(10, "training", attempt=1, step=0),
        at(12, "step", attempt=1, step=1, metrics={}),
        at(40, "evaluated", attempt=1, step=1, seconds=28.0),
        at(42, "step", attempt=1, step=2, metrics={}),
    ]
    assert [row.values["run/samples_per_s"] for row in map(rows.take, story) if row] == [4.0, 4.0]


def saves(attempt: int, begin: int, num: int, first_s: float) -> list[Event]:
    """An attempt whose steps take a second each and are all saved, with a pause of a quarter of it."""
    story = [
        at(first_s - 2, "attempt", attempt=attempt, world_size=1),
        at(first_s, "training", attempt=attempt, step=begin),
    ]
    for index in range(1, num + 1):
        where = {"attempt": attempt, "step": begin + index}
        story += [at(first_s + index - 0.25, "step", **where, metrics={})]
        story += [at(first_s + index, "snapshot", **where, stall_s=0.25), at(first_s + index, "saved", **where)]
    return story


STORY = [*saves(1, 0, 300, 10.0), at(310.5, "down", rank=0), *saves(2, 200, 300, 320.0)]


def test_goodput_over_hundreds_of_saves_and_a_rollback_is_that_of_the_account() -> None:
    rows, book, shares = Rows(1), Book(), list[tuple[float | None, float | None]]()
    for event in STORY:
        book.enter(event)
        row = rows.take(event)
        if event.kind == "saved":
            shares.append((rows._goodput.share, book.close(None).share))
        assert row is None or row.step
    assert len(shares) == 600 and all(ours == theirs for ours, theirs in shares)


def test_goodput_of_a_long_run_is_told_without_a_look_at_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def seconds(span: Span) -> float:
        nonlocal looks
        looks += 1
        return span.end_s - span.begin_s

    monkeypatch.setattr(Span, "seconds", property(seconds))
    rows = Rows(1)
    for event in STORY:
        rows.take(event)
    assert looks < 40 * len(STORY), "of each event a few, and all of them once after the restart"
