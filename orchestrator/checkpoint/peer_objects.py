"""Objects in the memory of several nodes: what one of them held is there as long as one of its two holders is.

A shard lies on the node of the rank that wrote it and on the next one in the ring; everything small (claims, manifests,
marks) lies on all of them. Of several creators of a key, the first living node of the ring decides who was first.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from orchestrator.checkpoint.backend import Backend
from orchestrator.checkpoint.peer_server import receive
from orchestrator.checkpoint.store import Store

_CONNECT_S = 5.0
_SILENCE_S = 20.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 15.0, 240.0
"""For so long a node that has failed is not asked; twice as long each time, until it answers."""
_COPIES = 2


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One node's memory."""

    node: str
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class PeerRing:
    """The nodes that keep objects for each other, ordered by name, and what proves that one belongs to them."""

    peers: tuple[Peer, ...]
    key: bytes
    home: str = ""
    """The node of whoever uses it."""

    def open(self) -> Store:
        """A store of it, for the process that opens it."""
        return Store(f"peer://{len(self.peers)}-nodes", "", PeerObjects(self))


class PeerObjects(Backend):
    """A backend of `Store`. A node that does not answer is left out for a while.

    What it missed meanwhile does it no harm: a key counts if any node has it. What was deleted meanwhile may come back
    with it: older checkpoints, which are superfluous once more, or quarantined once more.
    """

    kind = "peer"

    def __init__(self, ring: PeerRing) -> None:
        nodes = sorted(ring.peers, key=lambda peer: peer.node)
        self._nodes = [_Node(peer, ring.key) for peer in nodes]
        names = [peer.node for peer in nodes]
        self._home = names.index(ring.home) if ring.home in names else 0

    def read(self, path: str, begin: int | None, end: int | None, timeout_s: float) -> bytes:
        return self._first(path, lambda node: node.read(path, begin, end))

    def read_into(self, path: str, begin: int, outs: Sequence[memoryview], timeout_s: float) -> int:
        return self._first(path, lambda node: node.read_into(path, begin, outs))

    def write(self, path: str, parts: Sequence[memoryview]) -> None:
        copies, failure = 0, ConnectionError("no peer answers")
        for node in self._nearest():
            try:
                node.put("write", path, parts)
            except ConnectionError as error:  # lost just now: the next one takes its place
                failure = error
            else:
                copies += 1
                if copies == _COPIES:
                    return
        if not copies:
            raise failure

    def create_once(self, path: str, data: bytes, timeout_s: float) -> None:
        if any(size is not None for size in self._all("size", path)):
            raise FileExistsError(path)  # a node that joined late, and may be the first, does not know it
        taken: list[bool] = []
        for node in self._living():
            with suppress(ConnectionError):  # lost just now: the next one decides
                done = node.put("write" if taken else "create", path, [memoryview(data)])
                taken.append(not done)
                if not done:
                    break
        if not taken:
            raise ConnectionError("no peer answers")
        if any(taken):
            raise FileExistsError(path)

    def size(self, path: str) -> int:
        return self._first(path, lambda node: node.ask("size", path))

    def list(self, path: str) -> list[str]:
        return sorted({name for names in self._all("list", path) for name in names})

    def delete(self, path: str) -> None:
        self._all("delete", path)

    def _living(self) -> list[_Node]:
        living = [node for node in self._nodes if not node.lost]
        if not living:
            raise ConnectionError(f"none of {len(self._nodes)} peers answers")
        return living

    def _nearest(self) -> list[_Node]:
        """Those that answer, from this one on: all asking the first for everything would be the square of the work."""
        self._living()
        return [node for node in self._nodes[self._home :] + self._nodes[: self._home] if not node.lost]

    def _first(self, path: str, ask: Callable[[_Node], Any]) -> Any:
        """The answer of the nearest node that has it."""
        for node in self._nearest():
            with suppress(ConnectionError, TimeoutError):
                if (answer := ask(node)) is not None:
                    return answer
        raise FileNotFoundError(path)

    def _all(self, verb: str, path: str) -> list[Any]:
        answers = []
        for node in self._living():
            with suppress(ConnectionError, TimeoutError):
                answers.append(node.ask(verb, path))
        return answers


class _Node:
    """A client, with one connection for each thread that uses it."""

    def __init__(self, peer: Peer, key: bytes) -> None:
        self._peer = peer
        self._key = key
        self._local = threading.local()
        self._again_at = 0.0
        self._pause_s = _FIRST_PAUSE_S

    @property
    def lost(self) -> bool:
        """It has failed, and is not asked for now."""
        return time.monotonic() < self._again_at

    def read(self, path: str, begin: int | None, end: int | None) -> bytes | None:
        def receive_it(raw: socket.socket, connection: Connection) -> bytes | None:
            connection.send(("read", path, begin, end))
            size = connection.recv()
            if size is None:
                return None
            data = bytearray(size)
            receive(raw, memoryview(data))
            return bytes(data)

        return self._call(receive_it)

    def read_into(self, path: str, begin: int, outs: Sequence[memoryview]) -> int | None:
        def receive_it(raw: socket.socket, connection: Connection) -> int | None:
            connection.send(("read", path, begin, begin + sum(map(len, outs))))
            size = left = connection.recv()
            if size is not None:
                for out in outs:
                    receive(raw, out[:left])
                    left -= min(left, len(out))
            return size

        return self._call(receive_it)

    def put(self, verb: str, path: str, parts: Sequence[memoryview]) -> bool:
        def send_it(raw: socket.socket, connection: Connection) -> bool:
            connection.send((verb, path, sum(map(len, parts))))
            for part in parts:
                raw.sendall(part)
            return connection.recv()

        return self._call(send_it)

    def ask(self, verb: str, path: str) -> Any:
        def ask_it(raw: socket.socket, connection: Connection) -> Any:
            connection.send((verb, path))
            return connection.recv()

        return self._call(ask_it)

    def _call(self, exchange: Callable[[socket.socket, Connection], Any]) -> Any:
        try:
            if not hasattr(self._local, "wire"):
                self._local.wire = _Wire(self._peer, self._key)
            answer = exchange(self._local.wire.raw, self._local.wire.connection)
        except (OSError, EOFError, AuthenticationError) as error:
            self._local.__dict__.pop("wire", None)
            if not self.lost:  # several threads may find out at once
                self._again_at = time.monotonic() + self._pause_s
                self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s)
            raise ConnectionError(f"the memory of {self._peer.host}:{self._peer.port} is gone ({error!r})") from error
        self._pause_s = _FIRST_PAUSE_S
        return answer


class _Wire:
    """A connection, for pickled requests and raw bytes; closed when its thread ends."""

    def __init__(self, peer: Peer, key: bytes) -> None:
        self.raw = socket.create_connection((peer.host, peer.port), timeout=_CONNECT_S)
        # Not by `__del__`: if this is found with a trace that refers to it, the socket may be found first, unclosed.
        weakref.finalize(self, self.raw.close)
        self.raw.settimeout(None)
        limit = struct.pack("ll", int(_SILENCE_S), 0)  # a node that is cut off says nothing, not even goodbye
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = Connection(self.raw.dup().detach())
        answer_challenge(self.connection, key)
        deliver_challenge(self.connection, key)
