"""Exponential moving averages of the weights, sharded like the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """One EMA profile. Give exactly one of decay, half_life_samples and num_steps, or kind sma."""

    kind: Literal["constant", "warmup", "sma"] = "constant"
    """constant: fixed decay; warmup: min(decay, (1 + n) / (10 + n)) after n updates; sma: equal weights."""
    decay: float | None = None
    """Weight of the old average in one update, 0 < decay < 1."""
    half_life_samples: int | None = None
    """Samples after which a weight's influence has halved, > 0."""
    num_steps: int | None = None
    """N of alpha = 2 / (N + 1), >= 1; the window of sma."""
    start_step: int = 0
    """The average begins as a copy of the weights after this many steps; no memory and no time before, >= 0."""
    every: int = 1
    """Update after every so many steps, >= 1."""
