"""The wire between rank 0's coordinator and the agents: one authenticated TCP connection an agent."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import cast

from orchestrator.coordinator import Coordinator
from orchestrator.messages import Joined


def connect(address: tuple[str, int], key: bytes, rank: int) -> Connection:
    """An agent's end of the wire."""
    connection = cast(Connection, Client(address, authkey=key))
    _no_delay(connection)
    connection.send(Joined(rank=rank))
    return connection


class Hub:
    """Accepts one connection of each agent and feeds the coordinator, in a thread of rank 0's agent."""

    def __init__(self, host: str, key: bytes, world_size: int) -> None:
        self._listener = Listener((host, 0), backlog=world_size, authkey=key)
        self.address = (host, int(self._listener.address[1]))
        self._world_size = world_size
        self._agents: dict[int, Connection] = {}

    def start(
        self, make_coordinator: Callable[[Callable[[int, object], None]], Coordinator], results: Connection
    ) -> None:
        """Serve until the run has an outcome or this process ends.

        Args:
            make_coordinator: called in the thread with the function that sends to an agent.
            results: delivers what the coordinator's chores have come to.
        """
        self._results = results
        threading.Thread(target=self._serve, args=(make_coordinator,), name="hub", daemon=True).start()

    def _send(self, rank: int, message: object) -> None:
        connection = self._agents.get(rank)
        if connection is None:
            return
        try:
            connection.send(message)
        except OSError:
            pass  # its end of file is about to be read, and reported from there

    def _serve(self, make_coordinator: Callable[[Callable[[int, object], None]], Coordinator]) -> None:
        coordinator = make_coordinator(self._send)
        try:
            while len(self._agents) < self._world_size:
                self._admit()
            for rank in range(self._world_size):
                coordinator.handle(rank, Joined(rank=rank))
            while coordinator.outcome is None:
                self._turn(coordinator)
        except BaseException as error:
            coordinator.broken(error)
        finally:
            for connection in self._agents.values():
                connection.close()
            self._listener.close()

    def _admit(self) -> None:
        try:
            connection = cast(Connection, self._listener.accept())
            _no_delay(connection)
            joined = connection.recv()
        except (AuthenticationError, EOFError, OSError):
            return  # a stranger, or an agent that died: whoever placed the agents replaces the group
        self._agents[joined.rank] = connection

    def _turn(self, coordinator: Coordinator) -> None:
        ranks = {connection: rank for rank, connection in self._agents.items()}
        for connection in wait([*ranks, self._results], timeout=coordinator.wait_s):
            assert isinstance(connection, Connection)
            if connection is self._results:
                coordinator.handle(0, connection.recv())
                continue
            rank = ranks[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):
                del self._agents[rank]
                coordinator.agent_lost(rank)
            else:
                coordinator.handle(rank, message)
        coordinator.tick()


def _no_delay(connection: Connection) -> None:
    """Small messages that somebody waits for must not be held back to be sent together."""
    with socket.socket(fileno=connection.fileno()) as wrapped:
        wrapped.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wrapped.detach()
