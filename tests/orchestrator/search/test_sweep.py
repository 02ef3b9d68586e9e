"""`unbroken sweep` on a Ray of its own: the driver of a trial killed, and the finished search repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.processes import descendants
from tests.orchestrator.test_train import STEPS, write_config

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="ub-", dir="/tmp")  # short, because it holds sockets
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    shutil.rmtree(folder, ignore_errors=True)


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


def test_a_trial_goes_on_after_a_kill_and_is_not_trained_twice(ray_folder: None, tmp_path: Path) -> None:
    search = ["sweep", str(write_config(tmp_path)), "workers=1", "--param", "optimizer.lr=[1e-2]", "--json"]
    command = [sys.executable, "-m", "orchestrator", *search]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.kill(driver_of(process, tmp_path), signal.SIGKILL)
    out, lines = process.communicate()
    assert process.returncode == 0, lines
    assert "lost, starts again" in lines
    (found,) = json.loads(out)
    assert found["values"] == {"optimizer.lr": 0.01} and found["url"] == f"{tmp_path}/{found['name']}"
    assert (found["state"], found["step"]) == ("finished", STEPS) and found["metric"] > 0
    again = CliRunner().invoke(main, search)  # in this process: it has nothing to train
    assert json.loads(again.stdout) == [found] and again.stderr == ""
