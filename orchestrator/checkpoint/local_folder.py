"""Objects as files. Each is written beside its final name, made durable, and only then named."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


class LocalFolder:
    """A backend of `Store`. Its calls cannot be interrupted, so times are not bounded."""

    kind = "local"

    def read(self, path: str, begin: int | None, end: int | None, timeout_s: float) -> bytes:
        with open(path, "rb") as file:
            file.seek(begin or 0)
            return file.read() if end is None else file.read(max(0, end - (begin or 0)))

    def write(self, path: str, parts: Sequence[memoryview]) -> None:
        with _complete_file(path, parts) as temporary:
            os.replace(temporary, path)
            _make_name_durable(path)

    def create_once(self, path: str, data: bytes, timeout_s: float) -> None:
        with _complete_file(path, [data]) as temporary:
            os.link(temporary, path)  # unlike rename, fails if the name is taken
            _make_name_durable(path)

    def size(self, path: str) -> int:
        return os.stat(path).st_size

    def list(self, path: str) -> list[str]:
        try:
            return os.listdir(path)
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)
        with suppress(OSError):  # a folder with nothing in it means nothing, as on an object store
            os.rmdir(os.path.dirname(path))

    def abort_unfinished(self, path: str, older_than_s: float) -> int:
        begun_before = time.time() - older_than_s
        removed = 0
        for folder, _, names in os.walk(path):
            for name in names:
                temporary = os.path.join(folder, name)
                with suppress(FileNotFoundError):  # its owner was faster
                    if _is_temporary(name) and os.stat(temporary).st_mtime <= begun_before:
                        os.unlink(temporary)
                        removed += 1
        return removed

    def clock_skew_s(self, path: str) -> float | None:
        return None

    def free_bytes(self, path: str) -> int | None:
        while not os.path.exists(path):
            path = os.path.dirname(path)
        return shutil.disk_usage(path).free


@contextmanager
def _complete_file(path: str, parts: Sequence[bytes | memoryview]) -> Iterator[str]:
    """A temporary file beside `path` with all of `parts` on disk; removed at the end if it still has that name."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:  # which here would mean that the key is taken
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from error
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _is_temporary(name: str) -> bool:
    return len(name) == 37 and name.startswith(".") and name.endswith(".tmp")


def _make_name_durable(path: str) -> None:
    folder = os.path.dirname(path)
    for directory in (folder, os.path.dirname(folder)):  # the folder may be new too
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
