"""A node of a real Ray cluster is lost or drained: the run goes on from what the memory of the others holds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.chaos.nodes import raylet_above
from tests.orchestrator.test_train import Driver, write_config
from tests.s3.server import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(600)]

EVERY = 2


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A head without CPUs and three nodes with one each; the folder of its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ub-", dir="/tmp"))
    (port,) = free_ports(1)
    plain = ["--node-ip-address=127.0.0.1", "--object-store-memory=80000000", "--block", "--disable-usage-stats"]
    head = ["--head", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=0", "--include-dashboard=false"]
    worker = [f"--address=127.0.0.1:{port}", "--num-cpus=1"]
    processes = []
    try:
        for options in (head, worker, worker, worker):
            processes.append(start(folder, [*options, *plain]))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        yield folder
    finally:
        for process in reversed(processes):
            os.killpg(process.pid, signal.SIGKILL)  # its own session, so with everything that it started
            process.wait()
            process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, options: list[str]) -> subprocess.Popen[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    log = (folder / "start.log").open("a+")
    with log:
        process = subprocess.Popen(
            [ray, "start", *options], stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    assert process.stdout is not None
    for line in process.stdout:
        if "--block" in line or "runtime started" in line:
            return process
    raise AssertionError(f"ray start {options} ended with {process.wait()}: {(folder / 'start.log').read_text()}")


def test_a_lost_node_costs_at_most_the_interval_of_the_memory_tier(tmp_path: Path, cluster: Path) -> None:
    path = write_config(tmp_path)
    config = yaml.safe_load(path.read_text())
    config["checkpoint"] = {
        "tiers": [{"url": "peer://", "every": EVERY, "keep": 2}, {"url": str(tmp_path), "every": 1000, "keep": 2}]
    }
    config["train"]["num_steps"] = 400
    path.write_text(yaml.safe_dump(config))
    driver = Driver(cluster, path)
    driver.until(r"step \d+/400 .* newest stable checkpoint: step [1-9]")
    os.kill(raylet_above(driver.agents[1]), signal.SIGKILL)
    driver.until(r"from checkpoint \d+-\d+ in the memory of the nodes")
    begun = int(driver.until(r"goes on from step (\d+)")[1])
    assert begun % EVERY == 0 and begun > 0
    driver.until(r"first new step|step \d+/400 ")
    driver.process.kill()  # what had to be seen was seen
    driver.end()


def test_a_worker_that_is_to_start_on_a_drained_node_is_not_waited_for(tmp_path: Path, cluster: Path) -> None:
    program = [sys.executable, "-W", "ignore", "-m", "tests.orchestrator.cluster.drained_room", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=80)
    assert done.returncode == 0, done.stdout + done.stderr
    drained, *used = (tmp_path / "nodes").read_text().split()
    assert len(used) == 2 and drained not in used
