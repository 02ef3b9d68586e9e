"""Making very many small objects at once, without Python's cyclic garbage collector walking them again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """For code that makes no cycles; also a decorator.

    The collector looks at all objects whenever their number has grown by a quarter. For the 131,072 chunks of 16,384
    ranks that takes longer than to make them. May be nested, and used by several threads: the last one to leave of
    those that found it switched on leaves it on.
    """
    found = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if found:
            gc.enable()
