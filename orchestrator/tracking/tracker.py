"""The driver's end of the tracking process."""

from __future__ import annotations

import socket
import subprocess
import threading
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.messages.attempts import Event
from orchestrator.tracking.journal import encode
from orchestrator.tracking.process import LOG, MAX_EVENT_BYTES, Start, command
from trainers.errors import ConfigError

_BUFFER_BYTES = 4 * 1024 * 1024  # the kernel allows what net.core.wmem_max says: some hundred events at least
_KEPT_EVENTS = 256
_MAX_STARTS = 10
_CLOSE_TIMEOUT_S = 90.0


class Tracker:
    """Hands every event on. What the kernel's buffer cannot take is dropped and counted: nobody ever waits."""

    def __init__(self, opened: Event, folder: Path, say: Callable[[str], None]) -> None:
        """Start the process.

        Raises:
            ConfigError: the introduction does not fit.

        Args:
            opened: the introduction: what sinks are to know of the run.
            folder: for the journal, the process's log, and what its sinks write.
            say: takes a line for the user, from a thread.
        """
        self._session = uuid.uuid4().hex
        self._number = 0
        self._introduction = encode(opened, self._session, 0)
        if (size := len(self._introduction)) > MAX_EVENT_BYTES:
            raise ConfigError(f"a config of {size} bytes cannot be tracked; at most {MAX_EVENT_BYTES} fit")
        self._sent: deque[bytes] = deque(maxlen=_KEPT_EVENTS)
        self._folder = folder
        self._say = say
        self._dropped = 0
        self._closed = False
        self._lock = threading.Lock()
        self._connection = self._start()
        self._listener = threading.Thread(target=self._listen, name="tracking", daemon=True)
        self._listener.start()

    def take(self, event: Event) -> None:
        with self._lock:
            self._number += 1
            data = encode(event, self._session, self._number)
            if len(data) > MAX_EVENT_BYTES:
                self._drop(f"an event of {len(data)} bytes is more than the {MAX_EVENT_BYTES} that fit")
                return
            self._sent.append(data)
            self._send(data)

    def close(self) -> None:
        """Let the process upload what is left, and wait for it a while; it goes on without us if need be."""
        with self._lock, suppress(OSError):  # it is gone
            self._closed = True
            self._connection.shutdown(socket.SHUT_WR)
        self._listener.join(_CLOSE_TIMEOUT_S)
        if self._listener.is_alive():
            self._say(f"tracking: still uploading after {_CLOSE_TIMEOUT_S:.0f} s, and goes on in the background")
        if self._dropped > 1:
            self._say(f"tracking: {self._dropped} events were dropped in all; the run itself lacks nothing")

    def _send(self, data: bytes) -> None:
        try:
            self._connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._drop("the tracking process does not keep up")
        except OSError:
            pass  # it has been killed: the listener starts another one, which gets this event too

    def _drop(self, reason: str) -> None:
        self._dropped += 1
        if self._dropped == 1:
            self._say(f"tracking: {reason}; events are dropped, training goes on; see {self._folder / LOG}")

    def _listen(self) -> None:
        """Pass the process's lines on; start another one if it is killed."""
        for start in range(_MAX_STARTS):
            if start:
                try:
                    connection = self._start()
                except (OSError, subprocess.SubprocessError) as error:
                    self._say(f"tracking: the process ended and cannot be started again ({error}); training goes on")
                    return
                with self._lock:  # what the old one had not read is gone with it; the journal knows what it had
                    self._connection = connection
                    for data in self._sent:
                        self._send(data)
                    if self._closed:
                        connection.shutdown(socket.SHUT_WR)
            with self._connection as connection, suppress(OSError):
                while line := connection.recv(MAX_EVENT_BYTES):
                    self._say(line.decode())
            if self._closed:
                return
        self._say(f"tracking: the process ended {_MAX_STARTS} times and is not started again; see {self._folder / LOG}")

    def _start(self) -> socket.socket:
        self._folder.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        with theirs, (self._folder / LOG).open("a") as log:
            descriptor = theirs.fileno()
            subprocess.run(
                command(descriptor, self._folder, Start()),
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the driver
                check=True,
            )
        ours.send(self._introduction)
        return ours
