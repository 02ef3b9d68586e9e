"""When the trainers are started next, and how long storage may keep them from it. They are down and lose nothing."""

from __future__ import annotations

import time

_LEAST_PATIENCE_S = 60.0
_LONGEST_PAUSE_S = 10.0


class NextLaunch:
    """One for each coordinator."""

    def __init__(self, patience_s: float) -> None:
        """Args: patience_s: for so long storage may fail launches; a minute at least."""
        self._patience_s = max(_LEAST_PATIENCE_S, patience_s)
        self._at: float | None = None
        self._give_up_at = 0.0
        self._failures = 0
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
        now = time.monotonic()
        if not self._failures:
            self._give_up_at = now + self._patience_s
        self._failures += 1
        delay_s = min(_LONGEST_PAUSE_S, 0.2 * 2 ** min(self._failures, 16))
        if now + delay_s > self._give_up_at:
            return None
        self.plan(delay_s, self.cause)
        return delay_s

    def succeeded(self) -> None:
        self._failures = 0
