"""Where a drill runs: several Ray nodes on this machine, or the nodes of a cluster that is there already."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.chaos.namespaces import Namespaces
from orchestrator.errors import ClusterError
from orchestrator.processes import descendants, parent

_STORE_BYTES = 80_000_000  # little more than Ray's least: runs keep nothing in it
_TRIES = 10  # Ray gives a node 30 s to start; a busy machine may need longer
_DRAIN_S = 60
_PR_SET_PDEATHSIG = 1
_SOON = {"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 5}
"""Ray's own word on a node that is cut off: after some 15 s; its defaults take longer than the network is down."""
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    node: str
    """Ray's id of its node."""
    trainer: int
    """Process id."""
    agent: int
    """Process id."""


@dataclass(frozen=True, kw_only=True)
class _Start:
    """A node that is coming up."""

    process: subprocess.Popen[bytes]
    log: Path
    options: Sequence[str]
    prefix: Sequence[str]
    address: str | None
    """None: another one for each try."""
    tries: int


class Nodes(Protocol):
    """What a drill does to the machines of a run."""

    environment: Mapping[str, str]
    """Of the driver: it leads to this cluster."""

    def signal(self, place: Place, pid: int, number: int) -> None:
        """Send a signal to a process of that node. Raises ProcessLookupError if there is none."""
        ...

    def lose(self, place: Place) -> None:
        """Everything of Ray on that node dies at once; another node takes its place, if that is in our hands."""
        ...

    def drain(self, place: Place) -> None:
        """Tell Ray that the node will be taken away; another one takes its place, if that is in our hands."""
        ...

    def cut_off(self, place: Place, seconds: float) -> None:
        """Cut the network of the node, and heal it after so long."""
        ...

    def resize(self, places: Mapping[int, Place], size: int) -> None:
        """Lose or add nodes, for as many workers; `places` has those that run now, each on a node of its own."""
        ...

    def take_drained(self) -> None:
        """The run has left what was drained: take it away, if that is in our hands."""
        ...

    def tend(self) -> None:
        """Called now and then: nodes that did not come up are started once more."""
        ...

    def waiting_for(self) -> str:
        """Which nodes are not up yet that should be, in words; empty: none, or it is not in our hands."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def drain_node(address: str, node: str, environment: Mapping[str, str]) -> None:
    """Have Ray announce that a node will be gone in a minute.

    Raises:
        ClusterError: it does not.
    """
    command = [_ray(), "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "unbroken chaos"]
    command += ["--deadline-remaining-seconds", str(_DRAIN_S)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ClusterError(f"ray drain-node of node {node[:8]} at {address} failed: {''.join(last)}")


class LocalNodes:
    """A Ray cluster on this machine that is a drill's own: its own ports, its own folder, ended by process id."""

    def __init__(self, num_nodes: int, cpus: int, variables: Mapping[str, str], namespaces: bool = False) -> None:
        """
        Args:
            num_nodes: each with `cpus` CPUs, beside a head without any; 0: the head alone, with these CPUs.
            variables: more environment variables of every process on the nodes.
            namespaces: every node has a network of its own, which can be cut off.

        Raises:
            ClusterError: a node does not start.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="ub-", dir="/tmp"))  # short: it holds sockets
        self._network = Namespaces(self.folder.name) if namespaces else None
        host = self._network.host if self._network else "127.0.0.1"
        self._address = f"{host}:{_free_port(host)}"
        self._cpus = cpus
        own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **variables}
        if namespaces:
            own["GLOO_SOCKET_IFNAME"] = "eth0"  # there is no other one but lo
        self.environment: Mapping[str, str] = {**os.environ, **own, "RAY_ADDRESS": self._address}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._num_started = 0
        self._starting: list[_Start] = []
        self._leaving: list[int] = []
        try:
            head = ["--head", f"--port={self._address.rpartition(':')[2]}", f"--temp-dir={self.folder}"]
            head += ["--include-dashboard=false", f"--num-cpus={0 if num_nodes else cpus}"]
            if namespaces:
                head.append(f"--system-config={json.dumps(_SOON)}")
            self._start(head, address=host)
            self._wait()
            for _ in range(num_nodes):
                self._add()
            self._wait()
        except BaseException:
            self.close()
            raise

    def signal(self, place: Place, pid: int, number: int) -> None:
        os.kill(pid, number)

    def lose(self, place: Place) -> None:
        kill_node_of(place.agent)
        self._add()

    def drain(self, place: Place) -> None:
        self._add()
        self._leaving.append(raylet_above(place.agent))
        drain_node(self._address, place.node, self.environment)

    def take_drained(self) -> None:
        while self._leaving:
            _kill_node(self._leaving.pop())

    def cut_off(self, place: Place, seconds: float) -> None:
        assert self._network is not None, "kinds that need namespaces are skipped without them"
        self._network.cut_off(self._network.of_process(place.agent), seconds)
        self._add()

    def resize(self, places: Mapping[int, Place], size: int) -> None:
        for rank in range(size, len(places)):
            kill_node_of(places[rank].agent)
        for _ in range(len(places), size):
            self._add()

    def close(self) -> None:
        for process in reversed(self._processes):
            _end_session(process)
        if self._network is not None:
            self._network.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tend(self) -> None:
        for start in list(self._starting):
            said = start.log.read_text(encoding="utf-8", errors="replace")
            if "--block" in said:
                self._starting.remove(start)
            elif start.process.poll() is not None and start is self._starting[0]:  # one after the other this time
                self._starting.remove(start)
                _end_session(start.process)
                if start.tries == _TRIES:
                    raise ClusterError(f"a Ray node on this machine does not start: {said.strip()[-400:]}")
                self._start(start.options, start.prefix, start.address, start.tries + 1)
                self._starting.insert(0, self._starting.pop())

    def waiting_for(self) -> str:
        if not self._starting:
            return ""
        tries = f"try {self._starting[0].tries} of {_TRIES}"
        return f"{len(self._starting)} Ray nodes on this machine have not started, the first in {tries}"

    def _wait(self) -> None:
        while self._starting:
            self.tend()
            time.sleep(0.05)

    def _add(self) -> None:
        prefix, address = self._network.add() if self._network is not None else ((), None)
        self._start([f"--address={self._address}", f"--num-cpus={self._cpus}"], prefix, address)

    def _start(
        self, options: Sequence[str], prefix: Sequence[str] = (), address: str | None = None, tries: int = 1
    ) -> None:
        self._num_started += 1
        log = self.folder / f"start-{self._num_started}.log"
        # Of its own: a driver attaches to the node of its own address, and must not lose that; and what a start that
        # failed has left behind may listen on its ports for a while.
        own = f"127.0.{self._num_started // 250}.{self._num_started % 250 + 1}"
        plain = [f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats", "--block"]
        plain.append(f"--node-ip-address={address or own}")
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        with log.open("w") as out:
            process = subprocess.Popen(
                [*prefix, _ray(), "start", *options, *plain],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._processes.append(process)
        self._starting.append(
            _Start(process=process, log=log, options=options, prefix=prefix, address=address, tries=tries)
        )


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Have the kernel end this process when the drill dies, however it does; `ray start --block` ends its node then."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def raylet_above(pid: int) -> int:
    """The daemon of the node that `pid` works on. Raises ProcessLookupError if `pid` is gone."""
    while pid > 1:
        if "raylet" in _read(pid, "comm"):
            return pid
        pid = parent(pid) or 0
    raise ProcessLookupError("no raylet is above it")


def kill_node_of(pid: int) -> None:
    """Kill everything of Ray on this machine's node that `pid` works on. Raises ProcessLookupError if it is gone."""
    _kill_node(raylet_above(pid))


def _kill_node(raylet: int) -> None:
    for pid in [raylet, *descendants(raylet)]:
        _kill(pid)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    for pid in descendants(process.pid):
        _kill(pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what has lost its parent
    process.wait()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"process {pid} is gone") from None
