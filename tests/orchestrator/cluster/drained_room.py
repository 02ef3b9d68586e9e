"""A program: two workers of Ray Train, one of whose nodes is drained when its room is reserved, before they start.

Writes that node, and those where they ran in the end, into the file `nodes` of the folder that is given.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from orchestrator.chaos.nodes import drain_node
from orchestrator.cluster.mailbox import make_mailbox
from orchestrator.cluster.placing import Replacing, Trainer

FOLDER = Path(sys.argv[-1])
NODES = "nodes"


class Draining(Replacing):
    """In Ray Train's controller."""

    def __init__(self, mailbox: Any, nodes: Path, address: str) -> None:
        super().__init__(mailbox)
        self._nodes = nodes
        self._address = address

    def on_controller_start_worker_group(self, **facts: Any) -> dict[str, str] | None:
        create = WorkerGroup._create_workers

        def drain_first(group: WorkerGroup, num_workers: int, room: Any, *rest: Any, **more: Any) -> Any:
            if not self._nodes.exists():
                node = ray.util.placement_group_table(room)["bundles_to_node_id"][1]
                drain_node(self._address, node, os.environ)
                self._nodes.write_text(f"{node}\n")
            return create(group, num_workers, room, *rest, **more)

        WorkerGroup._create_workers = drain_first
        return super().on_controller_start_worker_group(**facts)


def train(config: dict[str, str]) -> None:
    with open(config[NODES], "a") as file:
        file.write(f"{ray.get_runtime_context().get_node_id()}\n")


def main() -> None:
    address = os.environ["RAY_ADDRESS"]
    ray.init(address=address, log_to_driver=False)
    mailbox = make_mailbox()
    Trainer(
        train,
        mailbox,
        3,
        train_loop_config={NODES: str(FOLDER / NODES)},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            name="drained",
            storage_path=str(FOLDER),
            callbacks=[Draining(mailbox, FOLDER / NODES, address)],
            failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=-1),
        ),
    ).fit()


if __name__ == "__main__":
    main()
