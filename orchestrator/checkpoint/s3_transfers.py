"""Ranges of objects in S3, each read by the thread that asks for it, straight to where it belongs.

asyncio would read all connections in one thread and copy every byte three times on the way. botocore signs a request,
and the session that it uses itself, with all that it knows of certificates and proxies, sends it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from typing import Any

from orchestrator.checkpoint.s3_requests import S3Requests, transfer_s

_CONNECT_S = 10.0
_PIECE_BYTES = 256 << 10
_MAX_CONNECTIONS = 32
_VALID_S = 900  # of a signature, so that a clock may be a little behind; a request is sent at once


class S3Downloads:
    """Its calls may come from any thread of the process that made it."""

    def __init__(self, requests: S3Requests) -> None:
        self._requests = requests
        self._lock = threading.Lock()
        self._http: _Http | None = None

    def read_into(self, bucket: str, key: str, begin: int, outs: Sequence[memoryview], timeout_s: float) -> int:
        """Fill `outs`, one after the other, from byte `begin` on; how many bytes there were.

        Raises what botocore raises, TimeoutError, or OSError.
        """
        return self._requests.repeat_here(lambda time_s: self._try(bucket, key, begin, outs, time_s), timeout_s)

    def _try(self, bucket: str, key: str, begin: int, outs: Sequence[memoryview], time_s: float) -> int:
        end, wanted = time.monotonic() + time_s, sum(map(len, outs))
        url = self._requests.run(self._requests.sign("get_object", _VALID_S, Bucket=bucket, Key=key))
        http = self._connected(url)
        answer = http.get(url, {"Range": f"bytes={begin}-{begin + wanted - 1}"}, time_s)
        try:
            if answer.status_code == 416:
                return 0  # it begins at or after the end
            if answer.status_code not in (200, 206):
                raise http.error(answer)
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

    def _connected(self, url: str) -> _Http:
        with self._lock:
            if self._http is None:
                self._http = _Http(url, self._requests.certificates())
            return self._http


class _Http:
    """botocore's own client. Imported when it is used: a run on a local folder does without."""

    def __init__(self, url: str, certificates: str | bool) -> None:
        from botocore import awsrequest, exceptions, httpsession, utils
        from urllib3 import exceptions as transport

        self._awsrequest, self._exceptions, self._transport = awsrequest, exceptions, transport
        self._session = httpsession.URLLib3Session(
            verify=certificates,  # pyright: ignore[reportArgumentType]  a path is as good as True, see botocore
            proxies=utils.get_environ_proxies(url),
            timeout=(_CONNECT_S, None),
            max_pool_connections=_MAX_CONNECTIONS,
        )

    def get(self, url: str, headers: dict[str, str], time_s: float) -> Any:
        """An answer whose body is still to be received. Each wait for something to arrive is limited to `time_s`."""
        request = self._awsrequest.AWSRequest(method="GET", url=url, headers=headers, stream_output=True).prepare()
        request.context["read_timeout"] = time_s
        try:
            return self._session.send(request)
        except self._exceptions.ReadTimeoutError:
            raise TimeoutError from None
        except self._exceptions.BotoCoreError as error:
            # Its text goes to logs and records, and the whole URL lets anybody read the object for a while.
            raise type(error)(**{**error.kwargs, "endpoint_url": url.partition("?")[0]}) from None

    def error(self, answer: Any) -> Exception:
        """What botocore would raise for an answer that is an error."""
        text = answer.raw.read().decode(errors="replace")
        found = {name: re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in ("Code", "Message")}
        fields = {name: match[1] if match else str(answer.status_code) for name, match in found.items()}
        status = {"HTTPStatusCode": answer.status_code}
        return self._exceptions.ClientError({"Error": fields, "ResponseMetadata": status}, "GetObject")

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
