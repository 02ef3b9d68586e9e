"""One number that a row found, where there is no other side to be measured in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number, with what is wanted of it."""

    name: str
    value: float
    unit: str = ""
    goal: float | None = None
    """None: shown for information."""
    at_least: bool = False
    """The value must be at least the goal; else at most."""
    required: bool = False
    """If the goal is missed, the benchmark ends with an error, after everything is written."""
    points: Sequence[tuple[float, float]] = field(default_factory=list)
    """What it was made of: (x, y), for the plot."""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the goal is met."""
        if self.goal is None:
            return ""
        return "holds" if (self.value >= self.goal if self.at_least else self.value <= self.goal) else "missed"
