"""A relay before an S3 server that can be made to hold back its answers."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

_HOLD_S = 2.0
"""For how long each piece of an answer is held back."""
_PIECE = 1 << 16


class SlowStore:
    """Listens on loopback, in a thread. The Host header is passed on, so signatures for this address stay valid."""

    def __init__(self, endpoint: str) -> None:
        """Args: endpoint: http://host:port of the server."""
        parts = urlsplit(endpoint)
        assert parts.scheme == "http" and parts.hostname, "others are skipped"
        self._server_address = (parts.hostname, parts.port or 80)
        self._slow_until = 0.0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="slow-store", daemon=True).start()
        listen = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(listen, self._loop).result(10)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def slow_down(self, seconds: float) -> None:
        """Hold back every answer from now on, for so long."""
        self._slow_until = time.monotonic() + seconds

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # either side may go away; the client repeats what it did not get
            from_server, to_server = await asyncio.open_connection(*self._server_address)
            await asyncio.gather(self._copy(reader, to_server, False), self._copy(from_server, writer, True))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: bool) -> None:
        try:
            while data := await reader.read(_PIECE):
                if answers and (left_s := self._slow_until - time.monotonic()) > 0:
                    await asyncio.sleep(min(_HOLD_S, left_s))
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
