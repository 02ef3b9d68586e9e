from __future__ import annotations

import pytest

from orchestrator.agents import stop
from orchestrator.agents.stop import Stop


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop, "process_state", lambda pid: "T" if pid == 1 else "S")
    return now


def looks(watch: Stop, clock: list[float], pid: int | None, *pauses_s: float) -> list[float]:
    seen = []
    for pause_s in pauses_s:
        clock[0] += pause_s
        seen.append(watch.lasts_s(pid))
    return seen


def test_counts_from_the_first_look_that_finds_it_stopped(clock: list[float]) -> None:
    watch = Stop()
    assert looks(watch, clock, 2, 0.5, 0.5) == [0, 0]
    assert looks(watch, clock, 1, 0.5, 0.5, 0.25) == [0, 0.5, 0.75]
    assert looks(watch, clock, 2, 0.5) == [0]
    assert looks(watch, clock, 1, 0.5, 0.5) == [0, 0.5], "it went on in between"
    assert looks(watch, clock, None, 0.5) == [0]


def test_a_looker_that_was_stopped_too_takes_that_for_one_look(clock: list[float]) -> None:
    assert looks(Stop(), clock, 1, 0.5, 45.0, 0.5) == [0, 1.0, 1.5]
