"""Retention beside the training: in a thread of its own, with a client of its own, never waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.retention import Pruner, Removal
from orchestrator.checkpoint.store import Store
from orchestrator.errors import SupersededError, UnbrokenError
from orchestrator.messages.attempts import Event


class BackgroundPruner:
    """Prunes when asked to, and again when what it marked may go. One pass at a time; requests meanwhile are one."""

    def __init__(
        self,
        open_store: Callable[[], Store],
        keep: RetentionConfig,
        notify: Callable[[Event], None],
        undo_steps: int = 0,
    ) -> None:
        """Args: notify: told of each removal and each failed pass, from the thread; undo_steps: as for `judge`."""
        self._open_store = open_store
        self._keep = keep
        self._undo_steps = undo_steps
        self._notify = notify
        self._attempt = 0
        self._requested = threading.Event()
        self._closed = False
        threading.Thread(target=self._work, name="pruner", daemon=True).start()

    def request(self, attempt: int) -> None:
        """Prune soon, on behalf of `attempt`. Returns at once."""
        self._attempt = attempt
        self._requested.set()

    def close(self) -> None:
        """No pass after the one under way; nobody waits for that."""
        self._closed = True
        self._requested.set()

    def _work(self) -> None:
        pruner: Pruner | None = None
        wait_s = None
        while True:
            self._requested.wait(wait_s)
            self._requested.clear()
            if self._closed:
                return
            wait_s = None
            try:
                pruner = pruner or Pruner(self._open_store(), self._keep, undo_steps=self._undo_steps)
                wait_s = pruner.prune(self._attempt, self._report)
            except SupersededError:
                pass  # the newer attempt prunes; that this one has to end is said at its next commit
            except UnbrokenError as error:
                self._event("prune_failed", error=str(error))
            except Exception as error:  # a bug here must not go unnoticed, nor end a training that is well
                self._event("prune_failed", error=f"{type(error).__name__}: {error}")

    def _report(self, removal: Removal) -> None:
        self._event("pruned", checkpoint=str(removal.ref), reason=removal.reason)

    def _event(self, kind: str, **fields: str) -> None:
        self._notify(Event(kind=kind, fields=fields, time_s=time.time()))
