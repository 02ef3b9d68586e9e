"""Where the memory of nodes is found in a Ray cluster: one small actor on each, which serves it beside Ray."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.checkpoint.peer_objects import Peer, PeerRing
from orchestrator.checkpoint.peer_server import PeerServer
from orchestrator.cluster.silent_nodes import silent_nodes

_START_S = 60.0
_ANSWER_S = 3 * _START_S


@ray.remote(num_cpus=0, max_task_retries=-1)
class _Holder:
    """Keeps one node's objects for as long as the driver lives: longer than agents, which Ray replaces as a group."""

    def __init__(self, node: str, key: bytes) -> None:
        host = ray.util.get_node_ip_address()
        self._server = PeerServer(host, key)
        self._peer = Peer(node=node, host=host, port=self._server.port)

    def peer(self) -> Peer:
        return self._peer


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Directory:
    """Owns the holders, so that they live as long as this actor, which belongs to the driver.

    If its process dies, they do, and Ray starts another one: the next group of agents finds memory that is empty.
    """

    def __init__(self, cpus: float) -> None:
        """Args: cpus: what a worker needs; nodes with less have none, and get no holder."""
        self._cpus = cpus
        self._key = secrets.token_bytes(32)
        self._holders: dict[str, Any] = {}

    def ring(self) -> PeerRing:
        """The memory of all nodes that answer now; of those that are new it is empty."""
        nodes = [
            node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0.0) >= max(self._cpus, 0.01)
        ]
        alive = {node["NodeID"] for node in nodes}
        self._holders = {node: holder for node, holder in self._holders.items() if node in alive}
        for node in alive - self._holders.keys():
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            self._holders[node] = _Holder.options(scheduling_strategy=where).remote(node, self._key)
        # A node that is lost would be waited for until Ray knows it; one that is only cut off keeps what it holds.
        silent = silent_nodes(nodes)
        asked = {holder.peer.remote(): node for node, holder in self._holders.items() if node not in silent}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_START_S)
        peers = []
        for answer in ready:
            try:
                peers.append(ray.get(answer))
            except RayError:  # dead; if its node lives, the next call makes another one
                del self._holders[asked[answer]]
        return PeerRing(peers=tuple(sorted(peers, key=lambda peer: peer.node)), key=self._key)


def ask_ring(directory: Any) -> PeerRing:
    """What `directory` says.

    Raises:
        RayError: it does not answer.
    """
    return ray.get(directory.ring.remote(), timeout=_ANSWER_S)


def home(ring: PeerRing | None) -> PeerRing | None:
    """The same, seen from the node of this worker."""
    return ring and replace(ring, home=ray.get_runtime_context().get_node_id())


def start_directory(cpus: float) -> Any:
    """The actor that knows the memory of the nodes: `ring.remote()` gives a `PeerRing`.

    It lives where this driver is, as long as the driver: the memory outlasts groups of agents and Ray's controller.

    Args:
        cpus: what a worker needs.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Directory.options(scheduling_strategy=here).remote(cpus)
