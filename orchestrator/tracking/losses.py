"""The loss over the steps of a run, in a size that does not depend on their number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_MOST_BUCKETS = 32_768
"""Up to so many steps a point of the curve is what it would be if all steps were known."""

Point = tuple[int, float, float, float]
"""Step of the last value in it, then mean, least and greatest value."""


@dataclass(slots=True)
class _Bucket:
    step: int
    """The last one."""
    count: int
    total: float
    least: float
    most: float

    def add(self, other: _Bucket) -> None:
        self.step, self.count, self.total = other.step, self.count + other.count, self.total + other.total
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)


class Losses:
    """Fed with every step, in order. What is shown of it keeps the extremes: no spike is averaged away."""

    def __init__(self, losses: Iterable[tuple[int, Any]] = ()) -> None:
        """Args: losses: step and loss, or whatever the record has in its place."""
        self.num_steps = 0
        """Steps that the record has."""
        self.num_without = 0
        """Steps whose loss was not finite."""
        self.first_step = 0
        self.last_step = 0
        self.newest: tuple[int, float] | None = None
        """The last step that has a loss, and this."""
        self._buckets: list[_Bucket] = []
        self._each = 1
        """Losses in a bucket."""
        for step, loss in losses:
            self._add(step, loss)

    def points(self, most: int) -> list[Point]:
        """The curve, in at most so many points of the same number of steps."""
        size = max(1, -(-len(self._buckets) // most))
        parts = (_merged(self._buckets[begin : begin + size]) for begin in range(0, len(self._buckets), size))
        return [(part.step, part.total / part.count, part.least, part.most) for part in parts]

    def _add(self, step: int, loss: Any) -> None:
        self.first_step = self.first_step if self.num_steps else step
        self.last_step = step
        self.num_steps += 1
        self.num_without += loss is None
        if not isinstance(loss, int | float):
            return
        self.newest, new = (step, loss), _Bucket(step, 1, loss, loss, loss)
        if self._buckets and self._buckets[-1].count < self._each:
            self._buckets[-1].add(new)
            return
        if len(self._buckets) == _MOST_BUCKETS:
            pairs = range(0, _MOST_BUCKETS, 2)
            self._buckets = [_merged(self._buckets[begin : begin + 2]) for begin in pairs]
            self._each *= 2
        self._buckets.append(new)


def _merged(buckets: Sequence[_Bucket]) -> _Bucket:
    found = replace(buckets[0])
    for bucket in buckets[1:]:
        found.add(bucket)
    return found
