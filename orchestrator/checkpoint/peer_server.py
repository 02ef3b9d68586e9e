"""Objects in the memory of one node, served to the others over TCP.

A request is a pickled tuple on an authenticated connection; the bytes of an object follow it, or its answer, as they
are. An object appears when the last byte of it has arrived, so a writer that dies leaves nothing.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from typing import Any

from orchestrator.greeting import greet

_PAUSE_S = 0.1
_KEEPALIVE = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 60,  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 20,  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
}


class PeerServer:
    """Serves until its process ends."""

    def __init__(self, host: str, key: bytes) -> None:
        """Args: key: whoever connects has to know it."""
        self._key = key
        self._objects: dict[str, bytearray] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="peer-memory", daemon=True).start()

    def close(self) -> None:
        """Serve nobody any more and forget everything."""
        self._closed.set()
        with suppress(OSError):  # wakes who accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._objects.clear()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                if self._closed.wait(_PAUSE_S):
                    return
                continue  # too many open files, say: that passes
            # Or the thread of a client whose machine lost its power would wait for it for ever.
            for option, value in _KEEPALIVE.items():
                end.setsockopt(*option, value)
            threading.Thread(target=self._serve, args=(end,), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        with end, suppress(AuthenticationError, EOFError, OSError):  # a stranger, or somebody who has died
            with greet(end, self._key) as connection:
                while not self._closed.is_set():
                    self._answer(end, connection, *connection.recv())

    def _answer(self, end: socket.socket, connection: Connection, verb: str, path: str, *rest: Any) -> None:
        if verb in ("write", "create"):
            data = bytearray(rest[0])
            receive(end, memoryview(data))
            connection.send(self._put(verb, path, data))
        elif verb == "read":
            with self._lock:
                data = self._objects.get(path)
            piece = None if data is None else memoryview(data)[rest[0] : rest[1]]
            connection.send(None if piece is None else len(piece))
            if piece is not None:
                end.sendall(piece)
        else:
            connection.send(self._look(verb, path))

    def _put(self, verb: str, path: str, data: bytearray) -> bool:
        """Whether it was done; False: a `create` found the key taken."""
        with self._lock:
            if verb == "create" and path in self._objects:
                return False
            self._objects[path] = data
            return True

    def _look(self, verb: str, path: str) -> Any:
        with self._lock:
            if verb == "delete":
                return self._objects.pop(path, None) is not None
            if verb == "size":
                return None if (data := self._objects.get(path)) is None else len(data)
            assert verb == "list", verb
            folder = f"{path}/"
            return list({key[len(folder) :].split("/")[0] for key in self._objects if key.startswith(folder)})


def receive(end: socket.socket, view: memoryview) -> None:
    """Fill `view`.

    Raises:
        OSError: the other side is gone, or silent for too long.
    """
    while len(view):
        count = end.recv_into(view)
        if not count:
            raise ConnectionResetError("the other side closed the connection")
        view = view[count:]
