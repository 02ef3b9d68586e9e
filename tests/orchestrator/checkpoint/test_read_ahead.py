from __future__ import annotations

import threading

import pytest

from orchestrator.checkpoint.read_ahead import read_ahead
from tests.orchestrator.checkpoint.dict_store import DictStore

DATA = bytes(range(200))


class Counting(DictStore):
    """Tells how many pieces have been read."""

    def __init__(self, pieces_at_once: int) -> None:
        super().__init__({"a": DATA})
        self.backend.piece_bytes, self.backend.pieces_at_once = 30, pieces_at_once
        self.done, self._count = threading.Condition(), 0

    def read_into(self, key, begin, outs):
        found = super().read_into(key, begin, outs)
        with self.done:
            self._count += 1
            self.done.notify_all()
        return found

    def wait_for(self, count: int) -> None:
        with self.done:
            assert self.done.wait_for(lambda: self._count >= count, timeout=30)


@pytest.mark.parametrize("at_once", [1, 2, 4, 50])
def test_a_piece_stays_until_the_next_one_is_asked_for(at_once):
    """All that is read ahead meanwhile has arrived before the piece is looked at."""
    store, found = Counting(at_once), []
    for index, piece in enumerate(read_ahead(store, "a", len(DATA))):
        store.wait_for(min(index + at_once, 7))
        found.append(bytes(piece))
    assert b"".join(found) == DATA and [len(piece) for piece in found] == [30] * 6 + [20]


def test_an_object_that_is_shorter_ends_early():
    assert b"".join(map(bytes, read_ahead(Counting(4), "a", 1000))) == DATA
