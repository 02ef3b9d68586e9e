"""The coordinator alone: messages in, orders out, a real store in memory."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from orchestrator.checkpoint.attempts import claim_attempt, newest_attempt
from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import write_shard
from orchestrator.coordinator import Coordinator, RunSpec
from orchestrator.failures import MAX_ATTEMPTS_WITHOUT_PROGRESS
from orchestrator.messages import (
    Down,
    Ending,
    Event,
    ExitKind,
    Finished,
    FromTrainer,
    Joined,
    Kill,
    Launch,
    Listening,
    Outcome,
    Receipt,
    Rendezvous,
    SaveEnded,
    SaveFailed,
    Stepped,
    TrainerExit,
)
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

ROWS = 4


class Group:
    """Two agents that do nothing but remember their orders."""

    def __init__(self, store: Store, session: str = "s") -> None:
        self.store = store
        self.orders: list[tuple[int, object]] = []
        self.events: list[Event] = []
        spec = RunSpec(
            run_id="r",
            run_url=store.url,
            session=session,
            config={},
            config_hash="h",
            strategy="fsdp",
            every_steps=5,
            num_steps=20,
            versions={},
            preload=(),
        )
        self.coordinator = Coordinator(
            spec, store, 2, "host", lambda rank, order: self.orders.append((rank, order)), self.events.append
        )

    def join(self) -> Group:
        self.both(Joined(rank=0), Joined(rank=1))
        return self

    def both(self, first: object, second: object | None = None) -> None:
        self.coordinator.handle(0, first)
        self.coordinator.handle(1, second or first)

    def last(self, kind: type) -> Any:
        return next(order for _, order in reversed(self.orders) if isinstance(order, kind))

    def count(self, kind: type) -> int:
        return sum(isinstance(order, kind) for _, order in self.orders)

    @property
    def attempt(self) -> int:
        return self.last(Launch).attempt

    def receipt(self, rank: int, step: int) -> Receipt:
        """What rank's agent sends when its shard of a one-tensor state is stored."""
        spec = TensorSpec(name="model/w", dtype="F32", shape=(ROWS, 2))
        data = memoryview(bytes([step % 256]) * (ROWS // 2 * 8))
        chunk = Chunk(spec=spec, row_offset=rank * 2, num_rows=2, begin=0, end=len(data))
        progress = Progress(step, step * 10)
        key = CheckpointRef(progress.samples_seen, self.attempt).shard(rank, 2)
        shard = write_shard(self.store, key, [chunk], data, {})
        return Receipt(attempt=self.attempt, progress=progress, shard=shard, scalars={"n": step})

    def save(self, step: int) -> None:
        self.both(self.receipt(0, step), self.receipt(1, step))

    def down(self, rank: int, kind: ExitKind, pending: Progress | None = None, message: str = "m") -> None:
        end = TrainerExit(kind=kind, message=message)
        self.coordinator.handle(rank, Down(attempt=self.attempt, exit=end, pending=pending))

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def stable_steps(store: Store) -> list[int]:
    infos = [info for info in list_checkpoints(store) if info.state is CheckpointState.STABLE]
    return [info.manifest.progress.step for info in infos if info.manifest]


def test_launches_when_all_have_joined(store: Store) -> None:
    group = Group(store)
    group.coordinator.handle(0, Joined(rank=0))
    assert group.orders == []
    group.coordinator.handle(1, Joined(rank=1))
    assert group.orders == [(rank, Launch(attempt=1, restore=None)) for rank in (0, 1)]
    assert newest_attempt(store) == 1


def test_passes_the_rendezvous_on(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(0, FromTrainer(attempt=1, message=Listening(port=99)))
    assert group.last(Rendezvous) == Rendezvous(host="host", port=99)


def test_commits_when_every_shard_is_there(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(1, group.receipt(1, 5))
    assert stable_steps(store) == [] and group.count(SaveEnded) == 0
    group.coordinator.handle(0, group.receipt(0, 5))
    assert stable_steps(store) == [5]
    assert group.last(SaveEnded) == SaveEnded(progress=Progress(5, 50))


def test_a_failed_shard_fails_the_save_and_nothing_else(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(0, group.receipt(0, 5))
    group.coordinator.handle(1, SaveFailed(attempt=1, progress=Progress(5, 50), error="disk full"))
    assert group.last(SaveEnded).error == "rank 1: disk full"
    assert stable_steps(store) == [] and group.coordinator.outcome is None
    group.save(10)
    assert stable_steps(store) == [10]


def test_a_death_ends_all_and_starts_all_from_the_newest(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    group.down(1, ExitKind.KILLED)
    assert group.last(Kill) == Kill(attempt=1) and group.count(Launch) == 2
    group.down(0, ExitKind.PEER_LOST)
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=2, restore="0000000000050-0001")


def test_a_snapshot_that_all_ranks_took_is_committed_before_the_restart(store: Store) -> None:
    group = Group(store).join()
    pending = Progress(5, 50)
    group.down(1, ExitKind.KILLED, pending)
    group.down(0, ExitKind.PEER_LOST, pending)
    group.coordinator.tick()
    assert group.attempt == 1, "waits for the shards"
    group.save(5)
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=2, restore="0000000000050-0001")


def test_a_snapshot_that_only_some_took_is_not_waited_for(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.handle(0, group.receipt(0, 5))
    group.down(0, ExitKind.PEER_LOST, Progress(5, 50))
    group.down(1, ExitKind.KILLED, None)
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=2, restore=None)
    # Its shard must not be mixed with one of the new attempt.
    group.coordinator.handle(1, group.receipt(1, 5))
    assert stable_steps(store) == []


def test_messages_of_an_earlier_attempt_count_for_nothing(store: Store) -> None:
    group = Group(store).join()
    stale = [group.receipt(0, 5), group.receipt(1, 5)]
    group.down(1, ExitKind.KILLED)
    group.down(0, ExitKind.PEER_LOST)
    group.coordinator.tick()
    group.both(*stale)
    group.both(FromTrainer(attempt=1, message=Finished(progress=Progress(20, 200))))
    group.down_count = group.count(Kill)
    group.coordinator.handle(0, Down(attempt=1, exit=TrainerExit(kind=ExitKind.KILLED, message="m"), pending=None))
    assert stable_steps(store) == [] and group.coordinator.outcome is None and group.count(Kill) == group.down_count


def test_damage_found_by_a_trainer_is_quarantined_and_the_older_one_taken(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    group.save(10)
    again = Group(store).join()
    assert again.last(Launch).restore == "0000000000100-0001"
    store.write("checkpoints/0000000000100-0001/shard-00001-of-00002.safetensors", [b"x" * 9])
    again.down(1, ExitKind.DAMAGED)
    again.down(0, ExitKind.PEER_LOST)
    again.coordinator.tick()
    assert again.last(Launch).restore == "0000000000050-0001"
    event = next(event for event in again.events if event.kind == "quarantined")
    assert "shard-00001-of-00002.safetensors has 9 bytes" in event.fields["reason"]
    assert stable_steps(store) == [5]


def test_a_damaged_manifest_is_quarantined_at_the_start(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    group.save(10)
    data = bytearray(store.read("checkpoints/0000000000100-0001/manifest.json"))
    data[20] ^= 1
    store.write("checkpoints/0000000000100-0001/manifest.json", [bytes(data)])
    again = Group(store).join()
    assert again.last(Launch).restore == "0000000000050-0001"
    assert "quarantined" in again.kinds()


def test_the_same_error_at_the_same_step_ends_the_run(store: Store) -> None:
    group = Group(store).join()
    for _ in range(3):
        assert group.coordinator.outcome is None
        step = Stepped(progress=Progress(7, 70), metrics={"loss": 1.0})
        group.coordinator.handle(0, FromTrainer(attempt=group.attempt, message=step))
        group.down(1, ExitKind.ERROR, message="KeyError('x')")
        group.down(0, ExitKind.PEER_LOST)
        group.coordinator.tick()
    assert group.last(Outcome).ending is Ending.GAVE_UP
    assert group.last(Outcome).message == "step 8 failed 3 times in the same way; rank 1: KeyError('x')"


def test_a_configuration_error_ends_the_run_at_once(store: Store) -> None:
    group = Group(store).join()
    group.down(1, ExitKind.CONFIG, message="model.args.x=1 is wrong")
    group.down(0, ExitKind.PEER_LOST)
    assert group.last(Outcome) == Outcome(ending=Ending.CONFIG, message="model.args.x=1 is wrong")


def test_groups_of_agents_that_die_without_progress_end_the_run(store: Store) -> None:
    for _ in range(MAX_ATTEMPTS_WITHOUT_PROGRESS):
        group = Group(store).join()
        assert group.coordinator.outcome is None
    assert Group(store).join().last(Outcome).ending is Ending.GAVE_UP
    assert Group(store, session="another driver").join().coordinator.outcome is None


def test_a_superseded_attempt_stops_at_its_commit(store: Store) -> None:
    group = Group(store).join()
    claim_attempt(store, {})
    group.save(5)
    assert group.last(Outcome).ending is Ending.SUPERSEDED
    assert stable_steps(store) == []


def test_finished_when_every_rank_says_so(store: Store) -> None:
    group = Group(store).join()
    end = FromTrainer(attempt=1, message=Finished(progress=Progress(20, 200)))
    group.coordinator.handle(0, end)
    assert group.coordinator.outcome is None
    group.coordinator.handle(1, end)
    assert group.last(Outcome).ending is Ending.FINISHED


def test_a_lost_agent_ends_the_trainers_and_waits_for_its_replacement(store: Store) -> None:
    group = Group(store).join()
    group.coordinator.agent_lost(1)
    assert group.last(Kill) == Kill(attempt=1)
    group.down(0, ExitKind.PEER_LOST)
    group.coordinator.tick()
    assert group.coordinator.outcome is None and group.count(Launch) == 2
