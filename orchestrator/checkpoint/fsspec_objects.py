"""Objects in any filesystem of fsspec that has no backend of its own here, as fsspec gives them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from orchestrator.checkpoint.backend import Backend

_WRITE_PIECE_BYTES = 16 << 20  # bounds what a client buffers: it copies each piece it is given


class FsspecObjects(Backend):
    """A backend of `Store`."""

    def __init__(self, protocol: str, filesystem: Any) -> None:
        self.kind = protocol
        self._filesystem = filesystem  # fsspec's own annotations are too wide to be of use
        self._write_lock = threading.Lock()

    def read(self, path: str, begin: int | None, end: int | None, timeout_s: float) -> bytes:
        return self._filesystem.cat_file(path, start=begin, end=end)

    def write(self, path: str, parts: Sequence[memoryview]) -> None:
        # Outside a transaction fsspec would publish the truncated object when an exception interrupts the writing.
        # The transaction belongs to the whole client, hence one write at a time.
        with self._write_lock, self._filesystem.transaction, self._filesystem.open(path, "wb") as file:
            for part in parts:
                for begin in range(0, len(part), _WRITE_PIECE_BYTES):
                    file.write(part[begin : begin + _WRITE_PIECE_BYTES])

    def create_once(self, path: str, data: bytes, timeout_s: float) -> None:
        with self._write_lock:
            self._filesystem.pipe_file(path, data, mode="create")

    def size(self, path: str) -> int:
        return self._filesystem.info(path)["size"]

    def list(self, path: str) -> list[str]:
        try:
            entries = self._filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.strip("/") != path.strip("/")]

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(path)
