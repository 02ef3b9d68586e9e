"""The reader without its threads, and no manifest parsed twice: for the simulation, as both take long."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

from orchestrator.checkpoint import reader
from orchestrator.checkpoint.manifest import Manifest


class _Serial:
    """In the place of the reader's thread pool: one read after the other, in the thread of the caller."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


@contextlib.contextmanager
def serial_reads() -> Iterator[None]:
    parse = functools.lru_cache(4096)(Manifest.from_bytes)  # of the same bytes, the same frozen value
    with (
        mock.patch.object(reader, "ThreadPoolExecutor", _Serial),
        mock.patch.object(Manifest, "from_bytes", staticmethod(parse)),
    ):
        yield
