"""W&B: one run, each step once, whatever is killed. With W&B's own client and service, in real processes."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from orchestrator.messages.attempts import Event
from orchestrator.tracking.process import LOG
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.wandb_sink import is_better
from tests.orchestrator.tracking.made_up import RUN_ID, attempt, event, history, opened, records
from tests.orchestrator.tracking.wandb_server import KEY, WandbServer

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nobody_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, and no server but one that a test starts."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    server = WandbServer()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


def test_the_best_is_a_number() -> None:
    assert is_better(1.0, None, "min") and is_better(1.0, 2.0, "min") and is_better(2.0, 1.0, "max")
    assert not is_better(2.0, 1.0, "min") and not is_better(1.0, 1.0, "min")
    for value in (math.nan, math.inf, -math.inf):
        for best, mode in ((None, "min"), (1.0, "min"), (1.0, "max")):
            assert not is_better(value, best, mode), (value, best, mode)


class Life:
    """One life of a driver."""

    def __init__(self, folder: Path, introduction: Event) -> None:
        self.lines: list[str] = []
        self.folder = folder
        self.tracker = Tracker(introduction, folder, self.lines.append)

    def tell(self, *events: Event) -> None:
        for one in events:
            self.tracker.take(one)

    def processes(self) -> list[int]:
        """The tracking process and W&B's service, found by the folder that they were started with or in."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
            except OSError:
                continue
            if "orchestrator.tracking.process" in line and str(self.folder) in line:
                found.append(int(entry.name))
        return found + [child for parent in found for child in children(parent)]

    def kill(self) -> None:
        """SIGKILL to everything at once."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        return (self.folder / LOG).read_text()


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def wait_for(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_offline_every_step_once_over_three_attempts_killed_with_all_processes(tmp_path: Path) -> None:
    introduction = opened(tmp_path, mode="auto", best={"metric": "fid", "mode": "min"})
    life = Life(tmp_path, introduction)
    life.tell(event("storage_trouble", message="no answer", retry_s=1.0), *attempt(1, 0, 20, save=15))
    wait_for(lambda: len(history(tmp_path)) > 5)
    life.kill()
    life.tell(event("down", rank=0, kind="killed", message=""), *attempt(2, 15, 30, save=25))
    # The tracker has noticed that its process is gone, and started another at `attempt`.
    wait_for(lambda: len(history(tmp_path)) > 23)
    life.kill()
    life.tracker.close()
    life = Life(tmp_path, introduction)
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    life.tell(*attempt(3, 25, 34, save=34))
    life.tell(event("validation", step=34, metrics={"fid": 3.5}))
    life.tell(event("samples", step=34, path=str(tmp_path / "grid.png"), title="ema"))
    life.tell(*list(attempt(3, 34, 40, save=40))[2:], event("outcome", ending="finished", message="done"))
    life.tracker.close()
    rows = history(tmp_path)
    assert [row["_step"] for row in rows] == list(range(1, 41)), life.log()
    assert [row["train/loss"] for row in rows] == [1 / step for step in range(1, 41)]
    markers = {row["_step"]: row["restart/attempt"] for row in rows if "restart/attempt" in row}
    assert markers == {21: 2, 31: 3}
    row = rows[20]
    assert (row["restart/from_step"], row["restart/replayed_steps"], row["restart/world_size"]) == (15, 5, 2)
    assert any(key.startswith("samples/ema") for key in rows[33])
    assert (rows[33]["validation/fid"], rows[33]["validation/step"]) == (3.5, 34)
    artifacts = [record.artifact for record in records(tmp_path) if record.HasField("artifact")]
    assert {a.manifest.contents[0].ref.rpartition("/")[2] for a in artifacts} == {
        f"{step * 8:013d}-{number:04d}" for step, number in ((15, 1), (25, 2), (34, 3), (40, 3))
    }
    assert list(dict.fromkeys(tuple(sorted(a.aliases)) for a in artifacts)) == [
        *(("latest", "stable", f"step-{step}") for step in (15, 25, 34)),
        ("best", "latest", "step-34"),  # W&B adds latest by itself
        ("latest", "stable", "step-40"),
    ], "in the order in which they were made; W&B takes the same one twice for one"
    alerts = [record.alert for record in records(tmp_path) if record.HasField("alert")]
    assert [(a.title, a.text) for a in alerts] == [("storage does not answer", "story: no answer")], "not again later"
    warnings = [line for line in life.lines if "offline" in line]
    assert len(warnings) == 1 and "unbroken tracking sync" in warnings[0]


def test_wandbs_service_killed_alone(tmp_path: Path) -> None:
    life = Life(tmp_path, opened(tmp_path, mode="offline"))
    life.tell(*attempt(1, 0, 10))
    wait_for(lambda: len(history(tmp_path)) > 5)
    services = [child for pid in life.processes()[:1] for child in children(pid)]
    assert services
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    life.tell(*list(attempt(1, 10, 20))[2:], event("outcome", ending="finished", message="done"))
    life.tracker.close()
    assert [row["_step"] for row in history(tmp_path)] == list(range(1, 21)), life.log()


def test_online_goes_on_after_kills_and_wandb_gets_no_step_twice(server: WandbServer, tmp_path: Path) -> None:
    introduction = opened(tmp_path, mode="online", tags=["t"], group="g", best={"metric": "fid", "mode": "min"})
    life = Life(tmp_path, introduction)
    life.tell(*attempt(1, 0, 10, save=8))
    wait_for(lambda: RUN_ID in server.runs and len(server.runs[RUN_ID].steps) > 5)
    life.kill()
    life.tracker.close()
    life = Life(tmp_path, introduction)
    life.tell(*attempt(2, 8, 20, save=16), event("validation", step=16, metrics={"fid": 2.0}))
    life.tell(event("outcome", ending="gave up", message="no progress"))
    life.tracker.close()
    run = server.runs[RUN_ID]
    assert run.steps == list(range(1, 21)), life.log()
    assert [row["_step"] for row in run.rows if "restart/attempt" in row] == [11]
    assert run.tags == ["t"] and run.group == "g" and json.loads(run.config)["code"]["value"]["git_commit"] == "c0ffee"
    committed = [artifact for artifact in server.artifacts.values() if artifact.get("committed")]
    aliases = [{alias["alias"] for alias in artifact["aliases"]} for artifact in committed]
    assert any("step-8" in found for found in aliases) and any("best" in found for found in aliases)
    assert [alert["title"] for alert in server.alerts] == ["the run ended: gave up"]
    assert run.exit_code == 1
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), f"the key is in {path}"


def test_offline_folders_are_synced_exactly_by_our_command_and_by_wandbs(server: WandbServer, tmp_path: Path) -> None:
    from orchestrator.tracking.wandb_sync import sync

    introduction = opened(tmp_path, mode="offline")
    for number, (begin, end) in enumerate(((0, 10), (8, 20), (16, 25)), start=1):
        life = Life(tmp_path, introduction)
        life.tell(*attempt(number, begin, end, save=end - 2))
        life.tracker.close()
    folders = sorted(str(path) for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    command = [Path(sys.executable).with_name("wandb"), "sync", *folders]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    by_wandb = server.runs.pop(RUN_ID)
    _, steps = sync(tmp_path, life.lines.append)
    assert steps == 25
    for run in (by_wandb, server.runs[RUN_ID]):
        assert run.steps == list(range(1, 26))
        assert {row["_step"] for row in run.rows if "restart/attempt" in row} == {11, 21}
    assert sync(tmp_path, life.lines.append)[1] == 0


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as hole:  # takes what it is sent, and says nothing
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        life = Life(tmp_path, opened(tmp_path, mode="auto", init_timeout_s=2))
        begin = time.monotonic()
        life.tell(*attempt(1, 0, 100))
        assert time.monotonic() - begin < 1
        life.tell(event("outcome", ending="finished", message="done"))
        life.tracker.close()
    assert len(life.lines) == 1 and "offline" in life.lines[0], life.lines
    assert [row["_step"] for row in history(tmp_path)] == list(range(1, 101))


def test_rewind_on_request(server: WandbServer, tmp_path: Path) -> None:
    life = Life(tmp_path, opened(tmp_path, mode="online", rewind=True))
    life.tell(*attempt(1, 0, 10))
    wait_for(lambda: RUN_ID in server.runs)
    repeated = [event("step", attempt=2, step=step, metrics={"loss": 100.0}) for step in range(7, 13)]
    life.tell(*list(attempt(2, 6, 6)), *repeated, event("outcome", ending="finished", message="done"))
    life.tracker.close()
    run = server.runs[RUN_ID]
    assert run.steps == list(range(1, 13)), life.log()
    assert [row["_step"] for row in run.rows if row["train/loss"] == 100.0] == list(range(7, 13))
