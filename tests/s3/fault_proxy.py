"""A proxy between an S3 client and its server that does what networks and stores do on a bad day.

It understands HTTP/1.1 just enough to fail at a chosen request and a chosen byte. The Host header is passed on, so
signatures made for the proxy's address stay valid. What it did is in `log`: a test asserts there that its fault fired.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

_CHUNK = 64 << 10


class Kind(Enum):
    ANSWER = "answer an error instead of passing the request on"
    LOSE_ANSWER = "the server does it; the client sees a reset instead of the answer"
    CUT_REQUEST = "reset both sides in the middle of the request's body"
    CUT_ANSWER = "reset both sides in the middle of the answer's body"
    BLACK_HOLE = "take the request and never answer"


@dataclass(kw_only=True)
class Fault:
    """Happens to requests that match, `count` times."""

    kind: Kind
    match: str = ""
    """Regular expression, searched for in `METHOD /path?query`."""
    count: int = 1
    status: int = 503
    code: str = "SlowDown"
    """Of ANSWER."""
    after_bytes: int = 0
    """Of CUT_REQUEST and CUT_ANSWER."""


@dataclass(frozen=True)
class Seen:
    """A request."""

    line: str
    num_bytes: int
    fault: Kind | None


class _Reset(Exception):
    """Ends a connection with RST."""


class FaultProxy:
    """Listens on a port of its own, in a thread of its own."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.faults: list[Fault] = []
        self.log: list[Seen] = []
        self.latency_s = 0.0
        """Before each request is passed on."""
        self.bytes_per_s = float("inf")
        """Per connection and direction."""
        self.num_sent = 0
        """Bytes of request bodies passed on to the server."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._connections: set[asyncio.Task[None]] = set()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def fired(self, kind: Kind) -> int:
        """How often a fault happened."""
        return sum(seen.fault is kind for seen in self.log)

    def calm_down(self) -> None:
        """No faults, no log."""
        self.faults, self.log, self.num_sent = [], [], 0
        self.latency_s, self.bytes_per_s = 0.0, float("inf")

    def close(self) -> None:
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0.01)  # the resets are sent by the loop

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        connection = _Connection(self, reader, writer)
        try:
            connection.upstream = await asyncio.open_connection("127.0.0.1", self._server_port, limit=1 << 20)
            while True:
                await connection.pass_one()
        except (_Reset, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            connection.reset()
        finally:
            self._connections.discard(task)

    def take_fault(self, line: str) -> Fault | None:
        fault = next((fault for fault in self.faults if fault.count > 0 and re.search(fault.match, line)), None)
        if fault is not None:
            fault.count -= 1
        return fault


class _Connection:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self.upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def reset(self) -> None:
        for writer in (self._writer, *((self.upstream[1],) if self.upstream else ())):
            with suppress(OSError):  # it may be gone already
                end = writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def pass_one(self) -> None:
        """One request and its answer."""
        assert self.upstream is not None
        proxy, (reader, writer) = self._proxy, self.upstream
        head = await self._reader.readuntil(b"\r\n\r\n")
        line = head.split(b"\r\n", 1)[0].decode().rsplit(" ", 1)[0]
        size = _length(head) or 0
        fault = proxy.take_fault(line)
        kind = fault.kind if fault else None
        proxy.log.append(Seen(line, size, kind))
        if proxy.latency_s:
            await asyncio.sleep(proxy.latency_s)
        if fault is not None and kind in (Kind.ANSWER, Kind.BLACK_HOLE):
            await self._copy(self._reader, None, size)
            if kind is Kind.BLACK_HOLE:
                await asyncio.Event().wait()
            await self._answer(fault, line)
        writer.write(head)
        await self._copy(self._reader, writer, size, fault.after_bytes if fault and kind is Kind.CUT_REQUEST else None)
        answer = await reader.readuntil(b"\r\n\r\n")
        while answer.startswith(b"HTTP/1.1 100"):
            answer = await reader.readuntil(b"\r\n\r\n")
        if kind is Kind.LOSE_ANSWER:
            raise _Reset
        self._writer.write(answer)
        if not line.startswith("HEAD") and answer.split()[1] not in (b"204", b"304"):
            cut = fault.after_bytes if fault and kind is Kind.CUT_ANSWER else None
            await self._copy_body(reader, answer, cut)
        await self._writer.drain()

    async def _answer(self, fault: Fault, line: str) -> None:
        body = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
        head = f"HTTP/1.1 {fault.status} X\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        if not line.startswith("HEAD"):
            self._writer.write(body)
        await self._writer.drain()
        self._writer.close()
        raise ConnectionError

    async def _copy_body(self, reader: asyncio.StreamReader, head: bytes, cut: int | None) -> None:
        size = _length(head)
        if size is not None:
            await self._copy(reader, self._writer, size, cut)
            return
        assert b"chunked" in head.lower(), head
        while size != 0:
            line = await reader.readuntil(b"\r\n")
            self._writer.write(line)
            size = int(line.split(b";")[0], 16)
            await self._copy(reader, self._writer, size + 2, cut)

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None, size: int, cut: int | None = None
    ) -> None:
        """Args: cut: reset after so many bytes."""
        done = 0
        while done < size:
            data = await reader.read(min(size - done, _CHUNK))
            if not data:
                raise ConnectionError
            if cut is not None and done + len(data) > cut:
                raise _Reset
            done += len(data)
            await asyncio.sleep(len(data) / self._proxy.bytes_per_s)
            if writer is not None:
                writer.write(data)
                await writer.drain()
                self._proxy.num_sent += len(data) if writer is not self._writer else 0


def _length(head: bytes) -> int | None:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else None
