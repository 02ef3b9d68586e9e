"""How long, and how often, something that failed is tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import StorageError, UnbrokenError

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0


class Retries:
    """The tries of one undertaking: pauses that double, until a deadline. May be ended from another thread."""

    def __init__(
        self, deadline_s: float, *, first_pause_s: float = _FIRST_PAUSE_S, longest_pause_s: float = _LONGEST_PAUSE_S
    ) -> None:
        self._end_s = time.monotonic() + deadline_s
        self._pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._ended = threading.Event()

    def next_s(self) -> float | None:
        """Seconds to wait before another try; None if there is no time for one."""
        pause_s = self._pause_s
        if time.monotonic() + pause_s > self._end_s:
            return None
        self._pause_s = min(self._longest_pause_s, 2 * pause_s)
        return pause_s

    def pause(self) -> bool:
        """Wait before another try; False, at once, if there is to be none."""
        pause_s = self.next_s()
        return pause_s is not None and not self._ended.wait(pause_s)

    def end(self) -> None:
        """No further try."""
        self._ended.set()


def patiently(
    do: Callable[[], T],
    pause: Callable[[], bool],
    delayed: Callable[[UnbrokenError], None],
    errors: tuple[type[UnbrokenError], ...] = (StorageError,),
) -> T:
    """What `do` returns, which is tried again and again as long as `pause` says so.

    Args:
        delayed: told why, if the first try fails and there is another one, or was to be.
        errors: after which it is tried again.

    Raises what the last try raised.
    """
    first = True
    while True:
        try:
            return do()
        except errors as error:
            if first:
                delayed(error)
            first = False
            if not pause():
                raise
