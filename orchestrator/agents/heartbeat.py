"""An agent's sign of life, from a thread of its own: it goes on while the agent waits for its fork server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from orchestrator.agents.trainer_probe import starved_s
from orchestrator.coordination.watchdog import BEAT_S
from orchestrator.messages.liveness import Beat
from orchestrator.processes import process_state


class Heartbeat:
    """Sends a `Beat` every `BEAT_S`: has the trainer been stopped by a signal, and was it let run?"""

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
        stopped_since: float | None = None
        starved: float | None = None
        looked_at: tuple[int, int | None] = (0, None)
        while not self._closed.wait(BEAT_S):
            attempt, pid = watched = self._watched
            now = time.monotonic()
            if pid is None or watched != looked_at or process_state(pid) != "T":
                stopped_since = None
            elif stopped_since is None:
                stopped_since = now
            before = starved if watched == looked_at else None
            starved = starved_s(pid) if pid is not None else None
            looked_at = watched
            stopped = now - stopped_since if stopped_since else 0.0
            hungry = starved - before if starved is not None and before is not None else 0.0
            try:
                self._send(Beat(attempt=attempt, stopped_s=stopped, starved_s=hungry))
            except OSError:
                return  # the main thread reads the end of this connection, and ends
