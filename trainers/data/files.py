"""The seam to where data lies: files below one root, listed and read in parts.

Local folders are read here. What reads URLs (s3://...) is handed in by whoever has it, so that this package needs no
library of object storage: see `FilesAt`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from trainers.errors import ConfigError


class Files(Protocol):
    """Files below one root. Thread-safe."""

    root: str
    """Folder or URL, for messages."""

    def exists(self, name: str | None) -> bool:
        """Whether there is such a file; None: whether there is such a folder, with something in it."""
        ...

    def names(self, suffixes: tuple[str, ...]) -> list[str]:
        """Paths of all files with one of these endings (lower case, with the dot), relative to the root, sorted.

        Hidden ones are left out.
        """
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """The bytes `begin : end`, or to the end; fewer if the file is shorter.

        Raises:
            OSError, or what the storage has for it: it can not be read; another try may succeed.
        """
        ...


FilesAt = Callable[[str], Files]
"""Opens the root that a path or URL names."""


class LocalFiles:
    """Files below a folder of this machine."""

    def __init__(self, root: str) -> None:
        self.root = root

    def exists(self, name: str | None) -> bool:
        return os.path.isdir(self.root) if name is None else os.path.isfile(self.path(name))

    def names(self, suffixes: tuple[str, ...]) -> list[str]:
        found = []
        for folder, below, names in os.walk(self.root, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]
            inside = Path(folder).relative_to(self.root)
            found += [
                (inside / name).as_posix() for name in names if name.lower().endswith(suffixes) and name[0] != "."
            ]
        return sorted(found)

    def size(self, name: str) -> int:
        return os.stat(self.path(name)).st_size

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        with open(self.path(name), "rb") as file:
            file.seek(begin)
            return file.read() if end is None else file.read(max(0, end - begin))

    def path(self, name: str) -> str:
        """Where a file is, for libraries that map files into memory."""
        return os.path.join(self.root, name)


def local_files(path: str) -> Files:
    """`FilesAt` for paths of this machine.

    Raises:
        ConfigError: it is a URL.
    """
    if "://" in path:
        raise ConfigError(f"data.path={path} can be read by `unbroken train` only; give a local path here")
    return LocalFiles(os.path.expanduser(path))


def split_file(path: str, suffixes: tuple[str, ...]) -> tuple[str, str | None]:
    """The folder to open, and the name of the one file in it if `path` names a file by its ending."""
    if not suffixes or not path.lower().endswith(suffixes):
        return path.rstrip("/") or path, None
    folder, _, name = path.rpartition("/")
    return folder or ("/" if path.startswith("/") else "."), name


class SeekableFile(io.RawIOBase):
    """A file of `Files` as Python's libraries read one; wrap it in `io.BufferedReader`."""

    def __init__(self, files: Files, name: str) -> None:
        super().__init__()
        self._files, self._name = files, name
        self._size = files.size(name)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._files.read(self._name, self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
