"""Networks of their own for the nodes of a drill, on one machine: Linux network namespaces on a bridge. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import zlib
from collections.abc import Sequence

from orchestrator.errors import ClusterError


def why_not() -> str | None:
    """Why this machine allows no namespaces; None: it does."""
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"ubtry{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"this machine allows no network namespaces: {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


class Namespaces:
    """A bridge, and any number of namespaces on it, each with one address."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: tells these from those of other drills.

        Raises:
            ClusterError: the bridge cannot be made.
        """
        number = zlib.crc32(name.encode())
        self._key = f"{number & 0xFFFFF:05x}"  # names of network devices are at most 15 characters
        self._subnet = f"10.{200 + number % 50}.{(number >> 8) % 250}"
        self._bridge = f"ub{self._key}"
        self._num = 0
        self.host = f"{self._subnet}.1"
        """Address of this machine on the bridge."""
        _ip("link", "add", self._bridge, "type", "bridge")
        try:
            _ip("address", "add", f"{self.host}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except ClusterError:
            self.close()
            raise

    def add(self) -> tuple[Sequence[str], str]:
        """A new namespace: how a command is started in it, and its address."""
        self._num += 1
        name, address = self._name(self._num), f"{self._subnet}.{self._num + 1}"
        _ip("netns", "add", name)
        _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"v{name}", "master", self._bridge, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return ("ip", "netns", "exec", name), address

    def of_process(self, pid: int) -> str:
        """The namespace that a process is in. Raises ProcessLookupError if it is gone."""
        found = subprocess.run(["ip", "netns", "identify", str(pid)], capture_output=True, text=True, check=False)
        if found.returncode or not found.stdout.strip():
            raise ProcessLookupError(f"process {pid} is in no namespace")
        return found.stdout.strip()

    def cut_off(self, name: str, seconds: float) -> None:
        """Take the network of a namespace down, and up again after so long."""
        _ip("link", "set", f"v{name}", "down")
        healer = threading.Timer(seconds, self._heal, (name,))
        healer.daemon = True
        healer.start()

    def close(self) -> None:
        """Remove all of it. The processes in it must have ended."""
        for number in range(1, self._num + 1):
            subprocess.run(["ip", "netns", "delete", self._name(number)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, check=False)

    def _name(self, number: int) -> str:
        return f"ub{self._key}n{number}"

    def _heal(self, name: str) -> None:
        # The drill may be over, and the device gone.
        subprocess.run(["ip", "link", "set", f"v{name}", "up"], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")
