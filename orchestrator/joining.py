"""Joining a Ray cluster that is there already."""

from __future__ import annotations

import logging
import socket

import ray
from ray.exceptions import RayError

from orchestrator.errors import ClusterError

_ANSWER_S = 10.0


def join(address: str, logging_level: int = logging.WARNING) -> None:
    """Connect this process to the cluster at `address`: host:port, ray://host:port, or `auto`.

    Raises:
        ClusterError: there is none.
    """
    try:
        _ask(address)  # Ray itself would try for minutes, and tell it in pages
        ray.init(address=address, log_to_driver=False, logging_level=logging_level)
    except (OSError, OverflowError, RayError, ValueError) as error:  # ConnectionError is an OSError
        reason = getattr(error, "strerror", None) or str(error).partition(". ")[0] or type(error).__name__
        raise ClusterError(
            f"no Ray cluster answers at {address} ({' '.join(reason.split())}); give the address of its head, such as"
            " head:6379"
        ) from error


def _ask(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
