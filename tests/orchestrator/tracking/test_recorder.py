"""The thread that writes the record: never waited for, through outages, up to a bound."""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable

import pytest

from orchestrator.checkpoint.keys import EVENTS, METRICS
from orchestrator.checkpoint.store import Store
from orchestrator.errors import StorageError
from orchestrator.messages.attempts import Event
from orchestrator.tracking.record import read_events
from orchestrator.tracking.recorder import Recorder, RecorderConfig
from orchestrator.tracking.streaming import read_metrics
from tests.orchestrator.tracking.story import attempt, event, finished, one_kill, step, steps


class Flaky:
    """A store that can be away."""

    def __init__(self) -> None:
        self.store = Store.open(f"memory://{uuid.uuid4().hex}")
        self.away = threading.Event()
        self.reports: queue.Queue[Event] = queue.Queue()
        write = self.store.write

        def flaky(key: str, parts: list[bytes]) -> None:
            if self.away.is_set():
                raise StorageError("unreachable")
            write(key, parts)

        self.store.write = flaky  # pyright: ignore[reportAttributeAccessIssue]

    def recorder(self, **config: float) -> Recorder:
        made = RecorderConfig(**{"flush_s": 0.05, **config})
        return Recorder("memory://x", "5e55", self.reports.put, made, lambda _: self.store)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_every_event_and_every_step_is_there_after_close():
    flaky = Flaky()
    recorder = flaky.recorder(flush_s=60)
    for one in one_kill():
        recorder.take(one)
    recorder.close()
    assert [row["step"] for row in read_metrics(flaky.store)] == list(range(1, 31))
    events = read_events(flaky.store)
    assert [one.kind for one in events if one.kind not in ("step", "alive")] == [
        one.kind for one in one_kill() if one.kind != "step"
    ]
    # Of the steps, what the account of goodput needs: the first and the last between two events.
    assert [one.fields["step"] for one in events if one.kind == "step"] == [1, 10, 11, 20, 11, 30]
    assert {one.fields["session"] for one in events} == {"5e55"} and flaky.reports.empty()


def test_what_may_be_the_end_is_stored_at_once_and_steps_with_the_next_flush():
    flaky = Flaky()
    recorder = flaky.recorder(flush_s=60)
    recorder.take(step(1, 1, 1))
    time.sleep(0.2)
    assert flaky.store.list(METRICS) == []
    recorder.take(event(2, "down", rank=1))
    until(lambda: [one.kind for one in read_events(flaky.store)] == ["step", "down"])
    assert len(list(read_metrics(flaky.store))) == 1
    recorder.close()


def test_an_outage_loses_nothing_and_is_said_once():
    flaky = Flaky()
    recorder = flaky.recorder()
    recorder.take(attempt(0, 1))
    until(lambda: len(read_events(flaky.store)) == 1)
    flaky.away.set()
    recorder.take(event(0, "down", rank=1))
    for one in steps(0, 1, range(1, 101), each=0.01):
        recorder.take(one)
        time.sleep(0.002)
    assert flaky.reports.get(timeout=10).fields == {"error": "unreachable"}
    flaky.away.clear()
    assert flaky.reports.get(timeout=10).fields == {"dropped": 0}
    recorder.take(finished(9))
    recorder.close()
    assert [row["step"] for row in read_metrics(flaky.store)] == list(range(1, 101))
    kinds = [one.kind for one in read_events(flaky.store)]
    assert kinds.count("record_resumed") == kinds.count("down") == 1 and "record_failed" not in kinds
    assert flaky.reports.empty()


def test_beyond_the_bound_steps_are_dropped_and_counted_and_events_are_not():
    flaky = Flaky()
    flaky.away.set()
    recorder = flaky.recorder(most_waiting=10)
    recorder.take(attempt(0, 1))
    flaky.reports.get(timeout=10)
    for one in steps(0, 1, range(1, 31)):
        recorder.take(one)
    recorder.take(event(40, "down", rank=0))
    flaky.away.clear()
    assert flaky.reports.get(timeout=10).fields == {"dropped": 20}
    recorder.close()
    assert [row["step"] for row in read_metrics(flaky.store)] == list(range(1, 11))
    assert "down" in [one.kind for one in read_events(flaky.store)]


def test_closing_while_the_store_is_away_takes_no_longer_than_one_try():
    flaky = Flaky()
    flaky.away.set()
    recorder = flaky.recorder()
    recorder.take(attempt(0, 1))
    flaky.reports.get(timeout=10)
    begun = time.monotonic()
    recorder.close()
    assert time.monotonic() - begun < 5 and not any(thread.name == "recorder" for thread in threading.enumerate())


def test_a_bug_in_it_is_reported_and_not_the_end_of_it():
    flaky = Flaky()
    recorder = flaky.recorder()
    recorder.take(Event(kind="step", fields={"attempt": 1, "step": 1}, time_s=1.0))  # no metrics
    assert "KeyError" in flaky.reports.get(timeout=10).fields["error"]
    recorder.take(finished(2))
    recorder.close()
    assert "outcome" in [one.kind for one in read_events(flaky.store)]


def test_storage_may_be_away_for_days(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.tracking.recorder._LONGEST_PAUSE_S", 0.0)
    flaky = Flaky()
    flaky.away.set()
    recorder = flaky.recorder(flush_s=0.0)
    recorder.take(attempt(0, 1))
    until(lambda: recorder._failures > 1100 or not recorder._thread.is_alive())
    flaky.away.clear()
    assert flaky.reports.get(timeout=10).kind == "record_failed"
    assert flaky.reports.get(timeout=10).kind == "record_resumed"
    recorder.close()
    assert next(one.kind for one in read_events(flaky.store)) == "attempt"


def test_silence_is_broken_by_a_sign_of_life():
    flaky = Flaky()
    recorder = flaky.recorder(alive_s=0.1)
    until(lambda: len(flaky.store.list(EVENTS)) >= 2)
    recorder.close()
    assert {one.kind for one in read_events(flaky.store)} == {"alive"}


def test_two_recorders_of_one_attempt_use_no_key_twice():
    flaky = Flaky()
    recorders = [flaky.recorder(), flaky.recorder()]
    for value in range(1, 101):
        recorders[value % 2].take(step(value, 1, value))
        if value % 10 == 0:
            recorders[0].take(event(value, "saved", step=value))
    for recorder in recorders:
        recorder.close()
    assert [row["step"] for row in read_metrics(flaky.store)] == list(range(1, 101))
    assert sum(one.kind == "saved" for one in read_events(flaky.store)) == 10


def test_taking_a_step_is_cheap():
    """A step is some 1e-1 s; 0.5 % of that is the budget of all tracking."""
    flaky = Flaky()
    recorder = flaky.recorder(flush_s=60)
    one = step(1, 1, 1)
    begun = time.perf_counter()
    for _ in range(10_000):
        recorder.take(one)
    assert time.perf_counter() - begun < 1.0  # 0.1 ms a step, a hundred times what it takes
    recorder.close()
