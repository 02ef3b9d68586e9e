from __future__ import annotations

import pytest

from orchestrator.checkpoint.attempts import check_not_superseded, claim_attempt, newest_attempt, read_attempts
from orchestrator.errors import StorageError, SupersededError
from tests.orchestrator.checkpoint.test_store import run_threads


@pytest.fixture
def store(any_store):
    """All of these run on S3 too."""
    return any_store


def test_attempts_count_from_one_and_keep_what_was_said(store):
    assert newest_attempt(store) == 0 and list(read_attempts(store)) == []
    assert [claim_attempt(store, {"host": host}) for host in "ab"] == [1, 2]
    assert newest_attempt(store) == 2
    assert [(claim["attempt"], claim["host"]) for claim in read_attempts(store)] == [(2, "b"), (1, "a")]


def test_racing_claimers_with_equal_info_get_different_numbers(store):
    for round_ in range(2 if store.backend.kind == "s3" else 5):
        numbers = run_threads(8, lambda _: claim_attempt(store, {"host": "same"}))
        assert sorted(numbers) == list(range(8 * round_ + 1, 8 * round_ + 9))


def test_only_the_newest_goes_on(store):
    old, new = claim_attempt(store, {}), claim_attempt(store, {})
    check_not_superseded(store, new)
    with pytest.raises(SupersededError):
        check_not_superseded(store, old)


def test_who_is_superseded_finds_out_by_name(store, monkeypatch):
    """A store may list late what it has."""
    old, new = claim_attempt(store, {"by": "old"}), claim_attempt(store, {"by": "new"})
    monkeypatch.setattr(type(store), "list", lambda *_: [])
    with pytest.raises(SupersededError, match="superseded by attempt 2"):
        check_not_superseded(store, old)
    with pytest.raises(SupersededError, match="superseded by attempt 2"):
        claim_attempt(store, {}, after=old, own=lambda claim: claim["by"] == "old")
    check_not_superseded(store, new)
    assert claim_attempt(store, {}, after=old, own=lambda claim: claim["by"] == "new") == 3


def test_foreign_files_are_no_attempts(store):
    store.write("attempts/notes.txt", [b"x"])
    store.write("attempts/0041.json", [b"{}"])
    assert claim_attempt(store, {}) == 42


def test_a_damaged_claim_keeps_its_number_and_stops_nobody(store, monkeypatch):
    claim_attempt(store, {})
    store.write("attempts/0001.json", [b"{"])
    assert newest_attempt(store) == 1 and list(read_attempts(store)) == [{"attempt": 1}]
    assert claim_attempt(store, {}) == 2

    def unreachable(*_):
        raise OSError("unreachable")

    monkeypatch.setattr(store.backend, "read", unreachable)
    with pytest.raises(StorageError):  # which says nothing about the claim
        list(read_attempts(store))
