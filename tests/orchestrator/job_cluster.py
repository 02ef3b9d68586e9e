"""A Ray cluster with a job server on this machine; its nodes are raylets of their own, which can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import ClusterError
from orchestrator.jobs.job_server import Cluster
from orchestrator.processes import descendants
from tests.s3.server import free_ports

ROOT = Path(__file__).parents[2]
_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
_HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")


class JobCluster:
    """A head and other nodes, one CPU each, every one with its own address, ports and folder."""

    def __init__(self, num_nodes: int) -> None:
        """Start them. They come up in their own time: `wait`. Args: num_nodes: with the head."""
        self._folder = Path(tempfile.mkdtemp(prefix="ub-", dir="/tmp"))  # short, because it holds sockets
        self._num_nodes = num_nodes
        head_ports = dict(zip(_HEAD_PORTS, free_ports(len(_HEAD_PORTS)), strict=True))
        self.address = f"http://127.0.0.1:{head_ports['dashboard-port']}"
        self._processes: list[subprocess.Popen[bytes]] = []
        head = ["--head", "--dashboard-host=127.0.0.1", *(f"--{name}={port}" for name, port in head_ports.items())]
        self._start(1, head)
        for number in range(2, num_nodes + 1):
            self._start(number, [f"--address=127.0.0.1:{head_ports['port']}"])

    def wait(self) -> None:
        """Until the job server answers and knows all nodes."""
        until(lambda: self._counted() == self._num_nodes, self._check)

    @property
    def head(self) -> int:
        """Process id of the head's raylet."""
        (raylet,) = (pid for pid in descendants(self._processes[0].pid) if _name(pid) == "raylet")
        return raylet

    def close(self) -> None:
        for process in reversed(self._processes):
            for pid in (*descendants(process.pid), process.pid):
                _kill(pid)
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, number: int, options: list[str]) -> None:
        ports = zip(_PORTS, free_ports(len(_PORTS)), strict=True)
        folder = self._folder / str(number)
        folder.mkdir()
        # Addresses of their own: a driver attaches to the node of its own address, and must not lose that.
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", *options, "--block", "--disable-usage-stats"),
            *(f"--node-ip-address=127.0.0.{number}", f"--temp-dir={folder}", "--num-cpus=1"),
            *("--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--{name}={port}" for name, port in ports),
        ]
        with (self._folder / f"{number}.log").open("wb") as log:
            self._processes.append(subprocess.Popen(command, env=environment(), stdout=log, stderr=log))

    def _counted(self) -> int:
        try:
            return Cluster.connect(self.address).num_nodes()
        except ClusterError:
            return 0

    def _check(self) -> None:
        ended = [number for number, process in enumerate(self._processes, start=1) if process.poll() is not None]
        assert not ended, (self._folder / f"{ended[0]}.log").read_text()


def environment() -> dict[str, str]:
    """Of processes that a test starts: they import this checkout, and know of no other cluster."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    }
    return {**inherited, "PYTHONPATH": str(ROOT)}


def until(condition: Callable[[], Any], check: Callable[[], None] = lambda: None, timeout_s: float = 240.0) -> None:
    """Wait for `condition`. Args: check: raises when waiting makes no sense any more."""
    end = time.monotonic() + timeout_s
    while not condition():
        check()
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.1)


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
