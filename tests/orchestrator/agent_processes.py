"""A group of agents without Ray, as threads of the test's process: the real supervisors, fork servers and trainers."""

from __future__ import annotations

import atexit
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.agents.forkserver import ForkServer, Keeper, open_fork_server
from orchestrator.agents.supervisor import Supervisor
from orchestrator.checkpoint.peer_objects import PeerRing
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.committing import BackgroundChores
from orchestrator.coordination.coordinator import Coordinator
from orchestrator.coordination.halting import HaltOrder
from orchestrator.coordination.hub import Hub, connect
from orchestrator.messages.attempts import Event, Outcome
from orchestrator.run_spec import RunSpec
from orchestrator.sections import CheckpointConfig
from orchestrator.stores import Stores

PRELOAD = (
    "torch",
    "diffusers:UNet2DModel",
    "trainers.build",
    "orchestrator.checkpoint.reader",
    "sklearn.datasets",
    "tests.orchestrator.faults",
)

_FOLDER = tempfile.TemporaryDirectory(prefix="unbroken-faults-")
atexit.register(_FOLDER.cleanup)  # or a worker of pytest-xdist is warned that it is left to the interpreter
FAULTS = Path(_FOLDER.name) / "faults.json"
"""What `tests.orchestrator.faults` reads."""
os.environ["UNBROKEN_TEST_FAULTS"] = str(FAULTS)


_THREADS = {"hub", "hub-beat", "heartbeat", "shard-hasher", "shard-writer", "committer", "pruner"}
_KEPT: dict[tuple[str, ...], tuple[str, Keeper]] = {}
_KEEPING = threading.Lock()


def _fork_server(preload: Sequence[str]) -> ForkServer:
    """One for the whole session, as one for all groups of agents of a run: so that no test imports torch anew."""
    if not set(PRELOAD) <= set(preload):
        return ForkServer.start(preload)
    with _KEEPING:  # all ranks ask at once: a second keeper would be dropped while its process runs
        if (key := tuple(preload)) not in _KEPT:
            _KEPT[key] = (name := uuid.uuid4().hex, keeper := Keeper(name, preload))
            keeper.start()
    return open_fork_server(_KEPT[key][0], preload)


def make_spec(run: Path | str, config: Mapping[str, Any], every_steps: Any, **checkpoint: Any) -> RunSpec:
    """The spec of a run at `run`; `checkpoint` are other keys of that section."""
    record = open_or_create(Store.open(str(run)), config)
    return RunSpec(
        quarantine=config.get("data", {}).get("quarantine", False),
        run_id=record.run_id,
        run_url=str(run),
        session=uuid.uuid4().hex,
        config=config,
        config_hash="test",
        strategy=config["parallel"]["strategy"],
        checkpoint=CheckpointConfig(every_steps=every_steps, **checkpoint),
        num_steps=config["train"]["num_steps"],
        versions={},
        preload=PRELOAD,
    )


def run_agents(
    spec: RunSpec,
    world_size: int,
    on_event: Callable[[Event], None],
    timeout_s: float = 240,
    ring: PeerRing | None = None,
    order: tuple[str, HaltOrder] | None = None,
) -> Outcome | None:
    """Run to the end. `on_event` is called in the coordinator's thread; what it does happens before what follows.

    Args:
        order: given when the first event of this kind happens.
    """
    others = set(threading.enumerate())
    hub = Hub("127.0.0.1", key := b"test", world_size)
    orders = [order] if order else []

    def notify(event: Event) -> None:
        on_event(event)
        if orders and event.kind == orders[0][0]:
            hub.order(orders.pop()[1])

    stores = Stores.open(spec.run_url, ring)
    chores = BackgroundChores(spec, stores, notify)
    hub.start(lambda send: Coordinator(spec, stores, world_size, "127.0.0.1", send, notify, chores), chores.results)
    outcomes: dict[int, Outcome] = {}

    def serve(rank: int) -> None:
        wire = connect(hub.address, key, rank)
        home = ring and replace(ring, home=ring.peers[rank % len(ring.peers)].node)
        outcomes[rank] = Supervisor(spec, rank, world_size, wire, start_fork_server=_fork_server, ring=home).run()

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), f"no outcome after {timeout_s} s"
    chores.close()
    for thread in set(threading.enumerate()) - others:
        if thread.name in _THREADS:
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} outlives its agent"
    assert len({outcome.ending for outcome in outcomes.values()}) == 1, outcomes
    return outcomes[0]
