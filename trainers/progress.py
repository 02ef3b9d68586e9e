"""The one clock of a run: what has been completed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How much of the run is *completed*.

    Learning rate, EMA, data order, randomness and save times are functions of this value alone.
    """

    step: int = 0
    """Optimizer steps completed, >= 0."""
    samples_seen: int = 0
    """Samples those steps were made of, >= 0. The next step starts at this sample position."""

    def advance(self, num_samples: int) -> Progress:
        """The progress after one more step of `num_samples` samples."""
        return Progress(self.step + 1, self.samples_seen + num_samples)
