"""Rank 0's coordinator through the life of one attempt, with agents that are only messages."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import ShardReceipt
from orchestrator.coordination.committing import CommitEnded, CommitJob, Picture
from orchestrator.coordination.coordinator import Coordinator
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.coordination.watchdog import Phase
from orchestrator.messages.attempts import (
    Down,
    ExitKind,
    FromTrainer,
    Joined,
    Launch,
    Restored,
    Started,
    Stepped,
    TrainerExit,
)
from orchestrator.messages.liveness import AtGate, Beat, Busy, Entered, Told
from orchestrator.messages.saves import Receipt
from orchestrator.run_spec import RunSpec
from orchestrator.sections import CheckpointConfig, TierName
from orchestrator.stores import Stores
from trainers.progress import Progress

_SAVED = Progress(5, 50)


class _NoChores:
    """Takes orders for commits and carries none out; what a commit costs is measured by itself."""

    def __init__(self) -> None:
        self.jobs: list[CommitJob] = []

    def commit(self, job: CommitJob) -> None:
        self.jobs.append(job)

    def keep(self, picture: Picture) -> None:
        pass

    def prune(self, attempt: int, tier: TierName) -> None:
        pass


def attempt_and_save(world_size: int, shards: Sequence[ShardReceipt]) -> int:
    """Launch, train, save, be watched, stop all ranks after one step, lose one, launch again.

    Returns the number of messages that the agents were sent.
    """
    ranks, chores, sent = range(world_size), _NoChores(), []
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    coordinator = Coordinator(
        _spec(store.url),
        Stores(storage=store),
        world_size,
        "host",
        lambda rank, order: sent.append(order),
        lambda event: None,
        chores,
    )
    for rank in ranks:
        coordinator.handle(rank, Joined(rank=rank))
    for message in (Started(attempt=1, pid=1, agent_pid=1), _said(Restored(progress=Progress()))):
        _all(coordinator, ranks, message)
    coordinator.handle(0, _said(Stepped(progress=_SAVED, metrics={"loss": 1.0})))
    for phase in (Phase.SAVING, Phase.TRAINING):
        _all(coordinator, ranks, _said(Entered(phase=phase)))
    for rank, shard in enumerate(shards):
        coordinator.handle(rank, Receipt(attempt=1, progress=_SAVED, shard=shard, scalars={}))
    assert len(chores.jobs) == 1
    coordinator.handle(0, CommitEnded(attempt=1, progress=_SAVED, tier="storage"))
    for message in (Beat(attempt=1), Busy(attempt=1, num_steps=10, seconds=1.0)):
        _all(coordinator, ranks, message)
    coordinator.take_order(HaltOrder(purpose=Purpose.GROW, reason="room for more"))
    coordinator.handle(0, _said(AtGate(progress=_SAVED)))
    _all(coordinator, ranks, Told(attempt=1, step=10))
    end = TrainerExit(kind=ExitKind.KILLED, message="killed")
    _all(coordinator, ranks, Down(attempt=1, exit=end, pending=None))
    coordinator.tick()
    assert sum(isinstance(order, Launch) for order in sent) >= world_size
    return len(sent)


def _all(coordinator: Coordinator, ranks: range, message: object) -> None:
    """The same from every rank; the clock is looked at after each, as the hub does."""
    for rank in ranks:
        coordinator.handle(rank, message)
        coordinator.tick()


def _said(message: object) -> FromTrainer:
    return FromTrainer(attempt=1, message=message)


def _spec(url: str) -> RunSpec:
    return RunSpec(
        run_id="bench",
        run_url=url,
        session="bench",
        config={},
        config_hash="",
        strategy="fsdp",
        checkpoint=CheckpointConfig(every_steps=5),
        num_steps=1000,
        versions={},
        preload=(),
    )
