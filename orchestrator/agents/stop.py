"""For how long has somebody stopped a process by a signal?"""

from __future__ import annotations

import time

from orchestrator.coordination.watchdog import Silence
from orchestrator.processes import process_state


class Stop:
    """One for each process that is looked at. What the looker itself was stopped for does not count."""

    def __init__(self) -> None:
        self._since_seen = Silence(time.monotonic())
        self._seen = False

    def lasts_s(self, pid: int | None) -> float:
        """Seconds since it was first seen stopped; 0 if it is not. Call often.

        Args:
            pid: None: it is not known yet.
        """
        total_s = self._since_seen.passed(time.monotonic())
        before, self._seen = self._seen, pid is not None and process_state(pid) == "T"
        if before and self._seen:
            return total_s
        self._since_seen.heard()
        return 0.0
