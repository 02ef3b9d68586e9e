"""What a run leaves out of its data, decided on the way: steps after a divergence, and samples that kill.

It decides numbers, so it is a part of the state: it stands in every checkpoint, and an attempt that starts from an
older one is told. Each entry names the step from which it holds, so that earlier steps are replayed as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Exclusions:
    """Sorted, so that the order in which things were found out leaves no trace."""

    steps: tuple[tuple[int, int], ...] = ()
    """(first, last) of each rollback, by last: these steps pass without training. They may overlap."""
    samples: tuple[tuple[int, int], ...] = ()
    """(step, dataset index): from this step on that sample is replaced, see `trainers.data.guarded`."""

    def skips(self, step: int) -> bool:
        """Whether step number `step` (counted from 1) passes without training."""
        return any(first <= step <= last for first, last in self.steps)

    def left_out(self, step: int) -> frozenset[int]:
        """The dataset indices that are not trained on in `step`."""
        return frozenset(index for since, index in self.samples if since <= step)

    def merged(self, other: Exclusions) -> Exclusions:
        """What either of the two leaves out."""
        return Exclusions(
            steps=tuple(sorted({*self.steps, *other.steps}, key=lambda entry: (entry[1], entry[0]))),
            samples=tuple(sorted({*self.samples, *other.samples})),
        )

    def scalars(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"steps": [list(entry) for entry in self.steps], "samples": [list(entry) for entry in self.samples]}

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, Any]) -> Exclusions:
        """The counterpart of `scalars`."""
        return cls(
            steps=tuple((int(first), int(last)) for first, last in scalars["steps"]),
            samples=tuple((int(since), int(index)) for since, index in scalars["samples"]),
        )
