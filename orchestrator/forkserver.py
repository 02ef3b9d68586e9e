"""A warm process on each worker: it has imported what a trainer needs, and forks one in milliseconds.

Run as `python -m orchestrator.forkserver FD MODULE...` by the agent. It stays single-threaded, so forking it is safe,
and holds no state: the agent sends a file descriptor set, gets a process id back, and is told when that process ends.
The trainers die with it (parent-death signal), and it dies with the agent (end of the control connection).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from subprocess import Popen

from orchestrator.errors import StartError
from orchestrator.messages import ChildEnded, ImportFailed

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Fork:
    num_handles: int


@dataclass(frozen=True)
class _Signal:
    pid: int
    number: int


class ForkServer:
    """The agent's side."""

    def __init__(self, preload: Sequence[str]) -> None:
        """Start the process; it imports the modules named in `preload` before it answers.

        Args:
            preload: `module` or `module:attribute`, the latter for packages that import their parts lazily.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "orchestrator.forkserver", str(theirs.fileno()), *preload]
            self._process = Popen(command, pass_fds=[theirs.fileno()])
        self.connection = Connection(ours.detach())
        """Delivers `ChildEnded`; end of file when the fork server itself has died."""

    def fork(self, *handles: int) -> int:
        """Start a trainer that owns duplicates of these file descriptors. Returns its process id.

        Raises:
            StartError: the fork server can not import what trainers need, or has died.
        """
        with suppress(BrokenPipeError, ConnectionResetError):  # what it said before it died says more
            self.connection.send(_Fork(len(handles)))
            for handle in handles:
                send_handle(self.connection, handle, self._process.pid)
        while not isinstance(answer := self._hear(), int):
            continue  # the end of an earlier child, already known from its pipe
        return answer

    def hear(self) -> ChildEnded:
        """What `connection` delivers next.

        Raises:
            StartError: as for `fork`.
        """
        answer = self._hear()
        assert isinstance(answer, ChildEnded), answer
        return answer

    def _hear(self) -> ChildEnded | int:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            status = self._process.wait()
            raise StartError(f"the process that trainers are forked from ended with status {status}") from error
        if isinstance(answer, ImportFailed):
            last = answer.trace.strip().splitlines()[-1]
            raise StartError(
                f"a trainer can not be started on {platform.node()}, its imports fail: {last}", details=answer.trace
            )
        return answer

    def signal(self, pid: int, number: int) -> None:
        """Send a trainer a signal, if it still runs. The fork server does it, as it alone knows whose the id is."""
        with suppress(BrokenPipeError):  # it has died, and its trainers with it
            self.connection.send(_Signal(pid, number))

    def close(self) -> None:
        """End the fork server and every trainer."""
        self.connection.close()
        self._process.kill()
        self._process.wait()


def _serve(connection: Connection, preload: Sequence[str]) -> None:
    try:
        for name in preload:
            module, _, attribute = name.partition(":")
            imported = importlib.import_module(module)
            if attribute:
                getattr(imported, attribute)
        trainer = importlib.import_module("orchestrator.trainer_process")  # pulls in what is not preloaded yet
    except BaseException:  # a broken package may raise anything, SystemExit too
        connection.send(ImportFailed(traceback.format_exc()))
        return
    awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    children: set[int] = set()
    while True:
        if awake in wait([connection, awake]):
            os.read(awake, 4096)
            _reap(connection, children)
        if not connection.poll():
            continue
        try:
            request = connection.recv()
        except (EOFError, ConnectionResetError):  # the latter if the agent left something unread
            return
        if isinstance(request, _Signal):
            if request.pid in children:
                os.kill(request.pid, request.number)
            continue
        handles = [recv_handle(connection) for _ in range(request.num_handles)]
        parent = os.getpid()
        if pid := os.fork():
            for handle in handles:
                os.close(handle)
            children.add(pid)
            connection.send(pid)
        else:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for handle in (connection.fileno(), awake, wake):
                os.close(handle)
            _die_with(parent)
            os._exit(trainer.main(*handles))


def _reap(connection: Connection, children: set[int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        children.discard(pid)
        connection.send(ChildEnded(pid, os.waitstatus_to_exitcode(status)))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, also if that happened before the call."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    # The requests are pickled under this module's real name, so that is the one to run.
    importlib.import_module("orchestrator.forkserver")._serve(Connection(int(sys.argv[1])), sys.argv[2:])
    # Leave without running the exit handlers of everything that was imported for the children.
    os._exit(0)
