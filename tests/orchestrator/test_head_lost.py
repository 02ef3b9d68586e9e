"""Ray's head is lost with everything on it: the cluster is started anew, and the same command goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.chaos.nodes import LocalNodes
from tests.orchestrator.test_train import Driver, write_config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif("UNBROKEN_TEST_LONG" not in os.environ, reason="takes a minute or more: UNBROKEN_TEST_LONG=1"),
]

OVERRIDES = ("checkpoint.every_steps=5", "train.num_steps=2000")


@contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalNodes]:
    nodes = LocalNodes(0, 2, {})
    try:
        monkeypatch.setenv("RAY_ADDRESS", nodes.environment["RAY_ADDRESS"])
        yield nodes
    finally:
        nodes.close()


def test_the_same_command_goes_on_in_a_new_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second driver is then asked to end: of a cluster that it has joined it leaves with its own exit code."""
    config = write_config(tmp_path)
    with cluster(monkeypatch) as nodes:
        driver = Driver(nodes.folder, config, *OVERRIDES)
        driver.until(r"newest stable checkpoint: step [1-9]")
    assert driver.end() not in (0, None), "".join(driver.lines)
    with cluster(monkeypatch) as nodes:
        again = Driver(nodes.folder, config, *OVERRIDES)
        begun = int(again.until(r"goes on from step (\d+)")[1])
        again.until(r"step \d+/2000 ")
        again.process.terminate()
        assert again.end() == 143, "".join(again.lines)
    assert begun >= 5 and begun % 5 == 0
    assert "SIGTERM: step" in "".join(again.lines)
