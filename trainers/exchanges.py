"""Exchanges of gradients that go on while the backward pass does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist

Reduction = Iterator[Sequence[dist.Work]]
"""The reduction of one unit: it hands out what it has begun wherever it would have to wait for all of it."""


class Exchanges:
    """The reductions under way, those of all units of a model.

    Whenever one begins, those before it wait for what they have begun and begin the next part. So the order in which
    exchanges begin depends on the order of units alone, and all ranks agree on it without a word; and each has the time
    of a unit's backward pass before anybody waits for it.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Reduction, Sequence[dist.Work]]] = []

    def begin(self, reduction: Reduction) -> None:
        """Run `reduction` until it would wait, and those before it one exchange further. Collective: all ranks."""
        earlier, self._waiting = self._waiting, []
        works = next(reduction, None)  # first of all: while others are waited for, its exchange goes on
        self._go_on(earlier)
        if works is not None:
            self._waiting.append((reduction, works))

    def finish(self) -> None:
        """Run all of them to their ends. Collective: all ranks."""
        while self._waiting:
            earlier, self._waiting = self._waiting, []
            self._go_on(earlier)

    def _go_on(self, earlier: list[tuple[Reduction, Sequence[dist.Work]]]) -> None:
        for reduction, works in earlier:
            for work in works:
                work.wait()
            if (following := next(reduction, None)) is not None:
                self._waiting.append((reduction, following))
