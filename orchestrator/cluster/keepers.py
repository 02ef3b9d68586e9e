"""A warm fork server on every node for as long as the driver lives: the next group of agents need not import torch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.agents.forkserver import Keeper
from orchestrator.cluster.placing import count_workers

_SPARE = 2
"""Nodes for each worker, at most, that are kept warm before they are needed."""


@ray.remote(num_cpus=0)
class _Keeper:
    """Keeps one."""

    def __init__(self, name: str, preload: Sequence[str]) -> None:
        threading.Thread(target=Keeper(name, preload).keep, name="keeper", daemon=True).start()


def shared_name(session: str, node: str) -> str:
    """Under which agents of this driver find the fork server of their node."""
    return f"{session[:16]}-{node[:16]}"


def where(
    nodes: Mapping[str, Mapping[str, float]], group: Iterable[str], worker: Mapping[str, float], max_workers: int
) -> set[str]:
    """The nodes that should have a keeper. Arguments as for `Keepers`."""
    fit = {node for node, has in nodes.items() if count_workers(worker, {node: has}, 1)}
    return fit if len(fit) <= _SPARE * max_workers else fit & set(group)


class Keepers:
    """One for each node that may have agents; they end with the driver.

    On a cluster of few nodes that is every node that a worker fits on, so that they are warm when the first agent, or a
    later one, comes there. On a large one it is those that have had agents.
    """

    def __init__(self, session: str, preload: Sequence[str], resources: Mapping[str, float], max_workers: int) -> None:
        """Args: resources: of one worker."""
        self._session = session
        self._preload = preload
        self._resources = resources
        self._max_workers = max_workers
        self._keepers: dict[str, Any] = {}

    def tend(self, nodes: Mapping[str, Mapping[str, float]], group: Iterable[str]) -> None:
        """Start those that are missing, and wait for none; the agents make do without.

        Args:
            nodes: total resources of each that is alive.
            group: those that have agents now.
        """
        group = set(group)  # on a node that is being drained too: with its keeper Ray ends what the trainers hang on
        self._keepers = {node: keeper for node, keeper in self._keepers.items() if node in nodes or node in group}
        for node in where(nodes, group, self._resources, self._max_workers) - self._keepers.keys():
            there: Any = NodeAffinitySchedulingStrategy(node, soft=False)
            options = _Keeper.options(scheduling_strategy=there, max_restarts=-1)
            self._keepers[node] = options.remote(shared_name(self._session, node), self._preload)
