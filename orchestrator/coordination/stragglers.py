"""Which rank is slow: the time of its own work a step, beside that of the others. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from orchestrator.messages.liveness import Busy

REPORT_STEPS, REPORT_S = 10, 5.0
"""An agent reports after so many steps and seconds, whichever comes later."""

_FACTOR = 1.5
_MIN_S = 0.02
"""A difference below this is noise of the machine."""
_IN_A_ROW = 2


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that holds the others up."""

    rank: int
    step_s: float
    """Its own work a step."""
    others_s: float
    """Median of the others."""


class Stragglers:
    """Collects the reports of all ranks; names a rank that was slow in two rounds running, once an attempt."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._latest: dict[int, float] = {}
        self._suspect: tuple[int, int] = (-1, 0)
        self._named: set[int] = set()

    def take(self, rank: int, busy: Busy) -> Straggler | None:
        """One rank's report; the verdict when it completes a round."""
        self._latest[rank] = busy.seconds / busy.num_steps
        if len(self._latest) < self._world_size or self._world_size < 2:
            return None
        step_s, self._latest = self._latest, {}
        slowest = max(step_s, key=lambda rank: step_s[rank])
        others = median(seconds for rank, seconds in step_s.items() if rank != slowest)
        if step_s[slowest] < max(_FACTOR * others, others + _MIN_S):
            self._suspect = (-1, 0)
            return None
        times = self._suspect[1] + 1 if self._suspect[0] == slowest else 1
        self._suspect = (slowest, times)
        if times < _IN_A_ROW or slowest in self._named:
            return None
        self._named.add(slowest)
        return Straggler(rank=slowest, step_s=step_s[slowest], others_s=others)
