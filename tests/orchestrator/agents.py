"""A group of agents without Ray, as threads of the test's process: the real supervisors, fork servers and trainers."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.coordinator import Coordinator
from orchestrator.forkserver import ForkServer
from orchestrator.hub import Hub, connect
from orchestrator.messages import Event, Outcome
from orchestrator.pruning import BackgroundPruner
from orchestrator.run_spec import RunSpec
from orchestrator.supervisor import Supervisor

PRELOAD = (
    "torch",
    "diffusers:UNet2DModel",
    "trainers.build",
    "orchestrator.checkpoint.reader",
    "sklearn.datasets",
    "tests.orchestrator.faults",
)

_FOLDER = tempfile.TemporaryDirectory(prefix="unbroken-faults-")
FAULTS = Path(_FOLDER.name) / "faults.json"
"""What `tests.orchestrator.faults` reads."""
os.environ["UNBROKEN_TEST_FAULTS"] = str(FAULTS)


class _KeptForkServer(ForkServer):
    """Goes back to the shelf instead of ending, so that a test does not import torch anew."""

    def __init__(self, preload: Sequence[str]) -> None:
        super().__init__(preload)
        self._preload = tuple(preload)
        self._works = False

    def fork(self, *handles: int) -> int:
        pid = super().fork(*handles)
        self._works = True
        return pid

    def close(self) -> None:
        if self._works and self._process.poll() is None:
            _SHELF[self._preload].append(self)
        else:
            super().close()


_SHELF: defaultdict[tuple[str, ...], list[_KeptForkServer]] = defaultdict(list)


def _fork_server(preload: Sequence[str]) -> ForkServer:
    kept = _SHELF[tuple(preload)]
    return kept.pop() if kept else _KeptForkServer(preload)


def make_spec(run: Path, config: Mapping[str, Any], every_steps: int, **changes: Any) -> RunSpec:
    """The spec of a run in the folder `run`."""
    record = open_or_create(Store.open(str(run)), config)
    spec = RunSpec(
        quarantine=config.get("data", {}).get("quarantine", False),
        run_id=record.run_id,
        run_url=str(run),
        session=uuid.uuid4().hex,
        config=config,
        config_hash="test",
        strategy=config["parallel"]["strategy"],
        every_steps=every_steps,
        keep=RetentionConfig(),
        num_steps=config["train"]["num_steps"],
        versions={},
        preload=PRELOAD,
    )
    return dataclasses.replace(spec, **changes)


def run_agents(
    spec: RunSpec, world_size: int, on_event: Callable[[Event], None], timeout_s: float = 240
) -> Outcome | None:
    """Run to the end. `on_event` is called in the coordinator's thread; what it does happens before what follows."""
    hub = Hub("127.0.0.1", key := b"test", world_size)
    prune = BackgroundPruner(spec, on_event).request
    hub.start(lambda send: Coordinator(spec, Store.open(spec.run_url), world_size, "127.0.0.1", send, on_event, prune))
    outcomes: dict[int, Outcome] = {}

    def serve(rank: int) -> None:
        outcomes[rank] = Supervisor(
            spec, rank, world_size, connect(hub.address, key, rank), start_fork_server=_fork_server
        ).run()

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), f"no outcome after {timeout_s} s"
    assert len({outcome.ending for outcome in outcomes.values()}) == 1, outcomes
    return outcomes[0]
