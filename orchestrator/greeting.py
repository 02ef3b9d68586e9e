"""The first seconds with whoever connects to a port of ours: it has the key, or it goes."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

_GREETING_S = 10.0
"""A stranger that says nothing, such as a port scanner, holds a thread for no longer."""


def greet(guest: socket.socket, key: bytes) -> Connection:
    """A connection of its own to somebody who has shown to have the key. Call it where nobody else has to wait.

    Raises:
        AuthenticationError, EOFError, OSError: it has not, or is gone, or took too long.
    """
    late = threading.Timer(_GREETING_S, _turn_away, (guest,))
    late.daemon = True
    late.start()
    connection = Connection(guest.dup().detach())
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
    except BaseException:
        connection.close()
        raise
    finally:
        late.cancel()
    return connection


def _turn_away(guest: socket.socket) -> None:
    with suppress(OSError):  # it is gone
        guest.shutdown(socket.SHUT_RDWR)
