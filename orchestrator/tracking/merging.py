"""Few objects instead of many: a run of weeks writes its record every few seconds, and listings must stay short.

Sixteen objects of a level become one of the next, up to a size; so a row is rewritten a few times in its life, and of
n objects written some 15 log16(n) stay. The result is stored before the first source goes away, and has a key of its
own. So several processes may merge the same objects, and any of them may die in between: no row is lost, and rows that
are twice there are told apart by readers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from orchestrator.checkpoint.keys import EVENTS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import MissingObjectError
from orchestrator.tracking.record import Row, decode, encode

FAN_IN = 16
SEALED = 9
"""The level of objects that are large enough."""
_SEALED_BYTES = 1 << 20


class Merger:
    """Keeps one folder of the record short."""

    def __init__(self, store: Store, folder: str, name: Callable[[int, int], RowsRef]) -> None:
        """Args: name: a fresh reference for an attempt and a level."""
        self._store = store
        self._folder = folder
        self._name = name
        self._small: dict[int, set[RowsRef]] = {}

    def adopt(self) -> None:
        """Take on what is there: the leavings of processes that are gone. Harmless if one is not."""
        for name in self._store.list(self._folder):
            if ref := RowsRef.parse(name):
                self.add(ref)

    def add(self, ref: RowsRef) -> None:
        if ref.level < SEALED:
            self._small.setdefault(ref.level, set()).add(ref)

    def merge(self) -> None:
        """Merge what is due.

        Raises:
            StorageError: it failed; nothing is lost, and the next call tries again.
        """
        while (level := next((level for level, refs in self._small.items() if len(refs) >= FAN_IN), None)) is not None:
            self._merge(sorted(self._small[level])[:FAN_IN], level)

    def _merge(self, refs: list[RowsRef], level: int) -> None:
        present, parts = [], []
        for ref in refs:
            with suppress(MissingObjectError):  # somebody else has merged it
                data = self._store.read(f"{self._folder}/{ref}")
                if self._folder == EVENTS and decode(data, EVENTS)[1]:
                    continue  # damaged: it stays as it is, as evidence
                present.append(ref)
                parts.append(data if data.endswith(b"\n") else data + b"\n")
        if present:
            data = b"".join(parts)
            if self._folder == EVENTS:
                data = encode(thinned(decode(data, EVENTS)[0]))
            target = self._name(
                max(ref.attempt for ref in present), SEALED if len(data) >= _SEALED_BYTES else level + 1
            )
            self._store.write(f"{self._folder}/{target}", [data])
            self.add(target)
        self._small[level] -= set(refs)
        for ref in present:
            self._store.delete(f"{self._folder}/{ref}")


def thinned(rows: list[Row]) -> list[Row]:
    """Events without the signs of life that a later event of the same writer makes superfluous."""
    latest: dict[str, int] = {}
    for row in rows:
        latest[row["writer"]] = max(row["seq"], latest.get(row["writer"], 0))
    return [row for row in rows if row["event"] != "alive" or row["seq"] == latest[row["writer"]]]
