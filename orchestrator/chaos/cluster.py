"""The nodes of a Ray cluster that is somebody else's: processes on them are reached by tasks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.chaos.nodes import Place, drain_node, kill_node_of
from orchestrator.cluster.joining import join
from orchestrator.errors import ClusterError

_ANSWER_S = 60.0


class ClusterNodes:
    """As `Nodes`. What is lost here is not replaced by us."""

    def __init__(self, address: str) -> None:
        """Raises ClusterError: there is no such cluster."""
        join(address)
        self._address = address
        self.environment: Mapping[str, str] = {**os.environ, "RAY_ADDRESS": address}

    def signal(self, place: Place, pid: int, number: int) -> None:
        if not self._on(place, _send, pid, number):
            raise ProcessLookupError(f"process {pid} on node {place.node[:8]} is gone")

    def lose(self, place: Place) -> None:
        try:
            self._on(place, kill_node_of, place.agent)
        except RayError:
            return  # the task dies with its node: that was the point
        raise ClusterError(f"node {place.node[:8]} survived its own death")

    def drain(self, place: Place) -> None:
        drain_node(self._address, place.node, self.environment)

    def take_drained(self) -> None:
        """Nothing: whoever runs the cluster takes the node away."""

    def tend(self) -> None:
        """Nothing: they are not ours."""

    def cut_off(self, place: Place, seconds: float) -> None:
        raise AssertionError("the network of a cluster of somebody else is left alone")

    def resize(self, places: Mapping[int, Place], size: int) -> None:
        raise AssertionError("the nodes of a cluster of somebody else are left alone")

    def waiting_for(self) -> str:
        return ""

    def close(self) -> None:
        ray.shutdown()

    def _on(self, place: Place, work: Callable[..., Any], *arguments: int) -> Any:
        there: Any = NodeAffinitySchedulingStrategy(place.node, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(work)
        return ray.get(task.remote(*arguments), timeout=_ANSWER_S)


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, signal.Signals(number))
    except ProcessLookupError:
        return False
    return True
