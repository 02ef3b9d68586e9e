"""The account of wall time: tables of events in, seconds in buckets out."""

from __future__ import annotations

import random

import pytest

from orchestrator.messages.attempts import Event
from orchestrator.tracking.goodput import Book, Bucket, account
from tests.orchestrator.tracking.story import (
    T0,
    attempt,
    down,
    event,
    finished,
    one_kill,
    snapshot,
    started,
    step,
    steps,
    training,
)


def seconds(events: list[Event], now: float | None = None) -> dict[str, float]:
    """What is not zero; checks that every second is in exactly one bucket."""
    goodput = account(events, None if now is None else T0 + now)
    assert [span.end_s for span in goodput.spans[:-1]] == [span.begin_s for span in goodput.spans[1:]]
    if goodput.spans:
        assert (goodput.spans[0].begin_s, goodput.spans[-1].end_s) == (goodput.begin_s, goodput.end_s)
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_s)
    return {str(bucket): round(total, 3) for bucket, total in goodput.seconds.items() if total}


def test_a_run_that_nothing_happens_to():
    events = [started(0), attempt(3, 1), training(5, 1, 0), *steps(5, 1, range(1, 11)), finished(17)]
    assert seconds(events) == {"start": 5, "productive": 10, "stall": 2}  # 2 s waiting for the last save
    assert account(events).recoveries == [] and account(events).attempts == 1


def test_a_kill_costs_the_steps_after_the_save_the_detection_and_the_restart():
    assert seconds(one_kill()) == {
        "start": 5,
        "productive": 30,
        "stall": 0.5 + 2,
        "lost": 10,
        "detect": 2,
        "restart": 2.5,
    }
    goodput = account(one_kill())
    (recovery,) = goodput.recoveries
    assert (recovery.cause, recovery.from_step, recovery.to_step, recovery.lost_steps) == ("killed", 20, 10, 10)
    assert recovery.seconds == pytest.approx(31 - 25.5) and recovery.attempt == 2
    assert goodput.lost_steps == 10 and goodput.attempts == 2


def test_attempts_that_never_train_belong_to_one_recovery():
    events = [
        *[started(0), attempt(1, 1), training(2, 1, 0), *steps(2, 1, [1, 2])],
        *[down(5), attempt(6, 2), down(7), attempt(8, 3), training(10, 3, 0), *steps(10, 3, [1])],
    ]
    assert seconds(events) == {"start": 2, "lost": 2, "detect": 1, "restart": 5, "productive": 1}
    goodput = account(events)
    assert [(r.attempt, r.seconds, r.lost_steps) for r in goodput.recoveries] == [(3, 7, 2)] and goodput.attempts == 3


def test_a_restart_is_entered_without_a_look_at_every_step_of_the_run():
    """A week has a hundred thousand of them, and may have thousands of restarts."""

    class Marks(dict[int, float]):
        def __iter__(self):
            raise AssertionError("all of them are looked at")

        items = keys = __iter__

    book = Book(marks=Marks())
    for entry in one_kill():
        book.enter(entry)
    assert book.close(None) == account(one_kill())


def test_a_driver_that_dies_without_a_word_is_down_from_its_last_sign_of_life():
    events = [
        *[started(0), attempt(1, 1), training(2, 1, 0), *steps(2, 1, [1, 2, 3]), event(8, "alive", session="a")],
        *[started(100, "b"), attempt(103, 2, "b"), training(105, 2, 0, "b"), *steps(105, 2, [1], session="b")],
    ]
    assert seconds(events) == {"start": 2 + 5, "lost": 6, "down": 92, "productive": 1}
    (recovery,) = account(events).recoveries
    assert (recovery.cause, recovery.lost_steps) == ("driver lost", 3)
    assert recovery.seconds == 106 - 5 - 92  # the time without a driver is nobody's recovery


def test_an_interrupted_run_is_down_whatever_its_agents_still_say():
    events = [
        *[started(0), attempt(1, 1), training(2, 1, 0), *steps(2, 1, [1, 2])],
        *[event(4.5, "interrupted", session="a"), event(4.6, "agent_lost", session="a", rank=1)],
        *[started(60, "b"), attempt(61, 2, "b"), training(62, 2, 0, "b"), step(63, 2, 1, "b")],
    ]
    assert seconds(events) == {"start": 2 + 2, "lost": 2.5, "down": 55.5, "productive": 1}
    assert account(events).recoveries[0].cause == "interrupted"


def test_going_on_after_the_end_is_no_restart():
    events = [
        *one_kill(),
        started(1000, "b"),
        attempt(1001, 3, "b"),
        training(1002, 3, 30, "b"),
        step(1003, 3, 31, "b"),
    ]
    assert len(account(events).recoveries) == 1 and seconds(events)["down"] == 1000 - 52


@pytest.mark.parametrize("events", [one_kill(), one_kill()[:-1]], ids=["finished", "killed before it could say so"])
def test_a_command_that_finds_nothing_to_do_adds_no_time(events: list[Event]):
    assert seconds([*events, event(90000, "already_finished", session="b", step=30, checkpoint="c")]) == seconds(events)


def test_all_agents_lost_at_once_is_seen_when_the_next_attempt_begins():
    events = [
        started(0),
        attempt(1, 1),
        training(2, 1, 0),
        step(3, 1, 1),
        attempt(11, 2),
        training(14, 2, 0),
        step(15, 2, 1),
    ]
    assert seconds(events) == {"start": 2, "lost": 1, "restart": 11, "productive": 1}


def test_an_older_checkpoint_than_the_last_one_makes_more_of_it_lost():
    events = [
        *[started(0), attempt(1, 1), training(2, 1, 0), *steps(2, 1, range(1, 5)), snapshot(7, 1, 4, 1.0)],
        *[*steps(7, 1, range(5, 9)), down(11), attempt(11, 2), training(12, 2, 2), *steps(12, 2, [3])],
    ]
    assert seconds(events) == {"start": 2, "productive": 2 + 1, "lost": 7, "restart": 1}


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 14, 26, 27, 28])
def test_a_run_that_goes_on_is_accounted_for_up_to_now(cut: int):
    events = one_kill()[:cut]
    assert sum(seconds(events, now=60).values()) == (60 if events else 0)


def test_no_events_and_no_time():
    assert account([]).share is None and account([]).wall_s == 0
    assert account([started(0)]).share is None


def test_two_drivers_interleaved_the_older_one_counts_for_nothing_once_superseded():
    """The first is cut off and trains on, and ends long after the second one has claimed the run."""
    older = [started(0), attempt(1, 1), training(2, 1, 0), *steps(2, 1, range(1, 60)), down(61.5)]
    older.append(event(62, "outcome", session="a", ending="superseded", message="m"))
    newer = [
        started(20.5, "b"),
        attempt(22.5, 2, "b"),
        training(24.5, 2, 0, "b"),
        *steps(24.5, 2, range(1, 101), session="b"),
    ]
    events = sorted([*older, *newer, finished(125, "b")], key=lambda one: one.time_s)
    found = seconds(events)
    assert found == {"start": 6, "lost": 18, "down": 0.5, "productive": 100, "stall": 0.5}
    goodput = account(events)
    assert goodput.attempts == 2 and [r.attempt for r in goodput.recoveries] == [2]


def test_the_account_closes_for_any_order_of_any_events():
    rng = random.Random(3)
    odd = [
        event(9, "controller_lost", reason="r"),
        event(20, "interrupted"),
        event(33, "evaluated", step=3, seconds=4.0),
    ]
    pool = [*one_kill(), *odd]
    for _ in range(300):
        events = rng.sample(pool, rng.randrange(1, len(pool)))
        if rng.random() < 0.5:
            events.sort(key=lambda one: one.time_s)
        assert sum(seconds(events, now=70).values()) >= 0


def test_evaluation_is_a_bucket_of_its_own():
    events = [
        started(0),
        attempt(1, 1),
        training(2, 1, 0),
        *steps(2, 1, [1, 2]),
        event(7, "evaluated", step=2, seconds=3.0),
        finished(7),
    ]
    assert seconds(events) == {"start": 2, "productive": 2, "evaluate": 3}
    assert account(events).share == pytest.approx(2 / 7)
    assert account(events).seconds[Bucket.EVALUATE] == 3
