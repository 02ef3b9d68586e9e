"""The hub alone, with connections that are only messages."""

from __future__ import annotations

import socket
import threading
from multiprocessing.connection import Pipe
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import greeting
from orchestrator.coordination.hub import Hub, Wire, connect
from orchestrator.messages.attempts import Joined
from orchestrator.messages.liveness import Beat

WORLD_SIZE = 6


class Listener:
    """In the place of a coordinator: remembers what it hears, and ends when it has heard enough."""

    def __init__(self, num_messages: int) -> None:
        self.heard: list[tuple[int, object]] = []
        self.lost: list[tuple[int, str]] = []
        self.ended = threading.Event()
        self.outcome: Any = None
        self.wait_s = None
        self.chores: Any = None
        self._num_messages = num_messages

    def handle(self, rank: int, message: object) -> None:
        self.heard.append((rank, message))
        if len(self.heard) == self._num_messages:
            self.outcome = SimpleNamespace()
            self.ended.set()

    def agent_lost(self, rank: int, why: str) -> None:
        self.lost.append((rank, why))
        self.ended.set()

    def tick(self) -> None: ...

    def broken(self, error: BaseException) -> None:
        self.lost.append((-1, repr(error)))
        self.ended.set()


def start(listener: Listener, strangers: list[socket.socket] | None = None) -> list[Wire]:
    """Args: strangers: gets one that was there first."""
    results, listener.chores = Pipe(duplex=False)  # the other end stays open
    hub = Hub("127.0.0.1", b"key", WORLD_SIZE)
    hub.start(lambda send: listener, results)  # type: ignore[arg-type]
    if strangers is not None:
        strangers.append(socket.create_connection(hub.address))
    return [connect(hub.address, b"key", rank) for rank in range(WORLD_SIZE)]


def test_what_a_message_costs_does_not_depend_on_the_number_of_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, fileno = [], Wire.fileno
    monkeypatch.setattr(Wire, "fileno", lambda wire: asked.append(wire) or fileno(wire))
    listener = Listener(WORLD_SIZE + 30)
    wires = start(listener)
    for index in range(30):
        wires[index % 3].send(Beat(attempt=index))
    assert listener.ended.wait(30) and listener.lost == []
    assert [message for _, message in listener.heard[:WORLD_SIZE]] == [Joined(rank=r) for r in range(WORLD_SIZE)]
    assert sorted(message.attempt for _, message in listener.heard[WORLD_SIZE:]) == list(range(30))
    assert len(asked) == WORLD_SIZE, "every connection is registered once"


def test_a_closed_connection_is_a_lost_agent() -> None:
    listener = Listener(1000)
    wires = start(listener)
    wires[4].close()
    assert listener.ended.wait(30) and listener.lost == [(4, "its connection is closed")]


def test_a_stranger_that_says_nothing_keeps_nobody_waiting_and_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "_GREETING_S", 0.1)
    listener, strangers = Listener(WORLD_SIZE), list[socket.socket]()
    start(listener, strangers)
    assert listener.ended.wait(30) and listener.lost == []
    with strangers[0] as stranger:
        stranger.settimeout(30)
        while stranger.recv(4096):  # the challenge
            continue
