"""The reader without its threads: for the simulation, and where starting them would take most of the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from orchestrator.checkpoint import reader


class _Serial:
    """In the place of the reader's thread pool: one read after the other, in the thread of the caller."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


@contextlib.contextmanager
def serial_reads() -> Iterator[None]:
    with mock.patch.object(reader, "ThreadPoolExecutor", _Serial):
        yield
