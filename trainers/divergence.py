"""When a step's gradients are not taken, and when training has diverged: functions of loss and gradient norm alone.

Both are the same bits for every world size and in every replay, and the numbers that the rule looks back on are a part
of the state. So every history of failures skips the same steps.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers.errors import ConfigError, DivergedError

_LEAST_SPIKE = 3.0
"""A spike is at least this many times the median: where a curve is almost flat, the deviations say nothing."""


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """Which steps are bad, and what follows from several in a row.

    A bad step passes like any other, except that weights, optimizer, EMA and their counters stay as they were. After
    `patience` bad steps in a row the run goes back to `rollback_steps` before the first of them, and goes on with the
    data that comes after the last. (Chowdhery et al., "PaLM", 2022, section 5.1, skip 200 to 500 batches after going
    back about 100 steps.)
    """

    spike_mads: float | None = 20.0
    """Bad is a loss or gradient norm above the window's median + this many median absolute deviations, and above 3
    medians, > 0; null: only what is not finite."""
    window: int = 100
    """Last good steps that the rule looks at; before there are as many no step is a spike, >= 8."""
    patience: int = 3
    """Bad steps in a row that make a divergence, >= 1."""
    rollback_steps: int = 20
    """Steps before the first bad one that are undone and whose data is left out too, >= 0."""

    def __post_init__(self) -> None:
        if self.spike_mads is not None and self.spike_mads <= 0:
            raise ConfigError(f"spike_mads={self.spike_mads:g} must be above 0, or null to look for no spikes")
        for key, low in (("window", 8), ("patience", 1), ("rollback_steps", 0)):
            if getattr(self, key) < low:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least {low}")


class DivergenceGuard:
    """Judges every step. A part of the state."""

    def __init__(self, config: DivergenceConfig) -> None:
        self._config = config
        self._values = {name: deque[float](maxlen=config.window) for name in ("loss", "grad_norm")}
        self._first_bad = 0
        self.num_bad = 0
        """Bad steps in a row up to now."""

    def judge(self, step: int, values: Mapping[str, float]) -> str | None:
        """Why the gradients of `step` are not to be taken; None: they are. Call it once for every step trained.

        Args:
            values: loss and grad_norm.
        """
        reason = next((why for name in self._values if (why := self._why_bad(name, values[name]))), None)
        if reason is None:
            self.num_bad = self._first_bad = 0
            for name, window in self._values.items():
                window.append(values[name])
        else:
            self._first_bad = self._first_bad or step
            self.num_bad += 1
        return reason

    def check(self, step: int, reason: str | None, num_rollbacks: int) -> None:
        """Raise if `step` was the last bad one of too many.

        Raises:
            DivergedError: with the steps to undo and to leave out.
        """
        if self.num_bad < self._config.patience:
            return
        first = max(1, self._first_bad - self._config.rollback_steps)
        raise DivergedError(
            f"steps {self._first_bad} to {step} are bad, the last one because its {reason}",
            skip=(first, step),
            num_rollbacks=num_rollbacks,
        )

    def scalars(self) -> dict[str, Any]:
        """JSON-ready; all numbers are finite."""
        windows = {name: list(window) for name, window in self._values.items()}
        return {"first_bad": self._first_bad, "num_bad": self.num_bad, "window": windows}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """The counterpart of `scalars`."""
        self._first_bad, self.num_bad = int(scalars["first_bad"]), int(scalars["num_bad"])
        for name, window in self._values.items():
            window.clear()
            window.extend(scalars["window"][name])

    def _why_bad(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        window = self._values[name]
        if self._config.spike_mads is None or len(window) < self._config.window:
            return None
        limit = spike_limit(window, self._config.spike_mads)
        return f"{name} {value:.6g} is above {limit:.6g}" if value > limit else None


def spike_limit(window: Sequence[float], num_mads: float) -> float:
    """The largest value that is no spike after those of `window`."""
    median = statistics.median(window)
    deviation = statistics.median(abs(value - median) for value in window)
    return max(median + num_mads * deviation, _LEAST_SPIKE * median)
