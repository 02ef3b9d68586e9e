from __future__ import annotations

import pytest

from orchestrator.checkpoint.run_record import load, open_or_create
from orchestrator.errors import RunNotFoundError, UnbrokenError
from tests.orchestrator.checkpoint.test_store import run_threads


def test_the_first_start_decides_and_later_ones_get_its_record(store):
    first = open_or_create(store, {"seed": 1})
    assert open_or_create(store, {"seed": 2}) == first == load(store)
    assert first.config == {"seed": 1} and len(first.run_id) == 12


def test_racing_starts_agree(store):
    records = run_threads(8, lambda i: open_or_create(store, {"seed": i}))
    assert all(record == records[0] for record in records)


def test_no_run_is_its_own_error(store):
    with pytest.raises(RunNotFoundError, match="no run at"):
        load(store)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"run_id": "x"}', b"\xff"])
def test_a_damaged_record_is_not_a_missing_one(store, content):
    store.write("run.json", [content])
    with pytest.raises(UnbrokenError, match="damaged") as caught:
        open_or_create(store, {})
    assert not isinstance(caught.value, RunNotFoundError)
