"""Microbatches, read when they are due or ahead of it by threads. Either way they hold the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """What comes next, read by threads before it is asked for, in the order in which it is asked for.

    What is read is a function of its key alone, so who reads it, and when, decides nothing.
    """

    def __init__(self, read: Callable[[int, int], T], num_threads: int, depth: int) -> None:
        """Args: read: step and microbatch -> what is wanted, in any thread; num_threads: 0: never ahead."""
        self._read = read
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="data") if num_threads else None
        self._depth = depth
        self._pending: dict[tuple[int, int], Future[T]] = {}

    def take(self, key: tuple[int, int], now: Callable[[], T], following: Iterable[tuple[int, int]]) -> T:
        """What `key`, a step and a microbatch, stands for; `following` are read in the background.

        Args:
            now: reads it in this thread, where an error is told with all that is known.
        """
        if self._pool is None:
            return now()
        future = self._pending.pop(key, None)
        wanted = list(islice(following, self._depth))
        for other in self._pending.keys() - set(wanted):
            self._pending.pop(other).cancel()
        for other in wanted:
            if other not in self._pending:
                self._pending[other] = self._pool.submit(self._read, *other)
        if future is None:
            return now()
        try:
            return future.result()
        except Exception:  # read again, where the trace says which sample it was
            return now()

    def close(self) -> None:
        """End the threads, when they have read what they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
