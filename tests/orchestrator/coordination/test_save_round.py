"""Saves as the coordinator sees them: shards of all ranks in, checkpoints in a real store in memory out."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest

from orchestrator.checkpoint.attempts import claim_attempt, read_attempts
from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.committing import CommitEnded
from orchestrator.messages.attempts import ExitKind, FromTrainer, Stepped
from orchestrator.messages.saves import Receipt, SaveEnded, SaveFailed
from tests.orchestrator.group import Group, stable_steps
from trainers.progress import Progress


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def test_commits_when_every_shard_is_there(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(1, group.receipt(1, 5))
    assert stable_steps(store) == [] and group.count(SaveEnded) == 0
    group.coordinator.handle(0, group.receipt(0, 5))
    assert stable_steps(store) == [5]
    assert group.last(SaveEnded) == SaveEnded(progress=Progress(5, 50))


def test_old_checkpoints_are_pruned_after_a_commit_and_only_then(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(0, group.receipt(0, 5))
    assert group.prunings == []
    group.coordinator.handle(1, group.receipt(1, 5))
    assert group.prunings == [1] and group.last(SaveEnded) == SaveEnded(progress=Progress(5, 50))
    assert (claim := next(read_attempts(store)))["versions"] == {}, "whose rows bind whoever has the same"
    assert claim["keep"] == {"last": 10, "every_steps": None, "best": None, "grace_s": 600.0}
    claim_attempt(store, {})
    group.save(10)
    assert group.prunings == [1]


def test_a_failed_shard_fails_the_save_and_nothing_else(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(0, group.receipt(0, 5))
    group.coordinator.handle(1, SaveFailed(attempt=1, progress=Progress(5, 50), error="disk full"))
    assert group.last(SaveEnded).error == "rank 1: disk full"
    assert stable_steps(store) == [] and group.coordinator.outcome is None
    group.save(10)
    assert stable_steps(store) == [10]


def test_a_tier_that_fails_ends_no_save_that_another_one_follows(store: Store) -> None:
    group = Group(store).join()
    for rank in (0, 1):
        lost = SaveFailed(attempt=1, progress=Progress(5, 50), tier="peer", last=False, error="no other node")
        group.coordinator.handle(rank, lost)
    assert group.kinds().count("save_failed") == 1 and group.count(SaveEnded) == 0
    group.save(5)
    assert stable_steps(store) == [5] and group.last(SaveEnded) == SaveEnded(progress=Progress(5, 50))


def test_shards_of_a_failed_save_are_not_mixed_with_those_of_the_next(store: Store) -> None:
    group = Group(store).join()
    for rank in (0, 1):
        group.coordinator.handle(rank, SaveFailed(attempt=1, progress=Progress(5, 50), error="disk full"))
    assert group.kinds().count("save_failed") == 1
    group.coordinator.handle(0, group.receipt(0, 5))  # late
    group.coordinator.handle(1, group.receipt(1, 10))
    assert stable_steps(store) == []
    group.coordinator.handle(0, group.receipt(0, 10))
    assert stable_steps(store) == [10]


def test_a_shard_of_a_save_that_another_rank_failed_is_none_of_the_next(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(0, group.receipt(0, 5))
    group.coordinator.handle(1, SaveFailed(attempt=1, progress=Progress(5, 50), error="disk full"))
    group.coordinator.handle(1, group.receipt(1, 10))
    assert group.chores.jobs == []
    group.coordinator.handle(0, group.receipt(0, 10))
    assert stable_steps(store) == [10]


def test_a_shard_of_an_earlier_attempt_is_none_of_this_one(store: Store) -> None:
    """It lies in another folder."""
    group = Group(store).join()
    stale = group.receipt(0, 5)
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED)
    group.coordinator.tick()
    group.coordinator.handle(0, stale)
    group.coordinator.handle(1, group.receipt(1, 5))
    assert group.attempt == 2 and group.chores.jobs == []


def in_memory(group: Group, rank: int, step: int, last: bool = False) -> Receipt:
    return replace(group.receipt(rank, step), tier="peer", last=last)


def test_a_shard_that_is_late_in_a_slow_tier_is_none_of_the_next_save(store: Store) -> None:
    group = Group(store, peer=Store.open(f"memory://{uuid.uuid4().hex}")).join()
    group.coordinator.handle(1, in_memory(group, 1, 5))
    group.coordinator.handle(1, SaveFailed(attempt=1, progress=Progress(5, 50), error="disk full"))
    group.coordinator.handle(1, in_memory(group, 1, 10, last=True))
    group.coordinator.handle(0, in_memory(group, 0, 5))
    assert group.chores.jobs == [] and group.coordinator.outcome is None
    group.coordinator.handle(0, in_memory(group, 0, 10, last=True))
    assert [(job.info.progress.step, job.tier) for job in group.chores.jobs] == [(10, "peer")]


def test_a_commit_that_is_late_in_a_slow_tier_takes_no_shard_of_the_next_save(store: Store) -> None:
    group = Group(store, peer=Store.open(f"memory://{uuid.uuid4().hex}")).join()
    group.chores.hand_over = None
    group.both(in_memory(group, 0, 5), in_memory(group, 1, 5))
    (slow,) = group.chores.jobs
    group.coordinator.handle(1, SaveFailed(attempt=1, progress=Progress(5, 50), error="disk full"))
    group.coordinator.handle(0, in_memory(group, 0, 10, last=True))
    ended = CommitEnded(attempt=1, progress=slow.info.progress, tier="peer", last=False, error="no peer answers")
    group.coordinator.handle(0, ended)
    group.coordinator.handle(1, in_memory(group, 1, 10, last=True))
    assert [job.info.progress.step for job in group.chores.jobs] == [5, 10], "or it is waited for without end"


def test_a_rank_that_takes_its_snapshot_after_the_save_has_failed_is_told_too(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(1, SaveFailed(attempt=1, progress=Progress(5, 50), error="disk full"))
    told = len(group.orders)  # rank 0 had nothing pending when it heard of the end: for it that was of no save
    group.coordinator.handle(0, group.receipt(0, 5))
    assert group.orders[told:] == [(0, SaveEnded(progress=Progress(5, 50), error="rank 1: disk full"))]
    group.save(10)
    assert stable_steps(store) == [10]


def test_a_checkpoint_has_the_numbers_of_its_step(store: Store) -> None:
    group = Group(store).join()
    for step, loss in ((4, 0.4), (5, 0.5), (6, 0.6)):
        stepped = Stepped(progress=Progress(step, step * 10), metrics={"loss": loss, "grad_norm": float("inf")})
        group.coordinator.handle(0, FromTrainer(attempt=1, message=stepped))
    group.save(5)
    (info,) = list_checkpoints(store)
    assert info.manifest is not None and info.manifest.metrics == {"loss": 0.5}
    group.save(10)  # of whose step nothing was heard
    newest, _ = list_checkpoints(store)
    assert newest.manifest is not None and newest.step == 10 and newest.manifest.metrics == {}


@pytest.mark.parametrize(
    ("num_bad", "step", "state"),
    [
        (0, 5, CheckpointState.STABLE),
        (1, 5, CheckpointState.UNHEALTHY),
        (2, 5, CheckpointState.UNHEALTHY),
        (2, 20, CheckpointState.STABLE),  # the end of the run
    ],
)
def test_while_steps_are_bad_a_checkpoint_is_not_one_to_go_on_from(
    store: Store, num_bad: int, step: int, state: CheckpointState
) -> None:
    group = Group(store).join()
    for rank in (0, 1):
        receipt = replace(group.receipt(rank, step), scalars={"divergence": {"num_bad": num_bad}})
        group.coordinator.handle(rank, receipt)
    assert [info.state for info in list_checkpoints(store)] == [state]
