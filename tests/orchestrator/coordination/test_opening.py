"""What the next attempt begins from when every agent still holds a snapshot."""

from __future__ import annotations

import uuid

import pytest

from orchestrator.checkpoint.attempts import claim_attempt, newest_attempt
from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.committing import carry_out
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.errors import StorageError, UnknownOutcomeError
from orchestrator.messages.attempts import Down, Ending, ExitKind, FromTrainer, Launch, Outcome, Restored, TrainerExit
from tests.orchestrator.checkpoint.states import make_state, save
from tests.orchestrator.group import Group
from trainers.exclusions import Exclusions
from trainers.progress import Progress


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def stable_steps(store: Store) -> list[int]:
    return [info.step for info in list_checkpoints(store) if info.state is CheckpointState.STABLE]


FIVE, TEN = Progress(5, 50), Progress(10, 100)


def test_all_begin_again_from_the_snapshot_that_all_of_them_hold(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    group.coordinator.handle(0, stale := group.receipt(0, 10))  # rank 1's is still on its way
    group.down(1, ExitKind.KILLED, pending=TEN)
    group.down(0, ExitKind.PEER_LOST, pending=TEN)
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=2, restore=None, memory=TEN, committed=FIVE)
    group.coordinator.handle(0, stale)
    group.save(10)  # the agents stored it again, for the new attempt
    assert stable_steps(store) == [10, 5]
    for rank in (0, 1):  # and once more, now that it is committed
        group.down(rank, ExitKind.KILLED, held=TEN)
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=3, restore=None, memory=TEN, committed=TEN)


def test_memory_is_not_used_unless_all_hold_the_same(store: Store) -> None:
    for held in ((TEN, FIVE), (TEN, None)):
        group = Group(store).join()
        group.down(0, ExitKind.KILLED, held=held[0])
        group.down(1, ExitKind.PEER_LOST, held=held[1])
        group.coordinator.tick()
        assert group.last(Launch).memory is None


def die(group: Group) -> None:
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, held=TEN)
    group.coordinator.tick()


@pytest.mark.parametrize("session", ["another", "s"])
def test_a_group_that_is_superseded_takes_nothing_back(store: Store, monkeypatch, session: str) -> None:
    """By another driver, or by the next group of its own: then it is the one that was cut off, and its driver knows."""
    group = Group(store).join()
    assert claim_attempt(store, {"session": session, "group": "another"}) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Store, "list", lambda *_: [])  # late
        die(group)
    assert group.last(Outcome).ending is Ending.SUPERSEDED
    assert group.last(Outcome).message.endswith("is superseded by attempt 2; it stops here")
    assert newest_attempt(store) == 2 and group.count(Launch) == 2


def test_a_driver_that_is_superseded_stops_when_its_agents_are_replaced(store: Store) -> None:
    before = claim_attempt(store, {"session": "earlier"})
    spec = {"attempts_before": before}
    assert Group(store, **spec).join().attempt == 2
    store.write("attempts/0003.json", [b"damaged"])  # which says not whose it is
    assert Group(store, **spec).join().attempt == 4, "its own earlier attempts are its own"
    newer = Group(store, session="newer").join()
    assert newer.attempt == 5, "a new command takes over"
    assert Group(store, **spec).join().last(Outcome).ending is Ending.SUPERSEDED
    assert newest_attempt(store) == 5
    die(newer)
    assert newer.attempt == 6


def test_a_claim_whose_answer_was_lost_is_the_groups_own(store: Store, monkeypatch) -> None:
    group, create = Group(store).join(), Store.create

    def unheard(store: Store, key: str, data: bytes) -> None:
        create(store, key, data)
        raise UnknownOutcomeError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", unheard)
        die(group)
    assert newest_attempt(store) == 2 and group.attempt == 1
    monkeypatch.setattr("orchestrator.coordination.coordinator.time.monotonic", lambda: float("inf"))
    group.coordinator.tick()
    assert (group.attempt, group.last(Launch).memory) == (3, TEN)


def test_memory_is_not_used_if_storage_lists_anything_newer(store: Store) -> None:
    group = Group(store).join()
    save(store, make_state(0), step=20, attempt=1, world_size=2)
    die(group)
    assert group.last(Launch).memory is None and group.last(Launch).restore == "0000000000200-0001"


def test_memory_that_a_trainer_refuses_is_not_offered_again(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, held=TEN)
    group.coordinator.tick()
    group.down(0, ExitKind.DAMAGED, held=TEN)
    group.down(1, ExitKind.DAMAGED, held=TEN)
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=3, restore="0000000000050-0001", committed=FIVE)
    assert "quarantined" not in group.kinds(), "the checkpoint is not to blame"


def test_from_memory_only_names_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(store).join()
    group.save(5)
    for name in ("read", "read_into"):
        monkeypatch.setattr(Store, name, lambda *_: pytest.fail("storage is read"))
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, held=FIVE)
    group.coordinator.tick()
    assert group.last(Launch).memory == FIVE


def test_a_snapshot_that_all_ranks_took_is_committed_before_the_run_gives_up(store: Store) -> None:
    group = Group(store).join()
    for rank in (0, 1):
        group.down(rank, ExitKind.CONFIG, pending=FIVE)
    assert group.coordinator.outcome is None
    group.save(5)
    assert group.last(Outcome).ending is Ending.CONFIG and stable_steps(store) == [5]


def test_a_save_that_ended_unheard_is_not_waited_for(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    for rank in (0, 1):  # both trainers died before their agents read that the save had ended
        group.down(rank, ExitKind.CONFIG, pending=FIVE)
    assert group.last(Outcome).ending is Ending.CONFIG


def test_a_commit_of_an_attempt_that_this_group_has_superseded_ends_nothing(store: Store) -> None:
    group = Group(store).join()
    group.chores.hand_over = None  # the store is slow
    group.save(5)
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, pending=FIVE)
    group.coordinator.tick()
    ended = carry_out(store, group.chores.jobs[0], lambda: False)
    assert ended.superseded
    group.coordinator.handle(0, ended)
    assert group.coordinator.outcome is None and group.last(Launch).memory == FIVE


def test_a_commit_is_tried_again_and_looks_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(store).join()
    group.chores.hand_over = None
    group.save(5)
    real, outcomes = Store.create, [StorageError("unreachable"), UnknownOutcomeError("no answer"), None]

    def unlucky(self: Store, key: str, data: bytes) -> None:
        error = outcomes.pop(0)
        if not isinstance(error, StorageError):
            real(self, key, data)  # the second one happens, and nobody learns it
        if error:
            raise error

    monkeypatch.setattr(Store, "create", unlucky)
    delayed: list[str] = []
    ended = carry_out(store, group.chores.jobs[0], lambda: True, lambda job, error: delayed.append(str(error)))
    assert ended.error is None and outcomes == [] and stable_steps(store) == [5]
    assert delayed == ["unreachable"], "said once"


def roll_back(group: Group) -> None:
    """Training diverges in step 11; what it learned from step 6 on is to be undone."""
    for rank in (0, 1):
        end = TrainerExit(kind=ExitKind.DIVERGED, message="m", skip=(6, 11))
        group.coordinator.handle(rank, Down(attempt=group.attempt, exit=end, pending=TEN, held=TEN))


def test_after_a_divergence_memory_is_not_used_and_its_snapshot_counts_as_any_checkpoint(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    roll_back(group)
    group.coordinator.tick()
    assert group.attempt == 1, "the snapshot is on its way to storage, and might be the one to go back to"
    group.save(10)
    group.coordinator.tick()
    left_out = Exclusions(steps=((6, 11),))
    expected = Launch(attempt=2, restore="0000000000050-0001", committed=FIVE, exclusions=left_out)
    assert group.last(Launch) == expected and stable_steps(store) == [5]
    # What is quarantined is newer, but nobody goes on from it.
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, held=Progress(7, 70))
    group.coordinator.tick()
    assert group.last(Launch).memory == Progress(7, 70) and group.last(Launch).exclusions == left_out


def test_a_run_that_is_to_stop_while_its_trainers_are_down_stores_their_snapshot_first(store: Store) -> None:
    group = Group(store).join()
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, pending=TEN)
    group.coordinator.take_order(HaltOrder(purpose=Purpose.END, reason="SIGTERM"))
    group.coordinator.tick()
    assert group.coordinator.outcome is None and group.attempt == 1
    group.save(10)
    assert group.last(Outcome) == Outcome(ending=Ending.STOPPED, message="SIGTERM: step 10 is saved")


def test_a_run_whose_trainers_die_on_the_way_to_a_stop_stores_their_snapshot_first(store: Store) -> None:
    group = Group(store).join()
    group.both(FromTrainer(attempt=1, message=Restored(progress=Progress())))
    group.coordinator.take_order(HaltOrder(purpose=Purpose.END, reason="SIGTERM"))
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, pending=TEN)
    assert group.coordinator.outcome is None
    group.save(10)
    assert group.last(Outcome) == Outcome(ending=Ending.STOPPED, message="SIGTERM: step 10 is saved")


def test_a_run_that_is_to_stop_while_trainers_begin_from_memory_stores_it_first(store: Store) -> None:
    group = Group(store).join()
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, pending=TEN)
    group.coordinator.tick()
    group.coordinator.take_order(HaltOrder(purpose=Purpose.END, reason="SIGTERM"))
    assert group.coordinator.outcome is None and group.attempt == 2
    group.save(10)
    assert group.last(Outcome) == Outcome(ending=Ending.STOPPED, message="SIGTERM: step 10 is saved")


def test_a_claim_that_led_to_no_launch_does_not_end_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(store).join()
    group.chores.hand_over = None
    group.save(5)
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED, pending=FIVE)
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.coordination.opening.Opener._lists_newer", unreachable)
        group.coordinator.tick()
    assert group.attempt == 1 and newest_attempt(store) == 2
    group.coordinator.handle(0, carry_out(store, group.chores.jobs[0], lambda: False))
    assert group.coordinator.outcome is None
    monkeypatch.setattr("orchestrator.coordination.coordinator.time.monotonic", lambda: float("inf"))
    group.coordinator.tick()
    assert (group.last(Launch).attempt, group.last(Launch).memory) == (3, FIVE)


def unreachable(*_: object) -> None:
    raise StorageError("unreachable")
