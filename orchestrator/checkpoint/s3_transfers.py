"""Bytes to and from S3, each piece by the thread that asks for it, straight from where it lies to where it belongs.

asyncio would serve all connections in one thread, and copy every byte, and encrypt it there. botocore signs a request,
and the session that it uses itself, with all that it knows of certificates and proxies, sends it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orchestrator.checkpoint.s3_requests import S3Requests, transfer_s

_CONNECT_S = 10.0
_PIECE_BYTES = 256 << 10
_SEND_S = 1.0  # for a piece, at the slowest rate and beside three others
_MAX_CONNECTIONS = 32
_VALID_S = 900  # of a signature, so that a clock may be a little behind; a request is sent at once
_REUSED_S = 60.0  # of a signature for one object's ranges: less than what is left of any credentials that botocore uses
_NUM_REUSED = 64


class S3Transfers:
    """Its calls may come from any thread of the process that made it."""

    def __init__(self, requests: S3Requests) -> None:
        self._requests = requests
        self._lock = threading.Lock()
        self._http: _Http | None = None
        self._urls: dict[tuple[str, str], tuple[str, float]] = {}
        """Of a bucket and a key: what was signed, and until when it is used."""

    def send(self, operation: str, views: Sequence[memoryview], stopped: Callable[[], bool], **parameters: Any) -> str:
        """Make `views`, one after the other, the body of a request that is repeated until it succeeds.

        Args:
            operation: `put_object` or `upload_part`; `parameters` are botocore's.
            stopped: asked again and again whether it is still wanted.

        Returns:
            The ETag of what is there now.

        Raises what botocore raises, TimeoutError, or OSError.
        """

        def once(time_s: float) -> str:
            if stopped():
                raise InterruptedError("it is not wanted any more")
            url = self._requests.run(self._requests.sign(operation, _VALID_S, **parameters))
            http = self._connected(url)
            answer = http.put(url, views, time_s, stopped)
            try:
                if answer.status_code != 200:
                    raise http.error(answer, "".join(word.title() for word in operation.split("_")))
                answer.raw.read()  # the empty end: only now is the connection free for others
                return answer.headers.get("etag", "")
            finally:
                answer.raw.close()

        return self._requests.repeat_here(once, num_bytes=sum(map(len, views)))

    def read_into(self, bucket: str, key: str, begin: int, outs: Sequence[memoryview], timeout_s: float) -> int:
        """Fill `outs`, one after the other, from byte `begin` on; how many bytes there were.

        Raises what botocore raises, TimeoutError, or OSError.
        """
        return self._requests.repeat_here(
            lambda time_s: self._receive(bucket, key, begin, outs, time_s), timeout_s=timeout_s
        )

    def _receive(self, bucket: str, key: str, begin: int, outs: Sequence[memoryview], time_s: float) -> int:
        end, wanted = time.monotonic() + time_s, sum(map(len, outs))
        url = self._readable(bucket, key)
        http = self._connected(url)
        answer = http.get(url, {"Range": f"bytes={begin}-{begin + wanted - 1}"}, time_s)
        try:
            if answer.status_code == 416:
                return 0  # it begins at or after the end
            if answer.status_code not in (200, 206):
                with self._lock:
                    self._urls.clear()  # what refuses one signature may refuse them all
                raise http.error(answer, "GetObject")
            size = int(answer.headers["content-length"])
            if size > wanted or (answer.status_code == 200 and begin):
                raise OSError(f"the store does not know ranges: asked for {wanted} bytes, it sends {size}")
            end, left = end + transfer_s(size), size
            for out in outs:
                left -= http.receive(answer.raw, out[:left], end)
            if left:
                raise ConnectionError(f"the connection ended {left} bytes before the end of {size}")
            answer.raw.read()  # the empty end: only now is the connection free for others
            return size
        finally:
            answer.raw.close()

    def _readable(self, bucket: str, key: str) -> str:
        """A URL for any range of an object: to sign one takes as long as to receive a MiB."""
        self._requests.check_owner()
        now = time.monotonic()
        with self._lock:
            url, end = self._urls.get((bucket, key), ("", now))
        if now >= end:
            url = self._requests.run(self._requests.sign("get_object", _VALID_S, Bucket=bucket, Key=key))
            with self._lock:
                if len(self._urls) >= _NUM_REUSED:
                    self._urls.clear()
                self._urls[bucket, key] = url, now + _REUSED_S
        return url

    def _connected(self, url: str) -> _Http:
        with self._lock:
            if self._http is None:
                connect_s = min(_CONNECT_S, self._requests.try_s + _SEND_S)
                self._http = _Http(url, self._requests.certificates(), connect_s)
            return self._http


class _Http:
    """botocore's own client. Imported when it is used: a run on a local folder does without."""

    def __init__(self, url: str, certificates: str | bool, connect_s: float) -> None:
        """Args: connect_s: limits a connection's beginning, and the sending of each `_PIECE_BYTES`."""
        from botocore import awsrequest, exceptions, httpsession, utils
        from urllib3 import exceptions as transport

        self._awsrequest, self._exceptions, self._transport = awsrequest, exceptions, transport
        self._session = httpsession.URLLib3Session(
            verify=certificates,  # pyright: ignore[reportArgumentType]  a path is as good as True, see botocore
            proxies=utils.get_environ_proxies(url),
            timeout=(connect_s, None),
            max_pool_connections=_MAX_CONNECTIONS,
        )

    def get(self, url: str, headers: dict[str, str], time_s: float) -> Any:
        """An answer whose body is still to be received. Each wait for something to arrive is limited to `time_s`."""
        return self._send(url, time_s, method="GET", headers=headers)

    def put(self, url: str, views: Sequence[memoryview], time_s: float, stopped: Callable[[], bool]) -> Any:
        """An answer, given when all of `views` has been sent."""
        size = sum(map(len, views))
        time_s += transfer_s(size)  # for the answer too: what has been sent may still be on its way
        end = time.monotonic() + time_s

        def pieces() -> Iterator[memoryview]:
            for view in views:
                for begin in range(0, len(view), _PIECE_BYTES):
                    if stopped() or time.monotonic() >= end:
                        raise TimeoutError
                    yield view[begin : begin + _PIECE_BYTES]

        headers = {"Content-Length": str(size)}
        return self._send(url, time_s, method="PUT", headers=headers, data=pieces() if size else None)

    def _send(self, url: str, time_s: float, **fields: Any) -> Any:
        request = self._awsrequest.AWSRequest(url=url, **fields, stream_output=True).prepare()
        request.context["read_timeout"] = time_s
        try:
            return self._session.send(request)
        except self._exceptions.ReadTimeoutError:
            raise TimeoutError from None
        except self._exceptions.BotoCoreError as error:
            if isinstance(getattr(error.kwargs.get("error"), "args", (None,))[-1], TimeoutError):
                raise TimeoutError from None  # of the connection, while it was sent
            # Its text goes to logs and records, and the whole URL lets anybody read the object for a while.
            raise type(error)(**{**error.kwargs, "endpoint_url": url.partition("?")[0]}) from None

    def error(self, answer: Any, operation: str) -> Exception:
        """What botocore would raise for an answer that is an error."""
        text = answer.raw.read().decode(errors="replace")
        found = {name: re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in ("Code", "Message")}
        fields = {name: match[1] if match else str(answer.status_code) for name, match in found.items()}
        status = {"HTTPStatusCode": answer.status_code}
        return self._exceptions.ClientError({"Error": fields, "ResponseMetadata": status}, operation)

    def receive(self, raw: Any, out: memoryview, end: float) -> int:
        """Fill `out` from a connection, by `end`; fewer bytes if it is cut off."""
        at = 0
        try:
            while at < len(out):
                # Not a whole piece if less has arrived: a line on which only drops arrive must meet the deadline.
                piece = raw.read1(min(_PIECE_BYTES, len(out) - at))
                if not piece:
                    break
                out[at : at + len(piece)] = piece
                at += len(piece)
                if at < len(out) and time.monotonic() >= end:
                    raise TimeoutError
        except self._transport.ReadTimeoutError as error:
            raise TimeoutError from error
        except self._transport.HTTPError as error:
            raise ConnectionError(str(error)) from error
        return at
