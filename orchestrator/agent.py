"""The Ray Train worker function: a light process that owns a rank's trainer, snapshots and uploads."""

from __future__ import annotations

import secrets
from typing import Any, cast

import ray
import ray.train
import ray.train.collective

from orchestrator.checkpoint.store import Store
from orchestrator.coordinator import Coordinator
from orchestrator.hub import Hub, connect
from orchestrator.messages import Event
from orchestrator.pruning import BackgroundPruner
from orchestrator.run_spec import RunSpec
from orchestrator.supervisor import Supervisor
from orchestrator.tracking.recorder import Recorder
from orchestrator.tracking.sinks import Sink


def agent(arguments: dict[str, Any]) -> None:
    """Serve this rank until the run has an outcome. Runs on every Ray Train worker.

    It returns normally however the run ends, so that Ray restarts only agents and nodes that died; the outcome goes to
    the driver through `mailbox`.

    Args:
        arguments: `spec`, the `RunSpec`; `mailbox`, the actor handle that takes `Event`s.
    """
    spec: RunSpec = arguments["spec"]
    mailbox = arguments["mailbox"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    wire = None
    sinks: list[Sink] = []
    if rank == 0:
        host = ray.util.get_node_ip_address()
        hub = Hub(host, key := secrets.token_bytes(32), world_size)
        wire = (hub.address, key)

        def tell(event: Event) -> None:
            mailbox.put.remote(event)  # not waited for: a driver that is slow to listen must not hold up a decision

        def notify(event: Event) -> None:
            tell(event)
            for sink in sinks:
                sink.take(event)

        sinks.append(Recorder(spec.run_url, spec.session, report=tell))
        prune = BackgroundPruner(spec, notify).request
        hub.start(lambda send: Coordinator(spec, Store.open(spec.run_url), world_size, host, send, notify, prune))
    address, key = cast(tuple[tuple[str, int], bytes], ray.train.collective.broadcast_from_rank_zero(wire))
    try:
        Supervisor(spec, rank, world_size, connect(address, key, rank)).run()
    finally:
        for sink in sinks:
            sink.close()
