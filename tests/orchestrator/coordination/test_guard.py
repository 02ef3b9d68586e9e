"""Hangs and ordered stops as the coordinator sees them: a real store, a clock that the test moves."""

from __future__ import annotations

import time
import uuid

import pytest

from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.halting import HaltOrder, Purpose
from orchestrator.messages.attempts import (
    Ending,
    ExitKind,
    Finished,
    FromTrainer,
    Kill,
    Launch,
    Outcome,
    Restored,
    Started,
    Stepped,
)
from orchestrator.messages.liveness import AtGate, Beat, Dump, Gate, Stack, StopAt, Told
from orchestrator.messages.saves import SaveFailed
from tests.orchestrator.coordination.test_blame import IN_USER_CODE, WAITING
from tests.orchestrator.group import Group
from trainers.progress import Progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("orchestrator.coordination.guard.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def group(clock: Clock) -> Group:
    """Trains; steps of 0.1 s."""
    group = Group(Store.open(f"memory://{uuid.uuid4().hex}")).join()
    group.both(FromTrainer(attempt=1, message=Restored(progress=Progress())))
    for step in range(1, 4):
        clock.now += 0.1
        group.coordinator.handle(0, stepped(step))
    return group


def stepped(step: int) -> FromTrainer:
    return FromTrainer(attempt=1, message=Stepped(progress=Progress(step, step * 10), metrics={"loss": 1.0}))


def wait(group: Group, clock: Clock, seconds: float) -> None:
    for _ in range(round(seconds / 0.25)):
        clock.now += 0.25
        group.coordinator.tick()


def test_a_hang_ends_the_attempt_and_names_the_rank(group: Group, clock: Clock) -> None:
    wait(group, clock, 4.5)
    assert group.count(Dump) == 0
    wait(group, clock, 1.0)
    assert group.count(Dump) == 2 and group.count(Kill) == 0
    group.both(Stack(attempt=1, state="S", text=WAITING), Stack(attempt=1, state="S", text=IN_USER_CODE))
    group.coordinator.tick()
    kills = {rank: order for rank, order in group.orders if isinstance(order, Kill)}
    assert kills[0].cause is None and kills[1].cause is not None
    assert kills[1].cause.kind is ExitKind.HANG and "/app/dataset.py:12" in kills[1].cause.message
    (hang,) = [event.fields for event in group.events if event.kind == "hang"]
    assert hang["ranks"] == [1]
    end = time.monotonic() + 10
    while len(group.store.list("stacks")) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert group.store.read("stacks/0001-00001.txt").decode().endswith(IN_USER_CODE)


def test_a_step_during_the_inquiry_calls_it_off(group: Group, clock: Clock) -> None:
    wait(group, clock, 5.5)
    assert group.count(Dump) == 2
    group.coordinator.handle(0, stepped(4))
    wait(group, clock, 4.0)
    assert group.count(Kill) == 0
    wait(group, clock, 8 * 5.5 - 3.0)  # the limit that follows from that step is over, the time to answer not
    assert group.count(Dump) == 4 and group.count(Kill) == 0, "all are asked anew"


def test_agents_that_do_not_answer_are_not_waited_for(group: Group, clock: Clock) -> None:
    wait(group, clock, 5.5)
    group.coordinator.handle(0, Stack(attempt=1, state="S", text=WAITING))
    wait(group, clock, 3.5)
    assert group.count(Kill) == 2


def test_a_stopped_trainer_is_known_at_once(group: Group, clock: Clock) -> None:
    group.coordinator.handle(1, Beat(attempt=1, stopped_s=1.5))
    group.coordinator.tick()
    assert group.count(Dump) == 0
    group.coordinator.handle(1, Beat(attempt=1, stopped_s=2.0))
    group.coordinator.tick()
    group.both(Stack(attempt=1, state="S", text=WAITING), Stack(attempt=1, state="T", text=""))
    group.coordinator.tick()
    assert "SIGSTOP" in group.last(Kill).cause.message


@pytest.mark.parametrize(("started", "limit_s"), [(True, 120), (False, 1800)])
def test_a_trainer_that_can_not_be_ended_costs_its_agents_and_not_the_run(
    group: Group, clock: Clock, started: bool, limit_s: int
) -> None:
    for rank in (0, 1) if started else (1,):  # the other one is still waiting for its imports
        group.coordinator.handle(rank, Started(attempt=1, pid=1, agent_pid=1))
    group.down(1, ExitKind.KILLED)
    wait(group, clock, limit_s - 1)
    assert group.coordinator.outcome is None
    wait(group, clock, 1.0)
    assert group.last(Outcome).ending is Ending.REGROUP and group.kinds().count("outcome") == 0
    (lost,) = [event.fields for event in group.events if event.kind == "agent_lost"]
    assert lost == {"rank": 0, "why": "its trainer does not end"}


def halt(group: Group, purpose: Purpose, save: bool = True) -> None:
    group.coordinator.take_order(HaltOrder(purpose=purpose, reason="SIGTERM"))
    assert group.orders[-1] == (0, Gate(attempt=1))
    group.coordinator.handle(0, FromTrainer(attempt=1, message=AtGate(progress=Progress(6, 60))))
    step = group.last(StopAt).step
    group.coordinator.handle(1, Told(attempt=1, step=step))
    assert group.orders[-1] == (0, StopAt(attempt=1, step=step))
    if save:
        group.coordinator.handle(0, stepped(step))
        group.save(step)
        group.both(FromTrainer(attempt=1, message=Finished(progress=Progress(step, step * 10))))


@pytest.mark.parametrize(
    ("purpose", "ending", "step", "reason"),
    [
        (Purpose.END, Ending.STOPPED, 7, "sigterm"),
        (Purpose.DRAIN, Ending.REGROUP, 7, "drain"),
        (Purpose.GROW, Ending.REGROUP, 10, "interval"),
    ],
)
def test_an_ordered_stop_is_saved(group: Group, purpose: Purpose, ending: Ending, step: int, reason: str) -> None:
    halt(group, purpose)
    newest = newest_stable(group.store)
    assert newest is not None and newest.manifest is not None and newest.manifest.reason == reason
    assert group.last(Outcome).ending is ending
    # The driver takes an outcome for the end of the run; a group that is placed anew is none.
    assert ("outcome" in group.kinds()) == (purpose is Purpose.END)
    again = Group(group.store).join()
    assert again.last(Launch).restore == f"{step * 10:013d}-0001"


def test_a_death_on_the_way_to_a_stop_ends_as_ordered(group: Group) -> None:
    group.save(5)
    halt(group, Purpose.END, save=False)
    group.down(1, ExitKind.KILLED)
    group.down(0, ExitKind.PEER_LOST)
    assert group.last(Outcome).ending is Ending.STOPPED and group.count(Launch) == 2


def test_a_stop_whose_save_failed_does_not_say_that_nothing_was_to_be_saved(group: Group) -> None:
    halt(group, Purpose.END, save=False)
    group.coordinator.handle(0, SaveFailed(attempt=1, progress=Progress(7, 70), error="disk full"))
    group.both(FromTrainer(attempt=1, message=Finished(progress=Progress(7, 70))))
    assert group.last(Outcome) == Outcome(ending=Ending.STOPPED, message="SIGTERM: step 7 could not be saved")


def test_an_order_before_there_is_anything_to_save_is_obeyed_at_once(clock: Clock) -> None:
    group = Group(Store.open(f"memory://{uuid.uuid4().hex}")).join()
    group.coordinator.take_order(HaltOrder(purpose=Purpose.GROW, reason="room"))
    assert group.coordinator.outcome is None, "growing can wait"
    group.coordinator.take_order(HaltOrder(purpose=Purpose.END, reason="SIGTERM"))
    assert group.last(Outcome) == Outcome(ending=Ending.STOPPED, message="SIGTERM: nothing new to save")
