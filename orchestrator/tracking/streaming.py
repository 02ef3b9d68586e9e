"""The rows of a whole run in an order, one after the other, in memory that does not grow with the run.

Objects of the record overlap: drivers follow each other, steps are made again, and merges put together what they find.
So every object is read twice: once for where its rows begin, and again when the order has come there. What a merge may
still take away is small, and kept from the first time; objects that are large enough stay where they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from orchestrator.checkpoint.keys import METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import MissingObjectError
from orchestrator.tracking.merging import SEALED
from orchestrator.tracking.record import Row, decode_lines, say_damaged

Item = tuple[Any, ...]
"""What is wanted of a row. Items are ordered by their first two entries."""

_LISTINGS = 10
"""Times that the folder is listed anew because objects were merged while we read them."""
_PARALLEL_READS = 4
_LINES = 2000
"""That are rows at a time."""
_ORDER = itemgetter(0, 1)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """An object of the folder."""

    first: Any
    """Where its items begin in the order; None: it has none."""
    damaged: int
    """Lines."""
    data: bytes | None
    """None: it is to be read again."""


class OrderedRows:
    """Each row of one folder as an item, in order; one that is twice there comes twice."""

    def __init__(self, store: Store, folder: str, pick: Callable[[Row], Item]) -> None:
        """Look where everything is.

        Args:
            pick: what is wanted of a row; the first two entries say where it comes.

        Raises:
            StorageError: the store could not be read.
        """
        self._store = store
        self._folder = folder
        self._pick = pick
        self._parts: dict[RowsRef, _Part] = {}
        for _ in range(_LISTINGS - 1):
            try:
                return self._look()
            except MissingObjectError:
                continue  # merged into another object, which a new listing names
        self._look()

    @property
    def damaged(self) -> list[str]:
        """One line for each object that is not wholly readable."""
        return say_damaged(self._store, self._folder, {ref: part.damaged for ref, part in self._parts.items()})

    def __iter__(self) -> Iterator[Item]:
        """Raises StorageError: the store could not be read."""
        begins = sorted((part.first, ref) for ref, part in self._parts.items() if part.first is not None)
        waiting: list[Item] = []
        for (first, _), data in zip(begins, self._contents([ref for _, ref in begins]), strict=True):
            ready = bisect_left(waiting, first, key=_ORDER)
            yield from waiting[:ready]
            del waiting[:ready]
            waiting += self._items(data)[0]
            waiting.sort(key=_ORDER)
        yield from waiting

    def _look(self) -> None:
        names = self._store.list(self._folder)
        refs = {ref for name in names if (ref := RowsRef.parse(name))}
        self._parts = {ref: part for ref, part in self._parts.items() if ref in refs}
        # First what the next merge takes away.
        unknown = sorted(refs - self._parts.keys(), key=lambda ref: (ref.level, ref))
        for ref, data in zip(unknown, self._contents(unknown), strict=True):
            items, damaged = self._items(data)
            first = min(map(_ORDER, items), default=None)
            self._parts[ref] = _Part(first=first, damaged=damaged, data=data if ref.level < SEALED else None)

    def _contents(self, refs: Sequence[RowsRef]) -> Iterator[bytes]:
        """Of each object, a few of them read ahead."""
        ahead: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            for ref in refs:
                ahead.append(pool.submit(self._content, ref))
                if len(ahead) == _PARALLEL_READS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _content(self, ref: RowsRef) -> bytes:
        known = self._parts.get(ref)
        kept = known.data if known is not None else None
        return self._store.read(f"{self._folder}/{ref}") if kept is None else kept

    def _items(self, data: bytes) -> tuple[list[Item], int]:
        lines, items, damaged = data.splitlines(), [], 0
        for begin in range(0, len(lines), _LINES):
            rows, bad = decode_lines(lines[begin : begin + _LINES], self._folder)
            items += map(self._pick, rows)
            damaged += bad
        return items, damaged


def items_by_step(store: Store, pick: Callable[[Row], Item] = lambda row: ()) -> tuple[OrderedRows, Iterator[Item]]:
    """All rows of metrics, and of them one item a step, by step: `step, -attempt` and what `pick` takes.

    Of a step that was replayed it is from the newest attempt that did it.

    Raises:
        StorageError: the store could not be read.
    """
    rows = OrderedRows(store, METRICS, lambda row: (row["step"], -row["attempt"], *pick(row)))
    return rows, (next(same) for _, same in groupby(rows, key=itemgetter(0)))


def read_metrics(store: Store) -> Iterator[Row]:
    """One row a step, by step, each exactly once, with the `attempt` that it is from: the newest that did this step.

    After a restart, steps that have not been redone yet are those of the attempt before.

    Raises:
        StorageError: the store could not be read.
    """
    return (row for _, _, row in items_by_step(store, lambda row: (row,))[1])
