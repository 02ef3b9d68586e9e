"""What has been saved of a state that turns out to be corrupted: marked at once, and never gone on from."""

from __future__ import annotations

import uuid

import pytest

from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.committing import carry_out
from orchestrator.coordination.failures import FailureConfig
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.coordination.opening import Opener
from orchestrator.messages.attempts import Down, Ending, ExitKind, FromTrainer, Launch, Outcome, Restored, TrainerExit
from orchestrator.stores import Stores
from tests.orchestrator.checkpoint.states import make_state, save
from tests.orchestrator.group import Group, make_spec, stable_steps
from trainers.exclusions import Exclusions
from trainers.progress import Progress

FIVE, TEN = Progress(5, 50), Progress(10, 100)
END = TrainerExit(kind=ExitKind.CORRUPTED, message="m", ranks=(1,), alike_step=7)


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def test_nothing_is_gone_on_from_that_was_saved_while_a_state_may_have_been_corrupted(store: Store) -> None:
    group = Group(store).join()
    group.save(5)
    group.save(10)
    both_find_it(group, None)
    assert stable_steps(store) == [5], "at once: even if the run ends here"
    group.coordinator.tick()
    assert group.last(Launch) == Launch(attempt=2, restore="0000000000050-0001", committed=FIVE)
    group.save(10)
    assert stable_steps(store) == [10, 5], "made anew"
    for rank in (0, 1):
        group.down(rank, ExitKind.KILLED)
    group.coordinator.tick()
    assert group.last(Launch).restore == "0000000000100-0002"


def both_find_it(group: Group, pending: Progress | None) -> None:
    group.both(Down(attempt=group.attempt, exit=END, pending=pending, held=TEN))


def saving_ten(store: Store, **spec: object) -> Group:
    """Step 5 is committed; all shards of step 10 are there, and the store is slow."""
    group = Group(store, **spec).join()
    group.both(FromTrainer(attempt=1, message=Restored(progress=Progress())))
    group.save(5)
    group.chores.hand_over = None
    group.save(10)
    return group


def let_the_commit_happen(store: Store, group: Group) -> None:
    assert carry_out(store, group.chores.jobs[-1], lambda: False).error is None
    newest = list_checkpoints(store)[0]
    assert newest.ref.samples_seen == 100 and newest.state is CheckpointState.QUARANTINED
    assert "faulty; what was made from step 8 on may be wrong" in newest.detail
    assert stable_steps(store) == [5]


def test_a_run_that_gives_up_while_such_a_state_is_saved_leaves_it_marked(store: Store) -> None:
    group = saving_ten(store, failures=FailureConfig(corrupted=1))
    both_find_it(group, TEN)
    assert group.last(Outcome).ending is Ending.GAVE_UP, "there is nothing to wait for"
    let_the_commit_happen(store, group)


def test_a_run_that_is_told_to_stop_while_such_a_state_is_saved_leaves_it_marked(store: Store) -> None:
    group = saving_ten(store)
    group.coordinator.take_order(HaltOrder(purpose=Purpose.END, reason="SIGTERM"))
    both_find_it(group, TEN)
    assert group.last(Outcome).ending is Ending.STOPPED
    let_the_commit_happen(store, group)


def test_the_first_to_find_it_is_enough_if_the_others_never_end(store: Store) -> None:
    """A device that computes wrongly may also be one that can not be given back; then the whole group is replaced."""
    group = saving_ten(store)
    group.coordinator.handle(1, Down(attempt=1, exit=END, pending=TEN, held=TEN))
    assert group.coordinator.outcome is None
    let_the_commit_happen(store, group)
    assert [event.kind for event in group.events].count("corrupted") == 1
    assert Group(store).join().last(Launch).restore == "0000000000050-0001"


def test_a_state_from_before_it_was_last_found_sound_is_saved_as_any(store: Store) -> None:
    group = Group(store, failures=FailureConfig(corrupted=1)).join()
    both_find_it(group, FIVE)
    assert group.coordinator.outcome is None
    group.save(5)
    assert group.last(Outcome).ending is Ending.GAVE_UP and stable_steps(store) == [5]


def test_in_the_memory_of_the_nodes_it_is_marked_too(store: Store) -> None:
    """They outlive this group of agents, and what it knows."""
    memory = Store.open(f"memory://{uuid.uuid4().hex}")
    for step in (5, 10):
        save(memory, make_state(0), step=step)
    opener = Opener(make_spec(store.url), Stores(storage=store, peer=memory), 2, lambda *_, **__: None)
    attempt = opener.open("start", Exclusions()).attempt
    opener.distrust(8, attempt, None)
    assert stable_steps(memory) == [5]
