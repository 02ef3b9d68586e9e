"""An S3 endpoint that costs next to nothing: it drains what is sent and serves zeros, so what is timed is the client.

It is no store: nothing is kept, no signature is checked. `python -m bench.s3_sink` prints its port and serves.
"""

from __future__ import annotations

import asyncio
import re

_ZEROS = memoryview(bytes(1 << 20))
_BEGUN = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
_ENDED = b'<CompleteMultipartUploadResult><ETag>"1"</ETag></CompleteMultipartUploadResult>'
_OBJECT_BYTES = 256 << 20


class _Sink(asyncio.BufferedProtocol):
    """Receives into one buffer again and again; only heads are looked at."""

    def __init__(self) -> None:
        self._buffer = bytearray(1 << 20)
        self._head = b""
        self._left = 0
        self._answer = b""
        self._zeros = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        at = 0
        while at < nbytes:
            if self._left:
                at_once = min(self._left, nbytes - at)
                self._left -= at_once
                at += at_once
            else:
                self._head += bytes(self._buffer[at:nbytes])
                head, end, rest = self._head.partition(b"\r\n\r\n")
                if not end:
                    return
                at, self._head = nbytes - len(rest), b""
                self._begin(head)
            if not self._left:
                self._transport.write(self._answer)
                for begin in range(0, self._zeros, len(_ZEROS)):
                    self._transport.write(_ZEROS[: self._zeros - begin])

    def _begin(self, head: bytes) -> None:
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        span = re.search(rb"(?i)\r\nrange: *bytes=(\d+)-(\d+)", head)
        self._left, self._zeros = int(length[1]) if length else 0, 0
        if b"xpect: 100" in head:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        method, path = head.split(b" ", 2)[:2]
        body, more, status = b"", b"", b"200 OK"
        if method == b"POST":
            body = _ENDED if b"uploadId" in path else _BEGUN
        size = len(body)
        if method in (b"GET", b"HEAD"):
            size = int(span[2]) - int(span[1]) + 1 if span else _OBJECT_BYTES
            self._zeros = size if method == b"GET" else 0
            if span:
                more, status = b"Content-Range: bytes %s-%s/%d\r\n" % (span[1], span[2], _OBJECT_BYTES), b"206 Partial"
        date = b"Last-Modified: Sat, 21 Nov 2026 10:00:00 GMT\r\n"
        self._answer = b'HTTP/1.1 %s\r\nETag: "1"\r\n' % status + date + more
        self._answer += b"Content-Length: %d\r\n\r\n" % size + body


async def _main() -> None:
    server = await asyncio.get_running_loop().create_server(_Sink, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main())
