"""When the trainers are started next, and how long storage may keep them from it. They are down and lose nothing."""

from __future__ import annotations

import time

from orchestrator.retries import Retries

_LEAST_PATIENCE_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.4, 10.0


class NextLaunch:
    """One for each coordinator."""

    def __init__(self, patience_s: float) -> None:
        """Args: patience_s: for so long storage may fail launches; a minute at least."""
        self._patience_s = max(_LEAST_PATIENCE_S, patience_s)
        self._at: float | None = None
        self._retries: Retries | None = None
        """Since the first failure in a row."""
        self.cause = "start"
        """Why there is another one."""

    def plan(self, delay_s: float, cause: str) -> None:
        self._at, self.cause = time.monotonic() + delay_s, cause

    def cancel(self) -> None:
        self._at = None

    @property
    def planned(self) -> bool:
        return self._at is not None

    @property
    def wait_s(self) -> float:
        """Seconds until it is due."""
        assert self._at is not None
        return max(0.0, self._at - time.monotonic())

    def take(self) -> bool:
        """Whether it is due now; then it is planned no more."""
        if self._at is None or time.monotonic() < self._at:
            return False
        self._at = None
        return True

    def failed(self) -> float | None:
        """Storage did not do its part. Seconds until the next try, which is planned; None: it was the last one."""
        if self._retries is None:
            self._retries = Retries(self._patience_s, first_pause_s=_FIRST_PAUSE_S, longest_pause_s=_LONGEST_PAUSE_S)
        delay_s = self._retries.next_s()
        if delay_s is not None:
            self.plan(delay_s, self.cause)
        return delay_s

    def succeeded(self) -> None:
        self._retries = None
