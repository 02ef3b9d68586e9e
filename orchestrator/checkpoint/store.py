"""The one door to storage: whole objects under keys, at any fsspec URL.

What the commit of a checkpoint stands on:
- an object appears under its key complete or not at all (`write`, `create`);
- of several creators of a key with different bytes, one wins and the others learn it (`create`);
- "it failed" and "we do not know" are different errors (`orchestrator.errors`).
"""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from orchestrator.errors import (
    AlreadyExistsError,
    MissingObjectError,
    StorageError,
    UnbrokenError,
    UnknownOutcomeError,
)
from trainers.errors import ConfigError

Buffer = bytes | bytearray | memoryview

_WRITE_PIECE_BYTES = 16 << 20  # bounds what a client buffers: it copies each piece it is given
_CREATE_TRIES = 3
_S3_OPTIONS = {
    # A cached listing hides new checkpoints, even from exists() and cat_file().
    "use_listings_cache": False,
    # Payload signing and checksums in the client cost 2 CPU seconds a GB and more than half of the throughput.
    # Instead of them every object is read back and its hash compared before it counts.
    "config_kwargs": {
        "s3": {"payload_signing_enabled": False},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    },
}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3_OPTIONS, "s3a": _S3_OPTIONS}
_CERTAIN_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EOPNOTSUPP, errno.ENOTDIR, errno.EISDIR}
_CREDENTIAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
}


class Store:
    """Objects under one URL. Open it in the process that uses it (clients do not survive a fork); thread-safe."""

    def __init__(self, url: str, filesystem: fsspec.AbstractFileSystem, root: str) -> None:
        self.url = url
        self._filesystem = filesystem
        self._root = root
        self._write_lock = threading.Lock()

    @staticmethod
    def open(url: str) -> Store:
        """The store at `url`: a path, `file://`, `s3://`, `memory://` or any other protocol that fsspec knows.

        Nothing is created or contacted yet.

        Raises:
            ConfigError: no such protocol, or its package is not installed.
        """
        protocol = url.split("://", 1)[0] if "://" in url else "file"
        if protocol in ("file", "local"):
            root = Path(url.split("://", 1)[-1]).expanduser().absolute()
            return _LocalStore(str(root), fsspec.filesystem("file"), str(root))
        try:
            filesystem, root = fsspec.url_to_fs(url, skip_instance_cache=True, **_OPTIONS.get(protocol, {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"storage={url!r} cannot be opened: {error}") from error
        return Store(url.rstrip("/"), filesystem, root.rstrip("/"))

    def read(self, key: str, begin: int | None = None, end: int | None = None) -> bytes:
        """The bytes `begin : end` of an object, or all of them; fewer if the object is shorter.

        Raises:
            MissingObjectError: there is no such object.
            StorageError: it could not be read.
        """
        with self._translated("read", key):
            return self._filesystem.cat_file(self._path(key), start=begin, end=end)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """`read` of several ranges of one object, at the same time where the client can."""
        begins, ends = [begin for begin, _ in ranges], [end for _, end in ranges]
        with self._translated("read", key):
            return self._filesystem.cat_ranges([self._path(key)] * len(ranges), begins, ends, on_error="raise")

    def write(self, key: str, parts: Sequence[Buffer]) -> None:
        """Store `parts`, one after the other, as one object; an existing one is replaced.

        Raises:
            StorageError: it failed, and a torn object is not visible. Writing the same bytes again is safe.
        """
        # Outside a transaction fsspec would publish the truncated object when an exception interrupts the writing.
        # The transaction belongs to the whole client, hence one write at a time.
        with (
            self._translated("write", key),
            self._write_lock,
            self._filesystem.transaction,
            self._filesystem.open(self._path(key), "wb") as file,
        ):
            for part in parts:
                view = memoryview(part).cast("B")
                for begin in range(0, len(view), _WRITE_PIECE_BYTES):
                    file.write(view[begin : begin + _WRITE_PIECE_BYTES])

    def create(self, key: str, data: bytes) -> None:
        """Create an object if its key is free. Afterwards `key` holds exactly `data`.

        Creating the same bytes twice is no error: a client that repeats a request whose answer got lost meets its
        own object. So `data` must be unlike that of any other creator: put a token of your own in it.

        Raises:
            AlreadyExistsError: the key holds something else.
            StorageError: nothing was created.
            UnknownOutcomeError: nobody knows; it may even appear later. Look again, delete nothing.
        """
        assert data, "an empty create silently overwrites on s3fs"
        failure: Exception | None = None
        for _ in range(_CREATE_TRIES):
            try:
                with self._write_lock:
                    self._create_once(key, data)
                return
            except Exception as error:  # botocore's errors are no OSError, and any error may hide a success: look
                if _certainly_failed(error):
                    raise self._translate("create", key, error) from error
                failure = error
            try:
                held = self.read(key)
            except MissingObjectError:
                continue
            except StorageError as error:
                raise self._unknown(key, failure) from error
            if held == data:
                return
            raise AlreadyExistsError(f"{self._name(key)} exists already, created by somebody else; read it to see who")
        raise self._unknown(key, failure) from failure

    def exists(self, key: str) -> bool:
        """Whether there is such an object. Unlike fsspec's, an error is not a `False`."""
        try:
            self.size(key)
        except MissingObjectError:
            return False
        return True

    def size(self, key: str) -> int:
        """The size of an object in bytes. Raises MissingObjectError if there is none."""
        with self._translated("look at", key):
            return self._filesystem.info(self._path(key))["size"]

    def list(self, folder: str) -> list[str]:
        """The names directly below `folder`, objects and folders, sorted; none if there is no such folder."""
        path = self._path(folder)
        try:
            with self._translated("list", folder):
                entries = self._filesystem.ls(path, detail=False)
        except MissingObjectError:
            return []
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.strip("/") != path.strip("/")}
        return sorted(name for name in names if not name.startswith("."))

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        with suppress(MissingObjectError), self._translated("delete", key):
            self._filesystem.rm_file(self._path(key))

    def _create_once(self, key: str, data: bytes) -> None:
        self._filesystem.pipe_file(self._path(key), data, mode="create")

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except (UnbrokenError, AssertionError, TypeError):
            raise
        except Exception as error:  # a client raises what it likes; botocore's errors are no OSError
            raise self._translate(verb, key, error) from error

    def _translate(self, verb: str, key: str, error: Exception) -> StorageError:
        if isinstance(error, FileNotFoundError) and verb not in ("write", "create"):
            return MissingObjectError(f"{self._name(key)} does not exist")
        return StorageError(f"cannot {verb} {self._name(key)}: {_reason(error)}")

    def _unknown(self, key: str, error: Exception | None) -> UnknownOutcomeError:
        return UnknownOutcomeError(
            f"it is unknown whether {self._name(key)} was created ({type(error).__name__}: {error}); "
            "look for it before deciding anything, and delete nothing"
        )


class _LocalStore(Store):
    """A folder. Objects are written beside their final name, made durable, and only then named."""

    def write(self, key: str, parts: Sequence[Buffer]) -> None:
        path = self._path(key)
        with self._translated("write", key), _complete_file(path, parts) as temporary:
            os.replace(temporary, path)
            _make_name_durable(path)

    def _create_once(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _complete_file(path, [data]) as temporary:
            os.link(temporary, path)  # unlike rename, fails if the name is taken
            _make_name_durable(path)


@contextmanager
def _complete_file(path: str, parts: Sequence[Buffer]) -> Iterator[str]:
    """A temporary file beside `path` with all of `parts` on disk; removed at the end if it still has that name."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
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


def _make_name_durable(path: str) -> None:
    folder = os.path.dirname(path)
    for directory in (folder, os.path.dirname(folder)):  # the folder may be new too
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _certainly_failed(error: Exception) -> bool:
    """Whether the store refused before it did anything; after any other error the object may be there."""
    if isinstance(error, PermissionError | FileNotFoundError) or type(error).__name__ in _CREDENTIAL_ERRORS:
        return True
    return isinstance(error, OSError) and error.errno in _CERTAIN_ERRNOS


def _reason(error: Exception) -> str:
    if type(error).__name__ in _CREDENTIAL_ERRORS:
        return "no valid credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or attach a role"
    if isinstance(error, PermissionError):
        return f"permission denied ({error}); grant access, or choose another `storage`"
    if isinstance(error, FileNotFoundError):
        return f"the bucket or folder does not exist ({error}); create it, or correct `storage`"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left ({error}); free some, or choose another `storage`"
    return f"{type(error).__name__}: {error}"
