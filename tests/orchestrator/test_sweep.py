"""`unbroken sweep` on a Ray of its own nodes: the driver of a trial killed, and the finished search repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.processes import descendants
from tests.orchestrator.local_cluster import LocalCluster
from tests.orchestrator.test_train import STEPS, write_config

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = LocalCluster()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.close()


def sweep(config: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator", "sweep", str(config), "workers=1", *more, "--json"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def driver_of(process: subprocess.Popen[str], folder: Path) -> int:
    """The process of `unbroken train` of a trial that has a checkpoint."""
    while process.poll() is None:
        if any(folder.glob("run-*/checkpoints/*/manifest.json")):
            for pid in descendants(os.getpid()):
                command = Path(f"/proc/{pid}/cmdline")
                if command.exists() and b"orchestrator\0train" in command.read_bytes():
                    return pid
        time.sleep(0.05)
    raise AssertionError(f"no trial has begun: {process.communicate()}")


def test_a_trial_goes_on_after_a_kill_and_is_not_trained_twice(cluster: LocalCluster, tmp_path: Path) -> None:
    cluster.add_node()
    config = write_config(tmp_path)
    process = sweep(config, "--param", "optimizer.lr=[1e-2]")
    os.kill(driver_of(process, tmp_path), signal.SIGKILL)
    out, lines = process.communicate()
    assert process.returncode == 0, lines
    assert "lost, starts again" in lines
    (found,) = json.loads(out)
    assert found["values"] == {"optimizer.lr": 0.01} and found["url"] == f"{tmp_path}/{found['name']}"
    assert (found["state"], found["step"]) == ("finished", STEPS) and found["metric"] > 0
    again = sweep(config, "--param", "optimizer.lr=[1e-2]")
    out, lines = again.communicate()
    assert json.loads(out) == [found] and lines == ""
