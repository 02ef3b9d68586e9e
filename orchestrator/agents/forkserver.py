"""An agent's side of a fork server, `orchestrator/agents/forking.py`, which forks its trainers in milliseconds."""

from __future__ import annotations

import os
import platform
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from subprocess import Popen, TimeoutExpired

from orchestrator.agents.stop import Stop
from orchestrator.coordination.watchdog import BEAT_S, STOPPED_LIMIT_S
from orchestrator.errors import StartError
from orchestrator.messages.attempts import ChildEnded, ImportFailed
from orchestrator.processes import parent

_COMMAND = (sys.executable, "-m", "orchestrator.agents.forking")
_FIND_S = 1.0
"""Seconds to wait for a shared fork server: it may be a little later than the agent."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 60.0
"""Before one that has died is started again. If it dies at once, again and again, it may do so seldom."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a trainer has of the process that asks for it; its standard output and error are the first two handles."""

    environment: Mapping[str, str]
    folder: str


@dataclass(frozen=True)
class Fork:
    """Start a trainer that owns so many file descriptors, which follow. Answered with its process id."""

    num_handles: int
    surroundings: Surroundings | None
    """None: those of the fork server."""


@dataclass(frozen=True)
class Signal:
    """Send a trainer a signal, if it still runs."""

    pid: int
    number: int


class Keeper:
    """Has a fork server that the agents of this machine find under a name."""

    def __init__(self, name: str, preload: Sequence[str]) -> None:
        """Args: preload: as for `ForkServer.start`."""
        self._name = name
        self._preload = preload
        self._closed = threading.Event()

    def start(self) -> None:
        """Start it.

        Raises:
            OSError: the name is taken, by one that has outlived its keeper: agents still use it.
        """
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(_address(self._name))
            listener.listen(1024)
            self._end, theirs = socket.socketpair()
            with theirs:
                handles = (theirs.fileno(), listener.fileno())
                # Not in the folder of this process: what lies there could be taken for a module.
                self.process = Popen([*_COMMAND, *map(str, handles), *self._preload], pass_fds=handles, cwd="/")

    def keep(self) -> None:
        """Start it, and again whenever it dies; for a thread. Ends if its imports fail: agents report that."""
        pause_s = _FIRST_PAUSE_S
        while not self._closed.is_set():
            began = time.monotonic()
            with suppress(OSError):
                self.start()
                if self._closed.is_set():  # meanwhile
                    self._end.close()
                if self._outlive() == 0:
                    return
                self._end.close()
            if time.monotonic() - began > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            self._closed.wait(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def _outlive(self) -> int:
        """Wait for its end, and bring that about if somebody has stopped it: agents look only at one they know.

        They do from its first fork on. One that is stopped before, or between two groups, would keep them waiting.
        """
        stop = Stop()
        while True:
            with suppress(TimeoutExpired):
                return self.process.wait(BEAT_S)
            if stop.lasts_s(self.process.pid) >= STOPPED_LIMIT_S:
                self.process.kill()

    def close(self) -> None:
        """Let it end when the last agent has gone."""
        self._closed.set()
        self._end.close()


def open_fork_server(name: str, preload: Sequence[str]) -> ForkServer:
    """The fork server that is shared under `name`; without one, one of this process's own."""
    end = time.monotonic() + _FIND_S
    while True:
        shared = socket.socket(socket.AF_UNIX)
        try:
            shared.connect(_address(name))
            if same_user(shared):
                return ForkServer(Connection(shared.detach()))
        except OSError:
            pass  # it is not there, or not yet
        shared.close()
        if time.monotonic() > end:
            return ForkServer.start(preload)
        time.sleep(0.05)


def _address(name: str) -> str:
    """Abstract, so it is no file that could stay behind; and no file that says who may connect: see `same_user`."""
    return f"\0unbroken-{name}"


def same_user(end: socket.socket) -> bool:
    """Whether this user runs the process at the other end, by the kernel's word: it may have anything run here."""
    credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user == os.getuid()


class ForkServer:
    """The agent's side."""

    def __init__(self, connection: Connection, process: Popen[bytes] | None = None) -> None:
        """Args: process: at the other end, if it is this agent's own."""
        self._process = process
        self._pid = process.pid if process else None
        """At the other end; of a shared one known from its first fork on."""
        self._stop = Stop()
        self._look_at = 0.0
        self.connection = connection
        """Delivers `ChildEnded`; end of file when the fork server itself has died."""

    @staticmethod
    def start(preload: Sequence[str]) -> ForkServer:
        """Start a process of this agent's own; it imports the modules named in `preload` before it answers.

        Args:
            preload: `module` or `module:attribute`, the latter for packages that import their parts lazily.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = Popen([*_COMMAND, str(theirs.fileno()), "-1", *preload], pass_fds=[theirs.fileno()])
        return ForkServer(Connection(ours.detach()), process)

    def fork(self, *handles: int) -> int:
        """Start a trainer that owns duplicates of these file descriptors. Returns its process id.

        Raises:
            StartError: the fork server can not import what trainers need, or has died.
        """
        surroundings = None
        if self._process is None:
            surroundings = Surroundings(environment=dict(os.environ), folder=os.getcwd())
            handles = (1, 2, *handles)
        with suppress(BrokenPipeError, ConnectionResetError):  # what it said before it died says more
            self.connection.send(Fork(len(handles), surroundings))
            for handle in handles:
                send_handle(self.connection, handle, None)
        while not isinstance(answer := self._hear(), int):
            continue  # the end of an earlier child, already known from its pipe
        self._pid = self._pid or parent(answer)
        return answer

    def hear(self) -> ChildEnded:
        """What `connection` delivers next.

        Raises:
            StartError: as for `fork`.
        """
        answer = self._hear()
        assert isinstance(answer, ChildEnded), answer
        return answer

    def look(self) -> None:
        """End the fork server, and its trainers with it, if somebody has stopped it. Call often."""
        if (now := time.monotonic()) < self._look_at:
            return
        self._look_at = now + BEAT_S / 2
        if self._stop.lasts_s(self._pid) >= STOPPED_LIMIT_S:
            assert self._pid is not None
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _hear(self) -> ChildEnded | int:
        while not self.connection.poll(BEAT_S):
            self.look()
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            status = "" if self._process is None else f" with status {self._process.wait()}"
            raise StartError(f"the process that trainers are forked from ended{status}") from error
        if isinstance(answer, ImportFailed):
            last = answer.trace.strip().splitlines()[-1]
            raise StartError(
                f"a trainer can not be started on {platform.node()}, its imports fail: {last}", details=answer.trace
            )
        return answer

    def signal(self, pid: int, number: int) -> None:
        """Send a trainer a signal, if it still runs. The fork server does it, as it alone knows whose the id is."""
        with suppress(BrokenPipeError):  # it has died, and its trainers with it
            self.connection.send(Signal(pid, number))

    def close(self) -> None:
        """End this agent's trainers, and the fork server if it is its own."""
        self.connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
