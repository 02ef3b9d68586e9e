"""S3 requests whose time we bound and which we repeat ourselves.

s3fs makes the connection: credentials, endpoint and region as botocore finds them in the environment. Its calls are
not used: they repeat beyond any deadline, and copy an upload several times.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from orchestrator.checkpoint.storage_failures import DeadlineError, diagnose

T = TypeVar("T")
Request = Callable[[Any, asyncio.Timeout], Awaitable[T]]
"""Called with botocore's client and the limit of this try."""

OPTIONS: dict[str, Any] = {
    "skip_instance_cache": True,
    # A cached listing hides new checkpoints, even from exists() and cat_file().
    "use_listings_cache": False,
    # Payload signing and checksums in the client cost 2 CPU seconds a GB and more than half of the throughput.
    # Instead of them every shard is read back and its hash compared before it counts.
    "config_kwargs": {
        "s3": {"payload_signing_enabled": False},
        "signature_version": "s3v4",  # else URLs are signed in a way that newer buckets refuse
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        # Repeating and giving up is decided here, in one place.
        "retries": {"total_max_attempts": 1},
        "connect_timeout": 10,
        "read_timeout": 600,
        "max_pool_connections": 32,
    },
}
"""For s3fs."""

_SLOWEST_BYTES_PER_S = 1 << 20  # a transfer gets so much more time than a small request
_TRIES = 3  # a store that does not answer is asked so often before the deadline
_LEAST_S = 0.05  # for the last try, after a pause that took longer than it should have
_CREDENTIALS_S = 30.0  # to get credentials from whoever gives them, and to make what uses them


class S3Requests:
    """A connection. Its calls may come from any thread of the process that made it."""

    def __init__(self, connect: Callable[[], Any], deadline_s: float) -> None:
        """Args: connect: makes an s3fs filesystem with `OPTIONS`."""
        self._connect = connect
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self._client: Any = None
        self._pid = os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of `coroutine`, which uses `once` and `repeat`, in the connection's own thread."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._connected().loop)
        try:
            return future.result()
        except Exception as error:
            self._renew(error)
            raise
        finally:
            future.cancel()  # when interrupted; else it is done

    def _renew(self, error: Exception) -> None:
        """Connect anew if credentials were refused: a connection keeps what it once read from a file."""
        if diagnose(error).renew:
            with self._lock:
                self._filesystem = None

    def check_owner(self) -> None:
        """Whether this is the process that made it.

        A fork has no thread to serve the connection, and shares the poll set of its sockets with the parent: closing
        one there makes the parent wait for ever.
        """
        assert self._pid == os.getpid(), f"this store belongs to process {self._pid}; open one in {os.getpid()}"

    def _connected(self) -> Any:
        self.check_owner()
        with self._lock:
            if self._filesystem is None:
                self._filesystem = self._connect()
            return self._filesystem

    async def repeat(self, request: Request[T], *, num_bytes: int = 0, timeout_s: float | None = None) -> T:
        """The answer to a request that may safely be sent again, until it succeeds, cannot succeed, or time is up."""
        tries = self._tries(timeout_s, num_bytes)
        while True:
            try:
                return await self.once(request, tries.next_s(), num_bytes)
            except Exception as error:
                pause_s = tries.failed(error)
            await asyncio.sleep(pause_s)

    def repeat_here(self, request: Callable[[float], T], *, num_bytes: int = 0, timeout_s: float | None = None) -> T:
        """The same for what blocks the calling thread; told the seconds that it may take, beside `transfer_s`."""
        tries = self._tries(timeout_s, num_bytes)
        while True:
            try:
                return request(tries.next_s())
            except Exception as error:
                self._renew(error)
                pause_s = tries.failed(error)
            time.sleep(pause_s)

    def _tries(self, timeout_s: float | None, num_bytes: int) -> _Tries:
        time_s = (self._deadline_s if timeout_s is None else timeout_s) + transfer_s(num_bytes)
        return _Tries(time_s, self.try_s)

    @property
    def try_s(self) -> float:
        """Seconds that one try of a small request may take."""
        return self._deadline_s / _TRIES

    async def sign(self, operation: str, valid_s: int, **parameters: Any) -> str:
        """A URL that stands for a request of ours, sent by whomever."""
        filesystem = self._connected()
        async with asyncio.timeout(_CREDENTIALS_S):
            client = await filesystem.set_session()
            return await client.generate_presigned_url(operation, Params=parameters, ExpiresIn=valid_s)

    def certificates(self) -> str | bool:
        """The file of those that are trusted, from AWS_CA_BUNDLE or AWS's configuration; True: the usual ones."""
        return self._connected().session.get_config_variable("ca_bundle") or True

    async def once(self, request: Request[T], time_s: float, num_bytes: int = 0) -> T:
        """The answer to one request."""
        filesystem = self._connected()  # held to the end: it closes its connections when nobody holds it
        async with asyncio.timeout(_CREDENTIALS_S):
            client = await filesystem.set_session()  # the same one again, as long as it is open
        if client is not self._client:
            client.meta.events.register_last("before-call.s3", _do_not_ask_first)
            self._client = client
        try:
            async with asyncio.timeout(time_s) as limit:
                allow_for(limit, num_bytes)
                return await request(client, limit)
        except TimeoutError as error:
            raise TimeoutError(client.meta.endpoint_url) from error


class _Tries:
    """Those of one request: each may take a part of the time, with growing pauses between them."""

    def __init__(self, time_s: float, one_s: float) -> None:
        self._time_s, self._one_s = time_s, one_s
        self._end = time.monotonic() + time_s
        self._count = 0

    def next_s(self) -> float:
        """Seconds that another try may take; more than none."""
        self._count += 1
        return min(max(_LEAST_S, self._end - time.monotonic()), self._one_s)

    def failed(self, error: Exception) -> float:
        """Seconds to wait before the next try. Raises `error` if it is no use, DeadlineError if there is no time."""
        if not diagnose(error).retry:
            raise error
        pause_s = min(5.0, 0.1 * 2**self._count) * random.uniform(0.5, 1.0)
        if time.monotonic() + pause_s >= self._end:
            tries = f"{self._count} {'try' if self._count == 1 else 'tries'}"
            raise DeadlineError(f"{tries} in {self._time_s:.0f} s") from error
        return pause_s


def _do_not_ask_first(params: dict[str, Any], **_: Any) -> None:
    """botocore has an upload wait for `100 Continue`, and a store that never says it would hold us."""
    params["headers"].pop("Expect", None)


def allow_for(limit: asyncio.Timeout, num_bytes: int) -> None:
    """More time for a large transfer."""
    when = limit.when()
    assert when is not None
    limit.reschedule(when + transfer_s(num_bytes))


def transfer_s(num_bytes: int) -> float:
    """Seconds that so many bytes are granted."""
    return num_bytes / _SLOWEST_BYTES_PER_S
