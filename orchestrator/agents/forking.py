"""A warm process that has imported what a trainer needs, and forks one in milliseconds.

Run as `python -m orchestrator.agents.forking FD LISTENER MODULE...`. It stays single-threaded, so forking it is safe.
An agent sends it file descriptors, gets a process id back, and is told when that process ends. There are two kinds:

- of one agent, started by it, at the other end of FD; LISTENER is -1. It ends with the agent.
- shared by all agents of a node, one group after the other: they come to LISTENER. Whoever keeps it, at the other end
  of FD, says nothing. It ends when the keeper and the last agent are gone.

A trainer dies with this process (parent-death signal), and with its agent (end of that connection).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from types import ModuleType

from orchestrator.agents.forkserver import Signal, Surroundings, same_user
from orchestrator.agents.trainer_probe import STACK_SIGNAL
from orchestrator.messages.attempts import ChildEnded, ImportFailed

_PR_SET_PDEATHSIG = 1


class _Server:
    """The other side."""

    def __init__(self, keeper: Connection, listener: socket.socket | None) -> None:
        """Args: keeper: without a listener, the one client."""
        self._clients = set() if listener else {keeper}
        self._keeper = keeper if listener else None
        self._listener = listener
        self._children: dict[int, Connection] = {}
        self._awake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self, preload: Sequence[str]) -> None:
        """Until nobody needs it any more."""
        try:
            trainer = _import(preload)
        except BaseException:  # a broken package may raise anything, SystemExit too
            self._tell_all(ImportFailed(traceback.format_exc()))
            return
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(STACK_SIGNAL, signal.SIG_IGN)  # it would end a trainer that has only just been forked
        while self._clients or self._keeper:
            lasting = [self._keeper, self._listener] if self._keeper and self._listener else []
            ready = wait([self._awake, *self._clients, *lasting])
            if self._awake in ready:
                os.read(self._awake, 4096)
                self._reap()
            for source in ready:
                if source is self._keeper:
                    self._keeper = None  # it says nothing, so this is its end
                elif source is self._listener:
                    self._admit()
                elif isinstance(source, Connection) and source in self._clients:
                    self._answer(source, trainer)

    def _admit(self) -> None:
        assert self._listener is not None
        client, _ = self._listener.accept()
        if same_user(client):
            self._clients.add(Connection(client.detach()))
        else:
            client.close()

    def _tell_all(self, message: object) -> None:
        if self._listener is not None:
            self._listener.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    self._admit()
        for client in self._clients:
            with suppress(OSError):
                client.send(message)

    def _answer(self, client: Connection, trainer: ModuleType) -> None:
        handles: list[int] = []
        try:
            request = client.recv()
            if isinstance(request, Signal):
                if self._children.get(request.pid) is client:
                    os.kill(request.pid, request.number)
                return
            handles.extend(recv_handle(client) for _ in range(request.num_handles))
        except (EOFError, OSError):  # the latter if the agent left something unread, or died in the middle
            _close(handles)
            self._let_go(client)
            return
        parent = os.getpid()
        if pid := os.fork():
            _close(handles)
            self._children[pid] = client
            with suppress(OSError):  # its end is about to be read
                client.send(pid)
            return
        try:
            self._leave_behind()
            _die_with(parent)
            os._exit(trainer.main(*_settle(handles, request.surroundings)))
        finally:
            os._exit(1)

    def _let_go(self, client: Connection) -> None:
        """An agent is gone: so must its trainers be."""
        self._clients.discard(client)
        client.close()
        for pid, whose in self._children.items():
            if whose is client:
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            client = self._children.pop(pid, None)  # None: what an import has started
            if client is not None and client in self._clients:
                with suppress(OSError):  # its end is about to be read
                    client.send(ChildEnded(pid, os.waitstatus_to_exitcode(status)))

    def _leave_behind(self) -> None:
        """In the child: what belongs to the parent."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (self._keeper, self._listener, *self._clients):
            if end is not None:
                end.close()
        os.close(self._awake)
        os.close(self._wake)


def _import(preload: Sequence[str]) -> ModuleType:
    for name in preload:
        module, _, attribute = name.partition(":")
        imported = importlib.import_module(module)
        if attribute:
            getattr(imported, attribute)
    return importlib.import_module("orchestrator.agents.trainer_process")  # pulls in what is not preloaded yet


def _close(handles: Sequence[int]) -> None:
    for handle in handles:
        os.close(handle)


def _settle(handles: Sequence[int], surroundings: Surroundings | None) -> Sequence[int]:
    """In the child: take over the surroundings. Returns the other handles."""
    if surroundings is None:
        return handles
    out, err, *others = handles
    for theirs, own in ((out, 1), (err, 2)):
        os.dup2(theirs, own)
        os.close(theirs)
    os.environ.update(surroundings.environment)
    with suppress(OSError):  # somebody has removed it: nothing of ours is found by a relative path
        os.chdir(surroundings.folder)
    return others


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, also if that happened before the call."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main(keeper: str, listener: str, *preload: str) -> None:
    """Serve."""
    for handle in {keeper, listener} - {"-1"}:  # not for what an import starts: it would hold the name, and may live on
        os.set_inheritable(int(handle), False)
    shared = socket.socket(fileno=int(listener)) if listener != "-1" else None
    _Server(Connection(int(keeper)), shared).serve(preload)


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Leave without running the exit handlers of everything that was imported for the children.
    os._exit(0)
