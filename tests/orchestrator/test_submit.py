"""`unbroken submit` on a real Ray head with its job server: stopped, killed, submitted again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.errors import ClusterError
from orchestrator.jobs import Cluster
from orchestrator.tracking.glance import glance
from orchestrator.tracking.record import read_events
from tests.s3.server import free_ports
from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import tiny_config, train_tiny
from trainers.fingerprint import format_fingerprint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 150, 10
COMMAND = f"{sys.executable} -m orchestrator"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The job server of a head node of our own, which is ended by its process id."""
    folder = Path(tempfile.mkdtemp(prefix="ub-", dir="/tmp"))  # short, because it holds sockets
    names = ("port", "dashboard-port", "ray-client-server-port", "metrics-export-port")
    names += ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--temp-dir", str(folder)),
        *("--num-cpus", "3", "--object-store-memory", "200000000"),
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *(f"--{name}={port}" for name, port in ports.items()),
    ]
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        until(lambda: answers(address) or head.poll() is not None)
        assert head.poll() is None, (folder / "head.log").read_text()
        yield address
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def environment() -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    }
    return {**inherited, "PYTHONPATH": str(ROOT)}


def answers(address: str) -> bool:
    try:
        Cluster.connect(address)
    except ClusterError:
        return False
    return True


def until(condition: Callable[[], Any], timeout_s: float = 240.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.3)


def unbroken(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def stable_step(run: Path) -> int:
    seen = glance(str(run))
    return (seen.newest_stable_step if seen else None) or 0


def test_stopped_killed_and_submitted_again(address: str, tmp_path: Path) -> None:
    config = tiny_config(train={"num_steps": STEPS, "global_batch_size": 64, "microbatch_size": 16})
    straight = run_ranks(1, train_tiny, config, STEPS)[0][1]
    name = f"run-{uuid.uuid4().hex[:6]}"  # a second try meets the jobs of the first one
    config |= {"run": {"name": name}, "storage": str(tmp_path / "kept"), "workers": 2}
    config |= {"checkpoint": {"every_steps": EVERY}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "kept" / name
    where = ["--working-dir", str(tmp_path), "--address", address, "--command", COMMAND]
    submit = ["submit", str(tmp_path / "config.yaml"), *where]

    assert unbroken(*submit, "--no-follow").exit_code == 0
    until(lambda: stable_step(run) > 0)
    stopped = unbroken("stop", name, "--address", address)
    assert stopped.exit_code == 0 and f"{name}-a1: STOPPED" in stopped.stdout, stopped.output
    at = stable_step(run)
    assert 0 < at < STEPS

    follower = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *submit, "--supervise"],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    until(lambda: stable_step(run) > at or follower.poll() is not None)
    drivers = [event.fields["pid"] for event in read_events(Store.open(str(run))) if event.kind == "started"]
    os.kill(drivers[-1], signal.SIGKILL)
    output, _ = follower.communicate(timeout=400)
    assert follower.returncode == 0, output
    assert f"{name}-a2: submitted" in output and f"{name}-a2 lost its driver" in output
    assert f"{name}-a3: SUCCEEDED" in output
    jobs = [(job.id, job.status, job.exit_code) for job in Cluster.connect(address).jobs()]
    ours = [(id, *how) for id, *how in jobs if id.startswith(name)]
    assert ours == [(f"{name}-a1", "STOPPED", None), (f"{name}-a2", "FAILED", 137), (f"{name}-a3", "SUCCEEDED", 0)]

    newest = newest_stable(Store.open(str(run)))
    assert newest is not None and newest.manifest is not None and newest.manifest.progress.step == STEPS
    saved = {name: tensor.fingerprint for name, tensor in newest.manifest.tensors.items()}
    assert saved == {name: format_fingerprint(value) for name, value in straight.items()}
