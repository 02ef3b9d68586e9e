from __future__ import annotations

import socket
from contextlib import suppress

import pytest

from tests.s3.server import free_ports


def test_free_ports_are_not_taken_given_twice_or_of_another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        (before,) = free_ports(1)
        next_one = before + 1 if before % 300 != 299 else before - 299
        taken = socket.socket()
        with suppress(OSError):  # somebody else has it
            taken.bind(("127.0.0.1", next_one))
        with taken:
            seen += [before, next_one, *free_ports(100), *free_ports(100)]
    assert len(set(seen)) == len(seen) == 2 * 202
    assert max(seen) < 32_768, "where the kernel takes the ports of connections from"
