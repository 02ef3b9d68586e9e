"""Merging small objects: few stay, no row is lost, whoever dies or races."""

from __future__ import annotations

import itertools
import random

import pytest

from orchestrator.checkpoint.keys import EVENTS, METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import StorageError
from orchestrator.tracking import merging
from orchestrator.tracking.merging import FAN_IN, SEALED, Merger
from orchestrator.tracking.record import encode, event_row, read_events, step_row
from orchestrator.tracking.streaming import read_metrics
from tests.orchestrator.checkpoint.dict_store import DictStore
from tests.orchestrator.tracking.story import event, step


class Writer:
    """Writes one row an object, and merges."""

    def __init__(self, store: Store, name: str, folder: str = METRICS) -> None:
        self.store, self.name, self.folder = store, name * 8, folder
        self.numbers = itertools.count(1)
        self.merger = Merger(store, folder, self.ref)

    def ref(self, attempt: int, level: int) -> RowsRef:
        return RowsRef(attempt, next(self.numbers), self.name, level)

    def write(self, value: int) -> None:
        ref = self.ref(1, 0)
        rows = [step_row(step(value, 1, value))]
        if self.folder == EVENTS:
            rows = [event_row(event(value, "alive" if value % 10 else "saved", step=value), "s", self.name, value)]
        self.store.write(f"{self.folder}/{ref}", [encode(rows)])
        self.merger.add(ref)


def numbers(store: Store) -> list[int]:
    return [row["step"] for row in read_metrics(store)]


def test_few_objects_stay_and_every_row():
    store = DictStore()
    writer = Writer(store, "a")
    for value in range(1, 3001):
        writer.write(value)
        writer.merger.merge()
        assert len(store.list(METRICS)) < 4 * FAN_IN
    assert numbers(store) == list(range(1, 3001))
    assert {ref.level for name in store.list(METRICS) if (ref := RowsRef.parse(name))} <= {0, 1, 2, 3}


def test_a_large_object_is_not_written_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merging, "_SEALED_BYTES", 3000)
    store = DictStore()
    writer = Writer(store, "a")
    for value in range(1, 1001):
        writer.write(value)
        writer.merger.merge()
    refs = [ref for name in store.list(METRICS) if (ref := RowsRef.parse(name))]
    assert sum(ref.level == SEALED for ref in refs) >= 3
    assert numbers(store) == list(range(1, 1001))


def test_signs_of_life_are_thinned_and_the_last_stays():
    store = DictStore()
    writer = Writer(store, "a", EVENTS)
    for value in range(1, 2 * FAN_IN + 1):
        writer.write(value)
    writer.merger.merge()
    kept = [(one.kind, one.fields["step"]) for one in read_events(store)]
    assert [step for kind, step in kept if kind == "saved"] == [10, 20, 30]
    assert kept[-1] == ("alive", 2 * FAN_IN) and len(kept) < 10


def test_a_successor_takes_the_leavings_of_the_dead_on():
    store = DictStore()
    for life, name in enumerate("abcdef"):
        writer = Writer(store, name)
        writer.merger.adopt()
        for value in range(1, 31):
            writer.write(life * 30 + value)
            writer.merger.merge()
    assert len(store.list(METRICS)) < 2 * FAN_IN and numbers(store) == list(range(1, 181))


@pytest.mark.parametrize("seed", range(40))
def test_two_that_merge_the_same_objects_and_die_anywhere_lose_nothing(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Two mergers take turns between any two calls of the store; each call may be the last of either."""
    rng, store = random.Random(seed), DictStore()
    writers = [Writer(store, name) for name in "0123"]
    for value in range(1, 41):
        writers[value % 4].write(value)
    calls = {name: getattr(DictStore, name) for name in ("read", "write", "delete")}
    depth = 0

    def disturbed(name: str):
        def call(self: DictStore, *args: object) -> object:
            nonlocal depth
            if depth == 0 and rng.random() < 0.2:
                depth += 1
                try:
                    other = Writer(store, rng.choice("bcdef"))
                    other.numbers = itertools.count(rng.randrange(1000, 10**7))
                    other.merger.adopt()
                    other.merger.merge()
                except StorageError:
                    pass  # it died
                finally:
                    depth -= 1
            if rng.random() < 0.03:
                raise StorageError("killed here")
            return calls[name](self, *args)

        return call

    for name in calls:
        monkeypatch.setattr(DictStore, name, disturbed(name))
    for _ in range(4):
        merger = Writer(store, "a")
        merger.numbers = itertools.count(rng.randrange(1000, 10**7))
        merger.merger.adopt()
        try:
            merger.merger.merge()
        except StorageError:
            pass
    monkeypatch.undo()
    assert numbers(store) == list(range(1, 41))


def test_a_damaged_object_of_events_is_left_as_it_is():
    store = DictStore()
    writer = Writer(store, "a", EVENTS)
    for value in range(1, FAN_IN + 1):
        writer.write(value)
    torn = f"{EVENTS}/{store.list(EVENTS)[3]}"
    store.write(torn, [store.read(torn)[:-9]])
    writer.merger.merge()
    assert store.exists(torn) and len(store.list(EVENTS)) == 2
