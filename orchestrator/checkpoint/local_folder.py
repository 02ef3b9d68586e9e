"""Objects as files. Each is written beside its final name, made durable, and only then named."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from orchestrator.checkpoint.backend import Backend, Unfinished


class LocalFolder(Backend):
    """A backend of `Store`. Its calls cannot be interrupted, so times are not bounded."""

    kind = "local"
    piece_bytes = 1 << 20  # what is copied out of the system's cache is still in the core's when it is used
    pieces_at_once = 1

    def read(self, path: str, begin: int | None, end: int | None, timeout_s: float) -> bytes:
        with open(path, "rb") as file:
            file.seek(begin or 0)
            return file.read() if end is None else file.read(max(0, end - (begin or 0)))

    def read_into(self, path: str, begin: int, outs: Sequence[memoryview], timeout_s: float) -> int:
        found = 0
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            for out in outs:
                while len(out) and (count := file.readinto(out)):
                    out, found = out[count:], found + count
        return found

    def write(self, path: str, parts: Sequence[memoryview]) -> None:
        with _complete_file(path, parts) as temporary, _durable_name(path):
            os.replace(temporary, path)

    def create_once(self, path: str, data: bytes, timeout_s: float) -> None:
        with _complete_file(path, [data]) as temporary, _durable_name(path):
            os.link(temporary, path)  # unlike rename, fails if the name is taken

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

    def unfinished(self, path: str) -> list[Unfinished]:
        found = []
        for folder, folders, names in os.walk(path):
            left = [os.path.join(folder, name) for name in filter(_is_temporary, names)]
            if not (folders or names) and folder != path:  # its writer came no further
                left.append(folder)
            for name in left:
                with suppress(FileNotFoundError):  # its owner was faster
                    found.append(Unfinished(path=folder, age_s=self.age_s(name), handle=name))
        return found

    def abort(self, upload: Unfinished) -> None:
        with suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(upload.handle)
        with suppress(OSError):  # as above
            os.rmdir(upload.path)

    def age_s(self, path: str) -> float:
        written_s = os.stat(path).st_mtime
        return _now_s(os.path.dirname(path)) - written_s

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


def _now_s(folder: str) -> float:
    """As its files are dated: by the clock of another machine, where the folder is mounted from there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # a full disk must not keep anybody from making room
        return time.time()


def _is_temporary(name: str) -> bool:
    return len(name) == 37 and name.startswith(".") and name.endswith(".tmp")


@contextmanager
def _durable_name(path: str) -> Iterator[None]:
    """What is named within is so for good.

    Raises:
        OSError: before it is named; afterwards one without a number, as it is unknown what a power cut would leave.
    """
    folder = os.path.dirname(path)
    with ExitStack() as stack:
        descriptors = []
        for directory in (folder, os.path.dirname(folder)):  # the folder may be new too
            descriptors.append(os.open(directory, os.O_RDONLY))
            stack.callback(os.close, descriptors[-1])
        yield
        try:
            for descriptor in descriptors:
                os.fsync(descriptor)
        except OSError as error:
            raise OSError(f"{folder} could not be made durable: {error}") from error
