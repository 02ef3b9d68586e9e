"""SIGTERM and Ctrl-C: the first asks for a last save and a clean end, the second ends at once. And the end itself."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn


class Interrupts:
    """While this context is open, remembers the first signal; the second raises SystemExit in the main thread.

    Does nothing outside of the main thread, where Python allows no signal handlers.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._number: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str | None:
        """Of the signal that came; None: none."""
        return None if self._number is None else signal.Signals(self._number).name

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        assert self._number is not None
        return 128 + self._number

    @property
    def overdue(self) -> bool:
        """Whether the grace time is over."""
        return self._number is not None and time.monotonic() - self._since > self._grace_s

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._number is not None:
            raise SystemExit(128 + number)
        self._number, self._since = number, time.monotonic()


def leave(code: int) -> NoReturn:
    """End this process with `code`, once everything is written.

    Without the exit handlers: those of Ray take down what its threads, and ours that ask it something, still use. Such
    a process was seen to end with a segmentation fault (139, or -11) instead of its own code. What Ray started on this
    machine ends with it: the kernel sees to that (parent-death signal).
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
