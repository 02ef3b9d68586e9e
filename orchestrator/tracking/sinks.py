"""Where events go: the run's own record first, then whatever a user looks at."""

from __future__ import annotations

from typing import Protocol

from orchestrator.messages.attempts import Event


class Sink(Protocol):
    """Takes every event of a run. May be called from several threads."""

    def take(self, event: Event) -> None:
        """Note `event`; those of one thread come in order. Must not block, must not raise."""
        ...

    def close(self) -> None:
        """Deliver what is still here, within seconds. Nothing is taken afterwards. Must not raise."""
        ...
