"""The wire between rank 0's coordinator and the agents: one authenticated TCP connection an agent."""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Pipe, wait
from typing import cast

from orchestrator.coordination.coordinator import Coordinator
from orchestrator.coordination.halting import HaltOrder
from orchestrator.coordination.watchdog import BEAT_S, SILENT_LIMIT_S, Silence
from orchestrator.greeting import greet
from orchestrator.messages.attempts import Joined
from orchestrator.messages.liveness import Beat


class Wire:
    """A connection that several threads may send on."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        with socket.socket(fileno=connection.fileno()) as wrapped:
            # Small messages that somebody waits for must not be held back to be sent together.
            wrapped.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wrapped.detach()

    def send(self, message: object) -> None:
        with self._sending:
            self._connection.send(message)

    def recv(self) -> object:
        return self._connection.recv()

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        with self._sending:  # not under a thread that is sending: the number may be another file's by then
            self._connection.close()


def connect(address: tuple[str, int], key: bytes, rank: int) -> Wire:
    """An agent's end of the wire."""
    wire = Wire(cast(Connection, Client(address, authkey=key)))
    wire.send(Joined(rank=rank))
    return wire


class Hub:
    """Accepts one connection of each agent and feeds the coordinator, in a thread of rank 0's agent."""

    def __init__(self, host: str, key: bytes, world_size: int) -> None:
        self._listener = socket.create_server((host, 0), backlog=1024)
        self.address = (host, int(self._listener.getsockname()[1]))
        self._key = key
        self._world_size = world_size
        self._guests: queue.SimpleQueue[tuple[int, Wire]] = queue.SimpleQueue()
        """Who has just shown to be an agent; each is announced."""
        self._announced, self._announce = Pipe(duplex=False)
        self._agents: dict[int, Wire] = {}
        self._silences: dict[int, Silence] = {}
        self._look_at = 0.0
        self._lost = False
        self._over = threading.Event()
        self._orders, self._order = Pipe(duplex=False)
        self._ordering = threading.Lock()

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
        threading.Thread(target=self._beat, name="hub-beat", daemon=True).start()

    def order(self, order: HaltOrder) -> None:
        """Pass an order to the coordinator. From any thread."""
        with self._ordering:
            self._order.send(order)

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
            self._listener.close()
            for rank in range(self._world_size):
                coordinator.handle(rank, Joined(rank=rank))
            now = time.monotonic()
            self._silences = {rank: Silence(now) for rank in self._agents}
            with selectors.DefaultSelector() as sources:
                # Once and for all: what one message costs must not grow with the number of agents.
                for source in (self._orders, self._results):
                    sources.register(source, selectors.EVENT_READ)
                for rank, agent in self._agents.items():
                    sources.register(agent, selectors.EVENT_READ, rank)
                while coordinator.outcome is None and not self._lost:
                    self._turn(coordinator, sources)
        except BaseException as error:
            coordinator.broken(error)
        finally:
            # After a loss this ends all agents with an error, which has the group replaced.
            for agent in list(self._agents.values()):
                agent.close()
            self._agents = {}
            self._listener.close()
            self._over.set()

    def _admit(self) -> None:
        for source in wait([self._listener, self._announced]):
            if source is self._announced:
                self._announced.recv_bytes()
                rank, agent = self._guests.get()
                self._agents[rank] = agent
                continue
            with contextlib.suppress(OSError):  # it is gone again
                guest, _ = self._listener.accept()
                threading.Thread(target=self._greet, args=(guest,), name="greeting", daemon=True).start()

    def _greet(self, guest: socket.socket) -> None:
        """Find out who it is. In a thread of its own: a stranger that says nothing must keep nobody waiting."""
        with guest:
            try:
                connection = greet(guest, self._key)
                joined = connection.recv()
            except (AuthenticationError, EOFError, OSError):
                return  # a stranger, or an agent that died: whoever placed the agents replaces the group
        assert isinstance(joined, Joined)
        self._guests.put((joined.rank, Wire(connection)))
        self._announce.send_bytes(b"1")  # so little that threads do not get into each other's way

    def _turn(self, coordinator: Coordinator, sources: selectors.BaseSelector) -> None:
        for key, _ in sources.select(BEAT_S if (due_s := coordinator.wait_s) is None else due_s):
            if key.fileobj is self._orders:
                coordinator.take_order(self._orders.recv())
                continue
            if key.fileobj is self._results:
                coordinator.handle(0, self._results.recv())
                continue
            rank = key.data
            try:
                message = self._agents[rank].recv()
            except (EOFError, OSError):
                self._lose(coordinator, rank, "its connection is closed")
                return
            self._silences[rank].heard()
            coordinator.handle(rank, message)
        if (now := time.monotonic()) >= self._look_at:
            self._look_at = now + BEAT_S
            for rank, silence in self._silences.items():
                if silence.passed(now) > SILENT_LIMIT_S:
                    self._lose(coordinator, rank, f"silent for {SILENT_LIMIT_S:g} s")
                    return
        coordinator.tick()

    def _lose(self, coordinator: Coordinator, rank: int, why: str) -> None:
        self._lost = True
        coordinator.agent_lost(rank, why)

    def _beat(self) -> None:
        """Tell the agents that this process runs, also while the coordinator waits for storage."""
        while not self._over.wait(BEAT_S):
            for agent in list(self._agents.values()):
                with contextlib.suppress(OSError):  # closed, or about to be found closed
                    agent.send(Beat())
