"""Reading the run's own record: damaged, doubled, interleaved, out of order."""

from __future__ import annotations

import json
import math
import random

import pandas
import pytest

from orchestrator.checkpoint.keys import EVENTS, METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import MissingObjectError
from orchestrator.messages.attempts import Event
from orchestrator.tracking.goodput import account
from orchestrator.tracking.overview import Present
from orchestrator.tracking.record import (
    RowsReader,
    decode,
    encode,
    event_row,
    in_order,
    of_the_owner,
    read_events,
    step_row,
)
from orchestrator.tracking.streaming import read_metrics
from orchestrator.tracking.telling import told
from tests.orchestrator.tracking.story import (
    T0,
    attempt,
    event,
    new_store,
    one_kill,
    record,
    started,
    step,
    steps,
    training,
)


def test_a_step_that_was_replayed_counts_once_and_says_which_attempt_it_is_from():
    store = new_store()
    record(store, one_kill())
    rows = list(read_metrics(store))
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["attempt"] for row in rows] == [1] * 10 + [2] * 20
    assert rows[20] == {"step": 21, "attempt": 2, "time_s": T0 + 41, "loss": 1.0 / 21, "grad_norm": 0.5}


def test_events_come_back_as_they_were_with_their_session():
    store = new_store()
    record(store, one_kill())
    events = read_events(store)
    assert [(one.kind, one.time_s) for one in events] == [(one.kind, one.time_s) for one in one_kill()]
    assert account(events).seconds == account(one_kill()).seconds
    failed = event(1, "failure", attempt=1, rank=0, kind="error", details="a\n\u2028\x85trace", step=3)
    record(store, [failed], "f" * 8)
    (read,) = [one for one in read_events(store) if one.kind == "failure"]
    assert read.fields == {**failed.fields, "session": "a", "writer": "f" * 8}


def test_pandas_reads_every_object(tmp_path):
    store = Store.open(str(tmp_path))
    record(store, one_kill())
    (path,) = (tmp_path / METRICS).iterdir()
    frame = pandas.read_json(path, lines=True)
    assert list(frame.columns) == ["step", "attempt", "time_s", "loss", "grad_norm"] and len(frame) == 40
    (path,) = (tmp_path / EVENTS).iterdir()
    assert set(pandas.read_json(path, lines=True)["event"]) >= {"attempt", "snapshot", "outcome"}


def test_a_number_that_is_none_is_null_and_not_a_token_that_json_lacks():
    odd = Event(kind="step", fields={"attempt": 1, "step": 1, "metrics": {"a": math.nan, "b": -math.inf}}, time_s=T0)
    assert b"NaN" not in encode([step_row(odd)]) and json.loads(encode([step_row(odd)]))["a"] is None
    row = event_row(Event(kind="validation", fields=odd.fields, time_s=T0), "s", "w", 1)
    assert b"NaN" not in encode([row]) and row["metrics"] == {"a": None, "b": None}


def test_what_json_does_not_know_is_text():
    row = json.loads(
        encode(
            [
                event_row(
                    event(
                        1,
                        "odd",
                        what={
                            1,
                        },
                        time_s="no",
                    ),
                    "s",
                    "w",
                    1,
                )
            ]
        )
    )
    assert row["what"] == "{1}" and row["time_s"] == T0 + 1


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_half_written_object_costs_its_torn_line_and_is_named(cut: int):
    store = new_store()
    record(store, steps(0, 1, range(1, 6)))
    (name,) = store.list(METRICS)
    data = store.read(f"{METRICS}/{name}")
    store.write(f"{METRICS}/{name}", [data[:-cut]])
    reader = RowsReader(store, METRICS)
    whole = data[:-cut].count(b"\n") + (cut == 1)  # all but the last newline is a whole line
    assert len(reader.rows()) == whole
    if cut > 1:
        assert reader.damaged == [f"{store.url}/{METRICS}/{name}: 1 lines are damaged"]


@pytest.mark.parametrize("garbage", [b"\x00\xff\n", b"[1]\n", b"{}\n", b"\n", b'{"step": 3}\n', b"1,2\n"])
def test_lines_that_are_no_rows_are_counted_and_skipped(garbage: bytes):
    store = new_store()
    record(store, [step(1, 1, 1)])
    store.write(f"{METRICS}/{RowsRef(1, 2, 'b' * 8, 0)}", [garbage, encode([step_row(step(2, 1, 2))])])
    store.write(f"{METRICS}/notes.txt", [b"of somebody"])
    reader = RowsReader(store, METRICS)
    assert sorted(row["step"] for row in reader.rows()) == [1, 2] and len(reader.damaged) == 1
    assert [row["step"] for row in read_metrics(store)] == [1, 2]


@pytest.mark.parametrize(
    ("folder", "garbage"),
    [
        (METRICS, {"step": "7", "attempt": 1, "time_s": 1.0}),
        (METRICS, {"step": 7, "attempt": None, "time_s": 1.0}),
        (EVENTS, {"time_s": None, "event": "down", "writer": "w", "seq": 1}),
        (EVENTS, {"time_s": 1.0, "event": "down", "writer": ["w"], "seq": 1}),
        (EVENTS, {"time_s": 1.0, "event": ["down"], "writer": "w", "seq": 1}),
        (EVENTS, {"time_s": 1.0, "event": "attempt", "writer": "w", "seq": 1, "attempt": "2", "world_size": 1}),
        (EVENTS, {"time_s": 1.0, "event": "validation", "writer": "w", "seq": 1, "step": 1, "metrics": None}),
    ],
)
def test_lines_with_values_of_other_types_are_counted_and_skipped(folder: str, garbage: dict[str, object]):
    store = new_store()
    record(store, [step(1, 1, 1)])
    store.write(f"{folder}/{RowsRef(1, 2, 'b' * 8, 0)}", [encode([garbage])])
    reader = RowsReader(store, folder)
    assert len(reader.rows()) == 1 and len(reader.damaged) == 1
    assert [row["step"] for row in read_metrics(store)] == [1]
    assert [event.kind for event in of_the_owner(read_events(store))] == ["step"]


def test_a_clock_that_goes_backwards_does_not_change_the_order():
    store = new_store()
    record(store, [event(100, "placing"), event(40, "placed"), event(60, "down"), event(130, "pruned")])
    record(store, [event(50, "tracking"), event(120, "interrupted")], "1" * 8)
    events = read_events(store)
    assert [one.kind for one in events] == ["tracking", "placing", "placed", "down", "interrupted", "pruned"]
    assert [one.time_s - T0 for one in events] == [50, 100, 100, 100, 120, 130]


def test_a_driver_whose_clock_is_behind_that_of_the_one_before_is_the_newer_one():
    """Two hours, on the next machine, which has no time server yet."""
    store = new_store()
    record(store, [*one_kill()[:-1], event(52, "interrupted", session="a", kept="step 30 is saved")])
    again = [started(-7200, "b"), attempt(-7197, 3, "b"), training(-7195, 3, 30, "b")]
    record(store, [*again, *steps(-7195, 3, range(31, 41), session="b")], "1" * 8)
    events = read_events(store)
    present = Present(events, T0 - 7180)
    assert (str(present.state), present.step, present.last_s) == ("training", 40, T0 - 7185)
    book = account(events)
    assert book.attempts == 3 and book.wall_s == pytest.approx(52 + 15, abs=0.1)


def test_two_writers_interleaved_and_rows_that_are_twice_there():
    store = new_store()
    record(store, [step(1, 3, 1), step(2, 3, 2), step(3, 3, 3)], "a" * 8)
    record(store, [step(2.5, 4, 2), step(3.5, 4, 3)], "b" * 8)
    record(store, [step(1, 3, 1), step(2, 3, 2), step(3, 3, 3)], "a" * 8, number=2)
    assert [(row["step"], row["attempt"]) for row in read_metrics(store)] == [(1, 3), (2, 4), (3, 4)]
    assert len(read_events(store)) == 5


def test_an_object_that_is_merged_while_it_is_read_is_found_in_its_new_place(monkeypatch):
    store = new_store()
    record(store, [step(1, 1, 1)], number=1)
    read = Store.read

    def merged_first(self: Store, key: str, *rest: int) -> bytes:
        monkeypatch.setattr(Store, "read", read)
        record(store, [step(1, 1, 1)], number=2)
        store.delete(key)
        raise MissingObjectError(key)

    monkeypatch.setattr(Store, "read", merged_first)
    assert [row["step"] for row in RowsReader(store, METRICS).rows()] == [1]


def test_looking_again_reads_only_what_is_new(monkeypatch):
    store = new_store()
    record(store, [step(1, 1, 1)], number=1)
    reader = RowsReader(store, METRICS)
    reader.rows()
    record(store, [step(2, 1, 2)], number=2)
    reads, read = [], Store.read
    monkeypatch.setattr(Store, "read", lambda self, key, *rest: (reads.append(key), read(self, key, *rest))[1])
    assert len(reader.rows()) == 2 and len(reads) == 1


def test_the_newest_rows_are_enough():
    store = new_store()
    for number in range(1, 41):
        record(store, [step(number, 1, number)], number=number)
    reader = RowsReader(store, METRICS)
    newest = sorted(row["step"] for row in reader.rows(enough=5))
    assert newest[-5:] == [36, 37, 38, 39, 40] and len(newest) < 20 and not reader.complete
    assert len(reader.rows()) == 40 and reader.complete


def test_nothing_recorded():
    store = new_store()
    assert list(read_metrics(store)) == [] and list(read_events(store)) == []


def test_order_of_reading_does_not_matter():
    store, events = new_store(), one_kill()
    parts = [events[begin : begin + 7] for begin in range(0, len(events), 7)]
    rows = [event_row(one, "a", "0" * 8, seq) for seq, one in enumerate(events)]
    order = list(range(len(parts)))
    random.Random(1).shuffle(order)
    for number, index in enumerate(order, 1):
        store.write(f"{EVENTS}/{RowsRef(1, number, '0' * 8, 0)}", [encode(rows[index * 7 : index * 7 + 7])])
    assert [one.kind for one in read_events(store)] == [one.kind for one in events]


def test_a_wrong_bit_in_a_key_costs_that_row_and_stops_no_reader():
    events = [
        *one_kill(),
        event(60, "validation", session="a", attempt=2, step=30, metrics={"validation/loss": 0.5}),
        event(61, "evaluated", session="a", attempt=2, step=30, seconds=1.0),
        event(62, "cadence", session="a", every_steps=37, arithmetic="9 s"),
        event(63, "saved", session="a", attempt=2, step=30, bytes=7),
        event(64, "diverged", session="a", attempt=2, reason="spike", skip=[3, 4], rollback=1),
        event(65, "left_out", session="a", attempt=2, step=30, samples=[1], reason="broken"),
    ]
    rows = [event_row(one, "a", "0" * 8, seq) for seq, one in enumerate(events)]
    firsts = {row["event"]: number for number, row in reversed(list(enumerate(rows)))}
    num_lost = 0
    for number in firsts.values():
        for key in rows[number]:
            bent = {chr(ord(name[0]) ^ 0x20) + name[1:] if name == key else name: v for name, v in rows[number].items()}
            found, bad = decode(encode([*rows[:number], bent, *rows[number + 1 :]]), EVENTS)
            assert len(found) + bad == len(rows)
            read = in_order(found)
            assert Present(read, T0 + 70).last_s is not None and account(read).attempts >= 1
            assert list(told(read, 100, 8))
            num_lost += bad
    assert num_lost > 4 * len(firsts)  # time, kind, writer and number of a row, and what its kind has
