from __future__ import annotations

import errno
import time
import uuid
from types import SimpleNamespace

import fsspec
import pytest

from orchestrator.checkpoint import store as store_module
from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.fsspec_objects import FsspecObjects
from orchestrator.checkpoint.probe import StoreFacts, probe
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, StorageError
from tests.orchestrator.checkpoint.test_store import run_threads
from tests.s3.fault_proxy import Fault, Kind
from tests.s3.stores import opened


class Overwriting(FsspecObjects):
    """Takes the condition of a create, and ignores it, as `rclone serve s3` does."""

    def __init__(self) -> None:
        super().__init__("memory", fsspec.filesystem("memory"))

    def create_once(self, path, data, timeout_s):
        self.write(path, [memoryview(data)])


class Refusing(FsspecObjects):
    """Refuses so many creates."""

    def __init__(self, times: int) -> None:
        super().__init__("memory", fsspec.filesystem("memory"))
        self._left = times

    def create_once(self, path, data, timeout_s):
        self._left -= 1
        if self._left >= 0:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        super().create_once(path, data, timeout_s)


@pytest.fixture
def overwriting(monkeypatch):
    monkeypatch.setattr(store_module, "_SETTLE_S", 0.3)
    return Store("memory://overwriting", f"/{uuid.uuid4().hex}", Overwriting())


def test_every_store_of_ours_has_it(any_store):
    assert probe(any_store) == StoreFacts(kind=any_store.backend.kind, conditional_create=True)
    assert any_store.conditional_create and any_store.list("") == []


def test_a_store_that_overwrites_is_found_out(overwriting):
    facts = probe(overwriting)
    assert not facts.conditional_create and not overwriting.conditional_create
    assert "never start a run twice" in facts.warning
    assert overwriting.list("") == []


@pytest.mark.parametrize(("times", "found"), [(1, True), (99, False)])
def test_a_store_that_refuses_the_condition_is_found_out_and_one_that_fails_once_is_not_taken_for_it(times, found):
    store = Store("memory://refusing", f"/{uuid.uuid4().hex}", Refusing(times))
    assert probe(store).conditional_create == store.conditional_create == found
    assert store.list("") == []


@pytest.mark.s3
def test_a_store_that_cannot_be_written_is_an_error(s3_proxy):
    store = opened()
    s3_proxy.faults = [Fault(kind=Kind.ANSWER, match="PUT", status=403, code="AccessDenied", count=9)]
    with pytest.raises(StorageError, match="permission denied"):
        probe(store)


def test_then_create_looks_before_and_after(overwriting):
    probe(overwriting)
    overwriting.create("a", b"mine")
    overwriting.create("a", b"mine")
    with pytest.raises(AlreadyExistsError):
        overwriting.create("a", b"theirs")
    assert overwriting.read("a") == b"mine"


def test_then_who_was_overwritten_meanwhile_learns_it(overwriting, monkeypatch):
    probe(overwriting)
    waiting = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: overwriting.write("a", [b"theirs"]))
    monkeypatch.setattr(store_module, "time", waiting)
    with pytest.raises(AlreadyExistsError):
        overwriting.create("a", b"mine")


def test_then_racing_claims_still_get_different_numbers(overwriting):
    probe(overwriting)
    assert sorted(run_threads(4, lambda _: claim_attempt(overwriting, {"host": "same"}))) == [1, 2, 3, 4]
