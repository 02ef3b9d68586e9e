"""Connecting to Ray, when it does not work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray
from ray.exceptions import AuthenticationError

from orchestrator.cluster.joining import join, start_here
from orchestrator.errors import ClusterError


def refused(*_: object, **__: object) -> None:
    """As Ray 2.60 tells of a wrong token."""
    trace = RuntimeError("Failed to connect to GCS. Last connection error: ... ray.exceptions.AuthenticationError: ...")
    raise ConnectionError("Failed to connect to Ray cluster at head:6379") from trace


def missing(*_: object, **__: object) -> None:
    raise AuthenticationError("Token authentication is enabled but no authentication token was found")


@pytest.mark.parametrize("init", [refused, missing])
def test_a_token_that_is_missing_or_wrong(monkeypatch: pytest.MonkeyPatch, init):
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="the Ray cluster at auto asks for its token; set RAY_AUTH_MODE=token"):
        join("auto")


def test_what_ray_tells_has_no_colours_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(os.environ.get("RAY_COLOR_PREFIX")))
    monkeypatch.setenv("RAY_COLOR_PREFIX", "1")
    start_here(1)
    monkeypatch.delenv("RAY_COLOR_PREFIX")
    start_here(1)
    monkeypatch.delenv("RAY_COLOR_PREFIX")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    start_here(1)
    assert seen == ["1", "0", None], "what the user has set stays"


def test_what_a_start_that_failed_has_started_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts its processes one after the other, and raises when the last one does not answer in time."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    servers: list[subprocess.Popen[bytes]] = []

    def init(**_: object) -> None:
        servers.append(subprocess.Popen([*sleep, os.path.join(os.path.dirname(ray.__file__), "core/gcs_server")]))
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with subprocess.Popen(sleep) as other:
        try:
            with pytest.raises(ClusterError, match=r"Ray does not start .*, in 3 tries \(The current node timed out"):
                start_here(1)
            assert len(servers) == 3 and all(server.poll() is not None for server in servers)
            assert other.poll() is None, "what is not Ray's is left alone"
        finally:
            for process in (other, *servers):
                process.kill()


def test_what_ran_before_a_start_that_failed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    command = [sys.executable, "-c", "import time; time.sleep(600)", os.path.dirname(ray.__file__)]
    with subprocess.Popen(command) as cluster:
        try:
            with pytest.raises(ClusterError):
                start_here(1)
            assert cluster.poll() is None
        finally:
            cluster.kill()
