"""The bare loop as one of several replicas under torchft, put together as in Ray's own example.

When one is killed, the others go on without it as soon as it counts as dead. A new one gets the state from another
replica. Nothing is written to storage.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torchft import (  # pyright: ignore[reportMissingImports]
    DistributedDataParallel,
    Manager,
    Optimizer,
    ProcessGroupGloo,
)
from torchft.checkpointing.pg_transport import PGTransport  # pyright: ignore[reportMissingImports]

from bench.bare_loop import BareLoop
from bench.lines import say
from bench.workload import pin

_PATIENCE = timedelta(minutes=10)
"""Of every operation: longer than this program is stopped while others are measured. A killed peer is noticed by its
connections, however long this is."""


def train(config: dict[str, Any]) -> None:
    """Train for ever, in a process group of this rank alone.

    A step is said when it is committed, with the number of replicas that took part in it.
    """
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    pin(rank)
    group = ProcessGroupGloo(timeout=_PATIENCE)
    manager = Manager(
        pg=group,
        load_state_dict=lambda found: _load(loop, found),
        state_dict=lambda: _state(loop),
        min_replica_size=1,
        timeout=_PATIENCE,
        quorum_timeout=_PATIENCE,
        rank=0,
        world_size=1,
        replica_id=f"replica_{rank}",
        checkpoint_transport=PGTransport(group, timeout=_PATIENCE, device=torch.device("cpu")),
    )
    replicated = {**config, "parallel": {"strategy": "ddp"}}
    loop = BareLoop(replicated, ema=True, replicate=lambda model: DistributedDataParallel(manager, model))
    optimizer = Optimizer(manager, loop.optimizer)
    say("built")
    while True:
        before = manager.current_step()
        optimizer.zero_grad()  # asks who takes part, beside the forward pass
        loop.backward()
        optimizer.step()  # if nothing went wrong
        if manager.current_step() > before:
            loop.average()
            say("step", step=manager.current_step(), replicas=manager.num_participants())


def _state(loop: BareLoop) -> dict[str, Any]:
    return {
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "averages": loop.averages,
    }


def _load(loop: BareLoop, found: dict[str, Any]) -> None:
    loop.model.load_state_dict(found["model"])
    loop.optimizer.load_state_dict(found["optimizer"])
    for average, value in zip(loop.averages, found["averages"], strict=True):
        average.copy_(value)
