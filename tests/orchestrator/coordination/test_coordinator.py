"""The coordinator alone: messages in, orders out, a real store in memory."""

from __future__ import annotations

import uuid

import pytest

from orchestrator.checkpoint.attempts import claim_attempt, newest_attempt
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.failures import FailureConfig
from orchestrator.errors import StorageError
from orchestrator.messages.attempts import (
    Down,
    Ending,
    ExitKind,
    Finished,
    FromTrainer,
    Joined,
    Kill,
    Launch,
    Listening,
    Outcome,
    Rendezvous,
    Stepped,
    TrainerExit,
)
from orchestrator.messages.saves import SaveFailed
from tests.orchestrator.group import Group, stable_steps
from trainers.progress import Progress


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


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


def test_a_death_ends_all_and_starts_all_from_the_newest(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    group.down(1, ExitKind.KILLED)
    assert group.last(Kill) == Kill(attempt=1) and group.count(Launch) == 2
    group.down(0, ExitKind.PEER_LOST)
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=2, restore="0000000000050-0001", committed=Progress(5, 50))


def test_a_run_that_may_not_go_on_without_a_checkpoint_stops_as_storage_failure(store: Store) -> None:
    group = Group(store).join()
    end = FromTrainer(attempt=1, message=Finished(progress=Progress(5, 50), stopped="stopped at step 5: unreachable"))
    group.coordinator.handle(0, end)
    assert group.coordinator.outcome is None
    group.coordinator.handle(1, end)
    assert group.last(Outcome) == Outcome(ending=Ending.STORAGE, message="stopped at step 5: unreachable")


def test_a_failed_save_of_one_rank_counts_no_second_failure(store: Store) -> None:
    group = Group(store).join()
    group.down(1, ExitKind.KILLED)
    group.down(0, ExitKind.PEER_LOST, pending=Progress(5, 50))
    group.coordinator.handle(0, SaveFailed(attempt=1, progress=Progress(5, 50), error="disk full"))
    assert group.kinds().count("failure") == 1


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
    kills = group.count(Kill)
    group.coordinator.handle(0, Down(attempt=1, exit=TrainerExit(kind=ExitKind.KILLED, message="m"), pending=None))
    assert stable_steps(store) == [] and group.coordinator.outcome is None and group.count(Kill) == kills


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
    for _ in range(FailureConfig().agents):
        group = Group(store).join()
        assert group.coordinator.outcome is None
    assert Group(store).join().last(Outcome).ending is Ending.GAVE_UP
    assert Group(store, session="another driver").join().coordinator.outcome is None


def test_trainers_that_die_often_are_no_groups_of_agents(store: Store) -> None:
    for _ in range(FailureConfig().agents):
        claim_attempt(store, {"session": "s", "from": None, "group": "one"})
    assert Group(store).join().coordinator.outcome is None


def test_a_run_of_many_attempts_begins_as_quickly_as_any(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(9):
        claim_attempt(store, {"session": "earlier"})
    read, keys = Store.read, []
    monkeypatch.setattr(Store, "read", lambda store, key, *place: keys.append(key) or read(store, key, *place))
    assert Group(store, attempts_before=9).join().attempt == 10
    assert [key for key in keys if key.startswith("attempts/")] == ["attempts/0009.json"]


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
    group.coordinator.agent_lost(1, "gone")
    assert group.last(Kill) == Kill(attempt=1)
    group.down(0, ExitKind.PEER_LOST)
    group.coordinator.tick()
    assert group.coordinator.outcome is None and group.count(Launch) == 2


def test_storage_that_comes_back_delays_the_launch_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(store)

    def fail(*_: object) -> None:
        raise StorageError("unreachable")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "list", fail)
        group.join()
        assert group.orders == [] and group.kinds() == ["store", "storage_trouble"]
        assert group.coordinator.wait_s and group.coordinator.wait_s > 0
    monkeypatch.setattr("orchestrator.coordination.coordinator.time.monotonic", lambda: float("inf"))
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=1, restore=None)


def test_storage_that_stays_away_ends_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("unreachable")

    now = [0.0]
    monkeypatch.setattr("orchestrator.coordination.next_launch.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Store, "list", fail)
    group = Group(store).join()
    while group.coordinator.outcome is None:
        now[0] += 1.0
        group.coordinator.tick()
    assert group.last(Outcome) == Outcome(ending=Ending.STORAGE, message="unreachable")
    assert 580 < now[0] < 605, "as long as a save waits: checkpoint.deadline_s"
