"""Learning rates as pure functions of progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over the run."""

    kind: Literal["constant", "linear", "cosine", "polynomial"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, >= 0."""
    end_factor: float = 0.0
    """Learning rate at the last step as a share of the peak, 0 <= f <= 1; not used by constant."""
    power: float = 1.0
    """Exponent of polynomial, > 0."""
