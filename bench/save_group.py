"""A group of real agents without Ray: each in a process of its own, on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.connection import Connection
from typing import cast

from orchestrator.agents.supervisor import Supervisor
from orchestrator.coordination.committing import BackgroundChores
from orchestrator.coordination.coordinator import Coordinator
from orchestrator.coordination.hub import Hub, connect
from orchestrator.messages.attempts import Ending, Outcome
from orchestrator.run_spec import RunSpec
from orchestrator.stores import Stores

_CONTEXT = multiprocessing.get_context("spawn")
_HOST, _KEY = "127.0.0.1", b"bench"
_TIMEOUT_S = 1200.0


def run_group(spec: RunSpec, world_size: int) -> None:
    """Run to the end.

    Raises:
        RuntimeError: it did not finish, and why.
    """
    with contextlib.ExitStack() as stack:
        pipes: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_agent, args=(spec, rank, world_size, theirs))
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            theirs.close()
            pipes.append(cast(Connection, ours))
        address = pipes[0].recv()
        for pipe in pipes:
            pipe.send(address)
        for pipe in pipes:
            if not pipe.poll(_TIMEOUT_S):
                raise RuntimeError(f"no end within {_TIMEOUT_S:g} s")
            outcome: Outcome = pipe.recv()
            if outcome.ending is not Ending.FINISHED:
                raise RuntimeError(f"{outcome.ending.value}: {outcome.message}")


def _agent(spec: RunSpec, rank: int, world_size: int, parent: Connection) -> None:
    if rank == 0:
        stores = Stores.open(spec.run_url, None)
        hub = Hub(_HOST, _KEY, world_size)
        chores = BackgroundChores(spec, stores, lambda _: None)
        hub.start(
            lambda send: Coordinator(spec, stores, world_size, _HOST, send, lambda _: None, chores), chores.results
        )
        parent.send(hub.address)
    parent.send(Supervisor(spec, rank, world_size, connect(parent.recv(), _KEY, rank)).run())
