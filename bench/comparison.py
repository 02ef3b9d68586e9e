"""Two ways of doing one thing, timed in pairs; what may be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Times of `ours` and of `reference`, pair by pair: entry i of both was measured at about the same moment."""

    name: str
    reference_name: str
    ours_s: Sequence[float]
    reference_s: Sequence[float]
    goal: float | None = None
    """The ratio must be at most this; None: shown for information."""
    max_s: float | None = None
    """The median of `ours` must be at most this, too."""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median of the ratios of the pairs."""
        return float(np.median(self.ratios))

    @property
    def interval(self) -> tuple[float, float]:
        """Of the bootstrap resamples of the pairs, 5 % have a median ratio below it, and 5 % above it."""
        ratios = self.ratios
        draws = np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(draws, axis=1), (0.05, 0.95))
        return float(low), float(high)

    @property
    def verdict(self) -> str:
        """Whether the goal is met: `holds` if so even at the interval's end, `open` if only at the median."""
        if self.goal is None:
            return ""
        if self.ratio > self.goal or (self.max_s is not None and np.median(self.ours_s) > self.max_s):
            return "missed"
        return "holds" if self.interval[1] <= self.goal else "open"

    @property
    def ratios(self) -> np.ndarray:
        """Of the pairs."""
        assert len(self.ours_s) == len(self.reference_s) > 0, (len(self.ours_s), len(self.reference_s))
        return np.asarray(self.ours_s) / np.asarray(self.reference_s)
