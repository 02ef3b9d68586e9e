"""An agent's sign of life, from a thread of its own: it goes on while the agent waits for its fork server."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

from orchestrator.agents.stop import Stop
from orchestrator.agents.trainer_probe import starved_s
from orchestrator.coordination.watchdog import BEAT_S
from orchestrator.messages.liveness import Beat

_GIVEN_UP_S = 10.0
"""Seconds that a trainer may be stopped: well after the coordinator has ordered its end."""


class Heartbeat:
    """Sends a `Beat` every `BEAT_S`: has the trainer been stopped by a signal, and was it let run?

    It also ends a trainer that was stopped in the middle of a message: until the rest of that comes, or the end, the
    agent's main thread hears no order.
    """

    def __init__(self, send: Callable[[object], None]) -> None:
        self._send = send
        self._watched: tuple[int, int | None] = (0, None)
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="heartbeat", daemon=True).start()

    def watch(self, attempt: int, pid: int | None) -> None:
        """From now on look at this trainer; None: at none."""
        self._watched = (attempt, pid)

    def close(self) -> None:
        self._closed.set()

    def _work(self) -> None:
        stop = Stop()
        starved: float | None = None
        looked_at: tuple[int, int | None] = (0, None)
        while not self._closed.wait(BEAT_S):
            attempt, pid = watched = self._watched
            if watched != looked_at:
                stop, starved, looked_at = Stop(), None, watched
            stopped = stop.lasts_s(pid)
            if pid is not None and stopped >= _GIVEN_UP_S:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            before, starved = starved, starved_s(pid) if pid is not None else None
            hungry = starved - before if starved is not None and before is not None else 0.0
            try:
                self._send(Beat(attempt=attempt, stopped_s=stopped, starved_s=hungry))
            except OSError:
                return  # the main thread reads the end of this connection, and ends
