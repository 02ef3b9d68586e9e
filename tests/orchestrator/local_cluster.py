"""Several Ray nodes on this machine, each of which can lose its power."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

from ray._private import ray_constants
from ray._private.node import Node
from ray.cluster_utils import Cluster

from orchestrator.processes import descendants


class LocalCluster:
    """A head without CPUs for workers, and nodes of one CPU each."""

    def __init__(self) -> None:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self.folder = Path(tempfile.mkdtemp(prefix="ub-", dir="/tmp"))
        arguments = {
            "num_cpus": 0,
            "include_dashboard": False,
            "temp_dir": str(self.folder),
            "object_store_memory": 80 * 2**20,
        }
        self._cluster = Cluster(initialize_head=True, connect=False, head_node_args=arguments)
        self.address = self._cluster.address
        self._num_nodes = 1

    def add_node(self) -> Node:
        # Addresses of their own: a driver attaches to the node of its own address, and must not lose that.
        self._num_nodes += 1
        address = f"127.0.0.{self._num_nodes}"
        return self._cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, node_ip_address=address, wait=False)

    def cut_power(self, node: Node) -> None:
        """SIGKILL everything that runs on a node, at once and without a word."""
        (raylet,) = node.all_processes[ray_constants.PROCESS_TYPE_RAYLET]
        for pid in [raylet.process.pid, *descendants(raylet.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)
