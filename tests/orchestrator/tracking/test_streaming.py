"""The rows of a run in order, however its objects overlap, and how many of them are held for it."""

from __future__ import annotations

import random
import weakref
from itertools import pairwise
from operator import itemgetter
from typing import Any

import pytest

from orchestrator.checkpoint.keys import METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import MissingObjectError
from orchestrator.tracking.losses import Losses
from orchestrator.tracking.merging import SEALED
from orchestrator.tracking.record import RowsReader, encode, one_row_a_step
from orchestrator.tracking.streaming import OrderedRows, items_by_step, read_metrics
from tests.orchestrator.tracking.story import new_store


def row(step: int, attempt: int = 1, time_s: float = 0.0, **metrics: Any) -> dict[str, Any]:
    return {"step": step, "attempt": attempt, "time_s": time_s, **metrics}


def put(store: Store, number: int, rows: list[dict[str, Any]], level: int = 0) -> str:
    key = f"{METRICS}/{RowsRef(max((one['attempt'] for one in rows), default=1), number, 'a' * 8, level)}"
    store.write(key, [encode(rows)])
    return key


def sealed_run(num_objects: int, rows_each: int = 50) -> Store:
    """One object after the other, each overlapping a little with the next."""
    store = new_store()
    for number in range(num_objects):
        first = number * rows_each
        rows = [row(step, number + 1, loss=float(step)) for step in range(first + 1, first + rows_each + 10)]
        put(store, number + 1, rows, SEALED)
    return store


@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_the_whole_record_held_at_once_gives(seed: int):
    chance, store = random.Random(seed), new_store()
    rows, step = [], 0
    for attempt in range(1, 12):
        reached = step + chance.randrange(60)
        rows += [row(done, attempt, time_s=chance.random(), loss=chance.random()) for done in range(step + 1, reached)]
        step = max(0, reached - chance.randrange(30))
    rows += chance.sample(rows, 20)  # twice there
    if seed % 2:
        chance.shuffle(rows)
    for number, begin in enumerate(range(0, len(rows), 25), 1):
        put(store, number, rows[begin : begin + 25], chance.choice([0, 1, SEALED]))
    put(store, 99, [], 2)
    expected = one_row_a_step(RowsReader(store, METRICS).rows())
    assert list(read_metrics(store)) == expected and len(expected) > 50
    by_time = OrderedRows(store, METRICS, lambda row: (row["time_s"], row["step"]))
    assert list(by_time) == sorted((row["time_s"], row["step"]) for row in rows)
    assert list(by_time) == list(by_time), "as often as wanted"


class Held:
    """Counts how many of its kind there are, and how many there were at most."""

    now, most = 0, 0

    def __init__(self) -> None:
        Held.now += 1
        Held.most = max(Held.most, Held.now)
        weakref.finalize(self, Held.gone)

    @staticmethod
    def gone() -> None:
        Held.now -= 1


@pytest.mark.parametrize("num_objects", [8, 64])
def test_of_a_run_of_any_length_a_few_objects_are_held(num_objects: int):
    store = sealed_run(num_objects)
    Held.now = Held.most = 0
    rows, items = items_by_step(store, lambda _: (Held(),))
    assert sum(1 for _ in items) == num_objects * 50 + 9 and rows.damaged == []
    assert 50 < Held.most <= 4 * 60, Held.most


def test_small_objects_are_read_once_and_large_ones_twice(monkeypatch: pytest.MonkeyPatch):
    store = sealed_run(2)
    large = [f"{METRICS}/{name}" for name in store.list(METRICS)]
    small = [put(store, number, [row(1000 + number, 9)], number % 3) for number in range(10, 20)]
    reads, read = [], Store.read
    monkeypatch.setattr(Store, "read", lambda self, key, *rest: (reads.append(key), read(self, key, *rest))[1])
    assert len(list(read_metrics(store))) == 119
    assert sorted(reads) == sorted([*large, *large, *small])


def test_what_is_merged_away_while_it_is_read(monkeypatch: pytest.MonkeyPatch):
    store = sealed_run(1)
    old = put(store, 2, [row(100, 2)])
    rows, items = items_by_step(store)
    put(store, 4, [row(100, 2)], 1)
    store.delete(old)
    assert [step for step, _ in items][-1] == 100, "between its two readings"
    assert rows.damaged == []
    read = Store.read

    def merged_first(self: Store, key: str, *rest: int) -> bytes:
        monkeypatch.setattr(Store, "read", read)
        put(store, 5, [row(100, 2), row(101, 2)], SEALED)
        for name in store.list(METRICS):
            if name.endswith("-1.jsonl"):
                store.delete(f"{METRICS}/{name}")
        raise MissingObjectError(key)

    monkeypatch.setattr(Store, "read", merged_first)
    assert [row["step"] for row in read_metrics(store)][-2:] == [100, 101], "in the first"


def test_damaged_lines_are_named_and_cost_no_other():
    store = sealed_run(1)
    store.write(f"{METRICS}/{RowsRef(1, 9, 'b' * 8, 0)}", [b"garbage\n", encode([row(70)])])
    rows, items = items_by_step(store)
    assert len(list(items)) == 60
    assert rows.damaged == [f"{store.url}/{METRICS}/0001-00000009-bbbbbbbb-0.jsonl: 1 lines are damaged"]


def exact(losses: list[tuple[int, float]], most: int) -> list[tuple[int, float, float, float]]:
    size = max(1, -(-len(losses) // most))
    parts = [losses[begin : begin + size] for begin in range(0, len(losses), size)]
    values = [[loss for _, loss in part] for part in parts]
    return [
        (part[-1][0], sum(some) / len(some), min(some), max(some)) for part, some in zip(parts, values, strict=True)
    ]


@pytest.mark.parametrize("num", [1, 7, 500, 501, 20_000])
def test_the_curve_of_a_short_run_has_every_step(num: int):
    losses = [(step, 1 / step) for step in range(1, num + 1)]
    assert Losses(losses).points(500) == exact(losses, 500)


def test_a_spike_in_a_long_run_stays_visible_and_little_is_held():
    num, spike = 200_000, 123_456
    found = Losses((step, 1e6 if step == spike else -3.0 if step == 7 else 1.0) for step in range(1, num + 1))
    assert len(found._buckets) <= 32_768
    points = found.points(500)
    assert 250 <= len(points) <= 500 and points[-1][0] == num and found.newest == (num, 1.0)
    (peak,) = [index for index, (*_, most) in enumerate(points) if most == 1e6]
    assert points[peak - 1][0] < spike <= points[peak][0]
    assert points[0][2] == -3.0 and points[peak][2] == 1.0 and points[peak - 1] == (points[peak - 1][0], 1.0, 1.0, 1.0)
    whole = sum(each * mean for each, (_, mean, *_) in zip(widths(points), points, strict=True))
    assert whole == pytest.approx(num - 2 + 1e6 - 3)


def widths(points: list[tuple[int, float, float, float]]) -> list[int]:
    ends = [0, *map(itemgetter(0), points)]
    return [end - begin for begin, end in pairwise(ends)]


def test_what_has_no_loss_is_counted():
    found = Losses([(5, None), (6, 2.0), (8, "odd"), (9, None)])
    assert (found.num_steps, found.num_without, found.first_step, found.last_step) == (4, 2, 5, 9)
    assert found.newest == (6, 2.0) and found.points(9) == [(6, 2.0, 2.0, 2.0)] and Losses().points(3) == []
