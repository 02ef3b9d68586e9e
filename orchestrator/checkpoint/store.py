"""The one door to storage: whole objects under keys, at any fsspec URL.

What the commit of a checkpoint stands on:
- an object appears under its key complete or not at all (`write`, `create`);
- of several creators of a key with different bytes, one wins and the others learn it (`create`);
- "it failed" and "we do not know" are different errors (`orchestrator.errors`);
- no call on S3 takes longer than a deadline, whatever the network does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fsspec

from orchestrator.checkpoint.backend import Backend, Unfinished
from orchestrator.checkpoint.fsspec_objects import FsspecObjects
from orchestrator.checkpoint.local_folder import LocalFolder
from orchestrator.checkpoint.s3_objects import S3Objects
from orchestrator.checkpoint.s3_requests import OPTIONS
from orchestrator.checkpoint.storage_failures import Failure, diagnose
from orchestrator.errors import (
    AlreadyExistsError,
    MissingObjectError,
    StorageError,
    UnbrokenError,
    UnknownOutcomeError,
)
from trainers.errors import ConfigError

Buffer = bytes | bytearray | memoryview

DEADLINE_S = 60.0
REACH_S = 10.0
"""For which `Store.reach` waits."""
_CREATE_TRIES = 3
_SETTLE_S = 2.0  # in which a request that another process has begun should have taken effect


class Store:
    """Objects under one URL. Open it in the process that uses it (connections do not survive a fork); thread-safe."""

    def __init__(self, url: str, root: str, backend: Backend, deadline_s: float = DEADLINE_S) -> None:
        self.url = url
        self.backend = backend
        self.conditional_create = True
        """False: the backend ignores the condition of `create_once`, as `probe` found out; `create` then takes care."""
        self._root = root
        self._deadline_s = deadline_s

    @staticmethod
    def open(url: str, deadline_s: float = DEADLINE_S) -> Store:
        """The store at `url`: a path, `file://`, `s3://`, `memory://` or any other protocol that fsspec knows.

        S3 takes endpoint and credentials from the environment, as botocore reads it: AWS_ENDPOINT_URL_S3,
        AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, AWS_PROFILE, or a role. Nothing is created or
        contacted yet.

        Args:
            deadline_s: a call on S3 gives up after so long; a large one after a second more for each MiB.

        Raises:
            ConfigError: no such protocol, its package is not installed, or credentials in the URL.
        """
        protocol = url.split("://", 1)[0] if "://" in url else "file"
        if protocol in ("file", "local"):
            root = str(Path(os.path.expanduser(url.split("://", 1)[-1])).absolute())
            return Store(root, root, LocalFolder(), deadline_s)
        root = url.split("://", 1)[1].rstrip("/")
        url = f"{protocol}://{root}"
        try:
            fsspec.get_filesystem_class(protocol)
            if protocol in ("s3", "s3a"):
                _check_s3_root(url, root)
                return Store(url, root, S3Objects(lambda: fsspec.filesystem("s3", **OPTIONS), deadline_s), deadline_s)
            filesystem, root = fsspec.url_to_fs(url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"storage={url!r} cannot be opened: {error}; give a folder or s3://..., or install what is missing"
            ) from error
        return Store(url, root.rstrip("/"), FsspecObjects(protocol, filesystem), deadline_s)

    @staticmethod
    def reach(url: str, deadline_s: float = DEADLINE_S) -> Store:
        """As `open`, for a command that a person waits for: somebody has answered there, soon.

        Raises:
            ConfigError: as `open` does.
            StorageError: nobody answers.
        """
        store = Store.open(url, deadline_s)
        try:
            store.backend.reach(store._root, REACH_S)
        except Exception as error:  # as in `_translated`
            raise StorageError(f"cannot reach {store.url}: {diagnose(error).line}") from error
        return store

    def read(self, key: str, begin: int | None = None, end: int | None = None) -> bytes:
        """The bytes `begin : end` of an object, or all of them; fewer if the object is shorter.

        Raises:
            MissingObjectError: there is no such object.
            StorageError: it could not be read.
        """
        return self._read(key, begin, end, self._deadline_s)

    def read_into(self, key: str, begin: int, outs: Sequence[memoryview]) -> int:
        """Fill `outs`, one after the other, from byte `begin` of an object on.

        Returns:
            How many bytes there were; fewer than asked for if the object is shorter.

        Raises:
            MissingObjectError: there is no such object.
            StorageError: it could not be read; `outs` hold garbage.
        """
        with self._translated("read", key):
            return self.backend.read_into(self._path(key), begin, outs, self._deadline_s)

    def write(self, key: str, parts: Sequence[Buffer]) -> None:
        """Store `parts`, one after the other, as one object; an existing one is replaced.

        Raises:
            StorageError: it failed, and a torn object is not visible. Writing the same bytes again is safe.
        """
        with self._translated("write", key):
            self.backend.write(self._path(key), [memoryview(part).cast("B") for part in parts])

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
        if not self.conditional_create:
            return self._create_carefully(key, data)
        end = time.monotonic() + self._deadline_s
        unclear: Failure | None = None
        unclear_tries, pause_s = 0, 0.1
        while True:
            try:
                return self.backend.create_once(self._path(key), data, (end - time.monotonic()) / _CREATE_TRIES)
            except FileExistsError:
                failure = Failure(line="the key was taken, and free again", certain=False, retry=True)
            except Exception as error:  # botocore's errors are no OSError, and any error may hide a success: look
                failure = diagnose(error)
            if not failure.certain:
                unclear, unclear_tries = failure, unclear_tries + 1
                if self._holds(key, data, failure, end):
                    return None
            refused = failure.certain and not failure.retry
            pause_s = min(5.0, 2 * pause_s)
            if refused or unclear_tries == _CREATE_TRIES or time.monotonic() + pause_s >= end:
                break
            time.sleep(pause_s)
        if unclear is not None:  # an earlier try may still take effect, whatever the last one says
            raise self._unknown(key, unclear)
        raise StorageError(f"cannot create {self._name(key)}: {failure.line}")

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
            return self.backend.size(self._path(key))

    def list(self, folder: str) -> list[str]:
        """The names directly below `folder`, objects and folders, sorted; none if there is no such folder."""
        with self._translated("list", folder):
            return sorted(name for name in self.backend.list(self._path(folder)) if not name.startswith("."))

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        with self._translated("delete", key):
            self.backend.delete(self._path(key))

    def unfinished_uploads(self) -> Sequence[Unfinished]:
        """What uploads left behind that were begun here and not ended, or that still go on."""
        with self._translated("list uploads in", ""):
            return self.backend.unfinished(self._root)

    def upload_key(self, upload: Unfinished) -> str:
        """The key, or its folder, that an unfinished upload was meant for."""
        return upload.path.removeprefix(f"{self._root}/")

    def abort_upload(self, upload: Unfinished) -> None:
        """Remove what it left behind. If it still goes on, its writer gets a StorageError."""
        with self._translated("abort an upload in", ""):
            self.backend.abort(upload)

    def age_s(self, key: str) -> float | None:
        """Seconds since an object was written, by the clock of the store alone; None where it does not tell.

        Raises:
            MissingObjectError: there is no such object.
            StorageError: it could not be asked.
        """
        with self._translated("look at", key):
            return self.backend.age_s(self._path(key))

    def clock_skew_s(self) -> float | None:
        """Seconds by which the store's clock is ahead of ours, to about one; None if it does not tell."""
        with self._translated("ask for the time at", ""):
            return self.backend.clock_skew_s(self._root)

    def free_bytes(self) -> int | None:
        """Free space; None where that is not known."""
        return self.backend.free_bytes(self._root)

    def _read(self, key: str, begin: int | None, end: int | None, timeout_s: float) -> bytes:
        with self._translated("read", key):
            return self.backend.read(self._path(key), begin, end, timeout_s)

    def _holds(self, key: str, data: bytes, failure: Failure, end: float) -> bool:
        """Whether the key holds `data`, after a try to create it whose outcome is unclear; False if it holds nothing.

        Raises:
            AlreadyExistsError: it holds something else.
            UnknownOutcomeError: it cannot be read.
        """
        try:
            held = self._read(key, None, None, max(1.0, end - time.monotonic()))
        except MissingObjectError:
            return False
        except StorageError as error:
            raise self._unknown(key, failure) from error
        if held != data:
            raise AlreadyExistsError(f"{self._name(key)} exists already, created by somebody else; read it to see who")
        return True

    def _create_carefully(self, key: str, data: bytes) -> None:
        """As `create` where every creator of a key succeeds and the last one's bytes stay.

        Look, write, wait, look again: right if no request of another creator takes longer than the wait (Fischer's
        mutual exclusion, Lamport, ACM TOCS 5(1), 1987, algorithm 1).
        """
        nobody = Failure(line="nothing was written", certain=True)
        if self._holds(key, data, nobody, time.monotonic() + self._deadline_s):
            return
        self.write(key, [data])
        time.sleep(_SETTLE_S)
        if not self._holds(key, data, nobody, time.monotonic() + self._deadline_s):
            raise self._unknown(key, Failure(line="it was written, and is not there"))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    @contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except (UnbrokenError, AssertionError, TypeError):
            raise
        except FileNotFoundError as error:
            if verb == "write":
                raise StorageError(f"cannot {verb} {self._name(key)}: {diagnose(error).line}") from error
            raise MissingObjectError(f"{self._name(key)} does not exist") from error
        except Exception as error:  # a client raises what it likes; botocore's errors are no OSError
            raise StorageError(f"cannot {verb} {self._name(key)}: {diagnose(error).line}") from error

    def _unknown(self, key: str, failure: Failure) -> UnknownOutcomeError:
        return UnknownOutcomeError(
            f"it is unknown whether {self._name(key)} was created ({failure.line}); "
            "look for it before deciding anything, and delete nothing"
        )


def _check_s3_root(url: str, root: str) -> None:
    bucket = root.partition("/")[0]
    if not bucket:
        raise ConfigError(f"storage={url!r} names no bucket; write s3://bucket/prefix")
    if "@" in bucket:
        raise ConfigError(
            "credentials in `storage` would be stored with the run; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
