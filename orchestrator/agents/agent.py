"""The Ray Train worker function: a light process that owns a rank's trainer, snapshots and uploads."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import ray
import ray.train
import ray.train.collective
from ray.exceptions import RayError

from orchestrator.agents.forkserver import open_fork_server
from orchestrator.agents.supervisor import Supervisor
from orchestrator.checkpoint.peer_objects import PeerRing
from orchestrator.cluster.keepers import shared_name
from orchestrator.cluster.mailbox import Outbox, take_orders
from orchestrator.cluster.peer_memory import ask_ring, home
from orchestrator.coordination.committing import BackgroundChores
from orchestrator.coordination.coordinator import Coordinator
from orchestrator.coordination.hub import Hub, connect
from orchestrator.errors import RegroupError
from orchestrator.messages.attempts import Ending, Event
from orchestrator.run_spec import RunSpec
from orchestrator.stores import Stores
from orchestrator.tracking.recorder import Recorder

_Wire = tuple[tuple[str, int], bytes, PeerRing | None]
"""Where the hub listens, the key to it, and the memory of the nodes."""


def agent(arguments: dict[str, Any]) -> None:
    """Serve this rank until the run has an outcome. Runs on every Ray Train worker.

    It returns normally however the run ends; the outcome goes to the driver through `mailbox`. So whatever raises or
    dies here is for Ray Train to place anew.

    Args:
        arguments: `spec`, the `RunSpec`; `mailbox`, the actor handle that takes `Event`s and has orders; `directory`,
            the one that knows the memory of the nodes, or None.

    Raises:
        RegroupError: the group is to be placed anew, on other nodes.
        ConnectionError: another agent is gone.
    """
    spec: RunSpec = arguments["spec"]
    mailbox, directory = arguments["mailbox"], arguments["directory"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    with ExitStack() as closing:
        wire = _start_hub(spec, world_size, mailbox, directory, closing) if rank == 0 else None
        address, key, ring = cast(_Wire, ray.train.collective.broadcast_from_rank_zero(wire))
        node = ray.get_runtime_context().get_node_id()
        wire, forks = connect(address, key, rank), partial(open_fork_server, shared_name(spec.session, node))
        outcome = Supervisor(spec, rank, world_size, wire, node, forks, ring=home(ring)).run()
    if outcome.ending is Ending.REGROUP:
        raise RegroupError(outcome.message)


def _find_peers(directory: Any, notify: Callable[[Event], None]) -> PeerRing | None:
    """The memory of the nodes, if the run uses it and it can be had."""
    if directory is None:
        return None
    try:
        ring = ask_ring(directory)
    except RayError as error:  # this group of agents does without; waiting for it would be no better
        why = f"who knows it does not answer ({type(error).__name__})"
        notify(Event(kind="peers_lost", fields={"error": why}, time_s=time.time()))
        return None
    notify(Event(kind="peers", fields={"num_nodes": len(ring.peers)}, time_s=time.time()))
    return ring


def _start_hub(spec: RunSpec, world_size: int, mailbox: Any, directory: Any, closing: ExitStack) -> _Wire:
    """Start the coordinator on rank 0.

    Args:
        closing: gets what is to be closed in the end.
    """
    host = ray.util.get_node_ip_address()
    hub = Hub(host, key := secrets.token_bytes(32), world_size)
    tell = Outbox(mailbox).put

    def notify(event: Event) -> None:
        tell(event)
        recorder.take(event)

    recorder = Recorder(spec.run_url, spec.session, report=tell)
    closing.callback(recorder.close)
    ring = _find_peers(directory, notify)
    stores = Stores.open(spec.run_url, home(ring))
    chores = BackgroundChores(spec, stores, notify)
    closing.callback(chores.close)
    hub.start(lambda send: Coordinator(spec, stores, world_size, host, send, notify, chores), chores.results)
    take_orders(mailbox, hub.order)
    return hub.address, key, ring
