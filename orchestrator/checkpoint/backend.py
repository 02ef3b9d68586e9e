"""What keeps the objects of a `Store`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """What an upload has left behind, or one that still goes on."""

    path: str
    """Where the object would be, or below which folder."""
    age_s: float
    """Seconds since it was begun, or last written to, by the clock of the store."""
    handle: Any
    """Only for the backend."""


class Backend(ABC):
    """It raises FileNotFoundError for a missing object, else whatever its library raises."""

    kind: str
    piece_bytes = 16 << 20
    """An object is best read in ranges of this size,"""
    pieces_at_once = 4
    """so many at a time."""

    def reach(self, path: str, timeout_s: float) -> None:
        """Return when the store has answered anything, be it an error."""
        return None  # only a store on a network may be far

    @abstractmethod
    def read(self, path: str, begin: int | None, end: int | None, timeout_s: float) -> bytes: ...

    def read_into(self, path: str, begin: int, outs: Sequence[memoryview], timeout_s: float) -> int:
        """Fill `outs`, one after the other, from byte `begin` on; how many bytes there were, fewer at the end."""
        data = memoryview(self.read(path, begin, begin + sum(map(len, outs)), timeout_s))
        rest = data
        for out in outs:
            piece, rest = rest[: len(out)], rest[len(out) :]
            out[: len(piece)] = piece
        return len(data)

    @abstractmethod
    def write(self, path: str, parts: Sequence[memoryview]) -> None: ...

    @abstractmethod
    def create_once(self, path: str, data: bytes, timeout_s: float) -> None:
        """Raises FileExistsError if there is such an object, perhaps ours."""

    @abstractmethod
    def size(self, path: str) -> int: ...

    @abstractmethod
    def list(self, path: str) -> list[str]: ...

    @abstractmethod
    def delete(self, path: str) -> None: ...

    def unfinished(self, path: str) -> Sequence[Unfinished]:
        """Uploads below `path` that were begun and not ended; none where a writer that dies leaves nothing."""
        return ()

    def abort(self, upload: Unfinished) -> None:
        """Remove one of them; nothing happens if it is gone, or has been finished."""
        raise NotImplementedError("there was none")

    def age_s(self, path: str) -> float | None:
        """Seconds since an object was written, by the clock of the store alone; None: it does not tell."""
        return None

    def clock_skew_s(self, path: str) -> float | None:
        """Seconds by which the store's clock is ahead of ours; None: it does not tell."""
        return None

    def free_bytes(self, path: str) -> int | None:
        """None: nobody knows."""
        return None
