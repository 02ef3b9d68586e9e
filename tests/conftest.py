"""Settings of the whole test session; they must stand before torch and ray are imported."""

from __future__ import annotations

import os
from pathlib import Path

# What starts in another folder imports from here too: fork servers, Ray's workers.
os.environ["PYTHONPATH"] = f"{Path(__file__).parent.parent}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
os.environ["OMP_NUM_THREADS"] = "1"  # CPU kernels split sums by thread: one thread, one answer
os.environ["RAY_AUTH_MODE"] = "disabled"  # no token file on a test machine
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # tests call nobody

import uuid

import hypothesis
import pytest

from tests.s3.fault_proxy import FaultProxy
from tests.s3.server import BUCKET, S3Server

hypothesis.settings.register_profile("busy machine", deadline=None)  # a wait for a core is no fault of an example
hypothesis.settings.load_profile("busy machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Real processes and servers keep no time to the millisecond: a test with one gets a second try.

    The summary shows that it did ("rerun"), and why: one that needs it often is a fault of the test, or of the code.
    """
    for item in items:
        if _has(item, "chaos", "ray", "s3"):
            item.add_marker(pytest.mark.flaky(reruns=1))
    if hasattr(config, "workerinput"):  # of several: files that take long first, so that none is left alone with one
        long = {item.path for item in items if _has(item, "chaos", "ray", "slow")}
        items.sort(key=lambda item: item.path not in long)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were tried again."""
    for report in terminalreporter.stats.get("rerun", ()):
        terminalreporter.section(f"first try of {report.nodeid}")
        terminalreporter.line(report.longreprtext)


def _has(item: pytest.Item, *markers: str) -> bool:
    return any(item.get_closest_marker(name) for name in markers)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A running S3 server."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3_url(s3_server, monkeypatch):
    """An empty prefix of it, with the environment that leads there."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def one_s3_proxy(s3_server):
    proxy = FaultProxy(s3_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def s3_proxy(s3_server, one_s3_proxy, monkeypatch):
    """A proxy with faults before the server; the environment leads to it."""
    for name, value in s3_server.environment(one_s3_proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    one_s3_proxy.calm_down()
    yield one_s3_proxy
    one_s3_proxy.calm_down()
