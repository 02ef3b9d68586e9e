"""The process of a save dies before and after every operation; what is stable afterwards is old or whole and new."""

from __future__ import annotations

import os

import pytest

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.reader import verify
from orchestrator.checkpoint.store import Store
from tests.orchestrator.checkpoint.states import equal, load, make_state, save

OLD, NEW = make_state(0), make_state(1)


class Died(BaseException):
    """No handler of errors runs after a SIGKILL."""


class Countdown:
    """Dies at one of the moments it is shown, and stays dead."""

    def __init__(self, moment: int) -> None:
        self.moment, self.seen = moment, 0

    def show(self) -> None:
        if self.seen == self.moment:
            raise Died
        self.seen += 1

    def around(self, function):
        def run(*args, **kwargs):
            self.show()
            result = function(*args, **kwargs)
            self.show()
            return result

        return run


class MortalStore:
    """A store whose process dies at `countdown`."""

    def __init__(self, inner: Store, countdown: Countdown) -> None:
        self.url = inner.url
        for name in ("read", "write", "create", "exists", "size", "list", "delete"):
            setattr(self, name, countdown.around(getattr(inner, name)))


def check_and_go_on(store: Store, died: bool) -> bool:
    """Whether the new checkpoint counts. In any case the next attempt can make it."""
    found = newest_stable(store)
    new = found.manifest.progress.step == 2
    assert equal(load(store, found.manifest, 2), NEW if new else OLD)
    assert verify(store, found.ref) == []
    assert new or died
    save(store, NEW, step=2, attempt=claim_attempt(store, {}), world_size=2)
    assert equal(load(store, newest_stable(store).manifest, 2), NEW)
    return new


def prepare(url: str) -> Store:
    store = Store.open(url)
    assert claim_attempt(store, {}) == 1
    save(store, OLD, step=1, attempt=1, world_size=2)
    return store


def die_at(moment: int, url: str) -> tuple[bool, bool]:
    """Save at `url` in a process that dies at the moment; whether it did, and whether the new checkpoint counts."""
    store, died = prepare(url), False
    try:
        save(MortalStore(store, Countdown(moment)), NEW, step=2, attempt=1, world_size=2)
    except Died:
        died = True
    return died, check_and_go_on(store, died)


# Two shards: write, size, read. Commit: list, create, read. The new one counts from the create on.
OUTCOMES = [False] * 15 + [True] * 4


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_every_storage_operation(tmp_path, kind):
    outcomes = []
    for moment in range(100):
        url = f"memory://{tmp_path.name}-{moment}" if kind == "memory" else str(tmp_path / str(moment))
        died, new = die_at(moment, url)
        outcomes.append(new)
        if not died:
            break
    assert outcomes == OUTCOMES


@pytest.mark.s3
@pytest.mark.parametrize("moment", [1, 5, 14, 15, 18])
def test_some_storage_operations_on_s3(s3_url, moment):
    assert die_at(moment, s3_url) == (moment < len(OUTCOMES) - 1, OUTCOMES[moment])


def test_every_system_call_of_a_local_save(tmp_path, monkeypatch):
    outcomes = []
    for moment in range(200):
        store = prepare(str(tmp_path / str(moment)))
        countdown, died = Countdown(moment), False
        with monkeypatch.context() as patch:
            for name in ("makedirs", "fsync", "replace", "link", "unlink"):
                patch.setattr(os, name, countdown.around(getattr(os, name)))
            try:
                save(store, NEW, step=2, attempt=1, world_size=2)
            except Died:
                died = True
        outcomes.append(check_and_go_on(store, died))
        if not died:
            break
    first = outcomes.index(True)
    assert outcomes == [False] * first + [True] * (len(outcomes) - first)
    assert first > 20 and len(outcomes) - first > 5  # moments before and after the commit were both met
