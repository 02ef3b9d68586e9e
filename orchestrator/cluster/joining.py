"""Connecting to Ray: a cluster that is there already, or one of this machine alone."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.errors import ClusterError
from orchestrator.processes import command, descendants

GIVE_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, here too"
"""What to do where a cluster asks for its token."""
_ANSWER_S = 10.0
_TERMINATED_CODE = 128 + signal.SIGTERM
_STARTS = 3
"""Times that Ray is started here; it gives a node 30 s, which a busy machine may not keep."""


def join(address: str, logging_level: int = logging.WARNING) -> None:
    """Connect this process to the cluster at `address`: host:port, ray://host:port, or `auto`.

    Raises:
        ClusterError: there is none, or it asks for a token.
    """
    try:
        _ask(address)  # Ray itself would try for minutes, and tell it in pages
        _init(address=address, log_to_driver=False, logging_level=logging_level)
    except (OSError, OverflowError, RayError, ValueError) as error:  # ConnectionError is an OSError
        # Ray's text has the first error's trace.
        if "AuthenticationError" in f"{type(error).__name__} {error.__cause__}":
            raise ClusterError(f"the Ray cluster at {address} asks for its token; {GIVE_TOKEN}") from error
        reason = getattr(error, "strerror", None) or str(error).partition(". ")[0] or type(error).__name__
        raise ClusterError(
            f"no Ray cluster answers at {address} ({' '.join(reason.split())}); give the address of its head, such as"
            " head:6379"
        ) from error


def start_here(num_cpus: int, logging_level: int = logging.WARNING) -> None:
    """Start a Ray of this machine alone: on loopback, with nothing written to the home folder.

    Raises:
        ClusterError: it does not start.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = set(descendants(os.getpid()))
    for start in range(1, _STARTS + 1):
        try:
            _init(
                address="local",  # not whatever cluster happens to run here: for that one, RAY_ADDRESS=auto
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging_level,
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:  # Ray raises a plain Exception when its own processes do not come up in time
            ray.shutdown()
            _end_what_came_up(before)
            if start == _STARTS:
                reason = str(error).partition(". ")[0]
                raise ClusterError(
                    f"Ray does not start on this machine, in {_STARTS} tries ({reason}); look for too little memory,"
                    " a full disk or a machine that is too busy; its logs are in /tmp/ray, or in RAY_TMPDIR"
                ) from error


def _init(**arguments: Any) -> None:
    """`ray.init`. Ray's own answer to SIGTERM is exit code 15, or a stack dump; this process ends with 143 instead."""
    if not sys.stderr.isatty():  # Ray puts colours into files too
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        ray.init(**arguments)
    except SystemExit as error:
        raise SystemExit(_TERMINATED_CODE) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED_CODE))


def _end_what_came_up(before: Collection[int]) -> None:
    """Of a start that failed Ray forgets what it had started: that would live as long as this process, beside the next.

    Args:
        before: what this process had started before.
    """
    of_ray = os.path.dirname(ray.__file__)
    for pid in descendants(os.getpid()):
        if pid not in before and of_ray in command(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):  # of a child that has ended already, or of one of our child's
                os.waitpid(pid, 0)


def _ask(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
