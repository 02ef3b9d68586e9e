"""How often `checkpoint.every_steps: auto` saves."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.coordination.cadence import FIRST_STEPS, Cadence, Measured, best_interval
from orchestrator.coordination.past import Past
from orchestrator.messages.attempts import Ending, Event
from orchestrator.sections import CheckpointConfig
from tests.orchestrator.agent_processes import make_spec as run_spec
from tests.orchestrator.agent_processes import run_agents
from tests.orchestrator.group import make_spec
from tests.orchestrator.independent import assert_same_state
from tests.trainers.tiny import tiny_config

HOURS = 3600.0


def measured(**changes: Any) -> Measured:
    plain = {"step_s": 0.1, "save_s": 0.05, "persist_s": 1.0, "restart_s": 1.0, "trained_s": 0.0, "failures": 0}
    return Measured(**(plain | changes))


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        # C + sqrt(2 (M + R) C + C^2), worked out by hand; M = trained + 3 h, or (trained + 0.3 h) / (failures + 0.1)
        ({}, 0.05 + math.sqrt(2 * 10801 * 0.05 + 0.0025)),
        ({"trained_s": 21 * HOURS, "failures": 7}, 0.05 + math.sqrt(2 * 10801 * 0.05 + 0.0025)),
        ({"trained_s": 21 * HOURS, "failures": 0}, 0.05 + math.sqrt(2 * 86401 * 0.05 + 0.0025)),
        ({"trained_s": 120.0, "failures": 2}, 0.05 + math.sqrt(2 * (1200 / 2.1 + 1) * 0.05 + 0.0025)),
        ({"save_s": 2.0}, 2.0 + math.sqrt(2 * 10801 * 2.0 + 4.0)),
        ({"restart_s": 600.0}, 0.05 + math.sqrt(2 * 11400 * 0.05 + 0.0025)),
        ({"persist_s": 100.0}, 100.0),  # one save in flight at a time
    ],
)
def test_the_interval(changes: dict[str, float], seconds: float) -> None:
    found = best_interval(measured(**changes), 10**9)
    assert found.steps == round(seconds / 0.1)
    assert f"every {found.steps} steps" in found.arithmetic


def test_more_failures_make_it_shorter_and_dearer_saves_longer() -> None:
    intervals = [best_interval(measured(trained_s=HOURS, failures=n), 10**9).steps for n in (0, 3, 30, 300)]
    assert intervals == sorted(intervals, reverse=True) and intervals[0] > 5 * intervals[-1]
    costs = [best_interval(measured(save_s=s), 10**9).steps for s in (0.0, 0.01, 0.1, 1.0)]
    assert costs == sorted(costs) and costs[0] == 10, "free saves: as often as they can be stored"


def test_the_bound_is_kept_and_said() -> None:
    assert best_interval(measured(), 20).steps == 20
    assert best_interval(measured(save_s=0.0, persist_s=0.0), 20).steps == 1
    assert "at most 20 steps" in best_interval(measured(), 20).arithmetic
    for free in (best_interval(measured(), 10**9), best_interval(measured(save_s=0.0, persist_s=0.0), 20)):
        assert "at most" not in free.arithmetic


def train(cadence: Cadence, now: float, num_steps: int, step_s: float) -> float:
    for _ in range(num_steps):
        now += step_s
        cadence.stepped(now)
    return now


def cadence(past: Past | None = None, **changes: Any) -> tuple[Cadence, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    checkpoint = CheckpointConfig(**({"every_steps": "auto"} | changes.pop("checkpoint", {})))
    spec = make_spec("/run", checkpoint=checkpoint, **changes)
    return Cadence(spec, lambda: past, lambda kind, **fields: told.append(fields)), told


def test_it_measures_steps_without_the_saves_between_them() -> None:
    found, told = cadence()
    assert found.every_steps == FIRST_STEPS
    found.begin_attempt(100.0)
    now = train(found, 102.0, 10, 0.5)  # R: 2.5 s to the first step
    found.paused(0.25, now + 0.25)  # C
    now = train(found, now + 0.25, 3, 0.5)
    found.stored(now)  # L: 1.5 s
    assert told == [], "the step under way may be slower for it"
    train(found, now, 1, 0.5)
    assert len(told) == 1 and told[0]["every_steps"] == found.every_steps
    for text in ("C=0.25 s a save", "R=2.5 s a restart", "at 0.5 s a step", "0 in 6.75 s"):
        assert text in told[0]["arithmetic"]
    assert found.every_steps == round((0.25 + math.sqrt(2 * (10806.75 + 2.5) * 0.25 + 0.0625)) / 0.5)


def test_slower_steps_beside_a_save_are_its_cost() -> None:
    found, told = cadence()
    found.begin_attempt(0.0)
    now = train(found, 0.0, 11, 0.5)
    found.paused(0.25, now + 0.25)
    now = train(found, now + 0.25, 2, 0.75)
    found.stored(now + 0.5)
    now = train(found, now, 1, 1.0)
    assert "C=1.25 s a save" in told[0]["arithmetic"] and "at 0.5 s a step" in told[0]["arithmetic"]
    train(found, now, 5, 0.5)
    assert len(found._saves_s) == 1, "what comes after it is not"


def test_a_save_that_fails_is_not_charged() -> None:
    found, told = cadence()
    found.begin_attempt(0.0)
    now = train(found, 0.0, 11, 0.5)
    found.paused(9.0, now)
    now = train(found, now, 5, 0.5)
    found.paused(0.25, now)
    found.stored(now + 0.1)
    train(found, now, 1, 0.5)
    assert list(found._saves_s) == [0.25] and len(told) == 1


def test_failures_of_this_life_and_of_those_before_count() -> None:
    found, told = cadence(Past(trained_s=1000.0, failures=8))
    now = 0.0
    for _ in range(2):  # the second attempt: one failure in this life
        found.begin_attempt(now)
        now = train(found, now + 1.0, 10, 0.5)
        found.paused(0.25, now)
        found.stored(now)
        now = train(found, now, 1, 0.5)
    assert "(9 in " in told[-1]["arithmetic"] or "(8 in " in told[-1]["arithmetic"]
    assert found._measured(0.5).failures == 9 and found._measured(0.5).trained_s > 1000.0


def test_a_small_change_is_none() -> None:
    found, told = cadence()
    found.begin_attempt(0.0)
    now = train(found, 0.0, 10, 0.5)
    for save_s in (0.25, 0.27, 0.23):
        found.paused(save_s, now)
        found.stored(now + 0.1)
        now = train(found, now, 10, 0.5)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("changes", "save_s", "first"),
    [
        ({"checkpoint": {"max_lag_steps": 12}}, 9.0, 6),
        ({"checkpoint": {"every_steps": 7}}, 9.0, None),
    ],
)
def test_other_keys_bound_it(changes: dict[str, Any], save_s: float, first: int | None) -> None:
    found, told = cadence(**changes)
    assert found.every_steps == first
    found.begin_attempt(0.0)
    now = train(found, 0.0, 10, 0.5)
    found.paused(save_s, now)
    found.stored(now)
    train(found, now, 1, 0.5)
    assert found.every_steps == first and told == []


def test_saves_may_be_nearer_to_each_other_than_a_rollback_goes_back() -> None:
    found, _ = cadence(rollback_steps=200)  # retention keeps what that needs, however many there are
    assert found.every_steps == FIRST_STEPS
    found.begin_attempt(0.0)
    now = train(found, 0.0, 10, 0.5)
    found.paused(0.0, now)
    found.stored(now)
    train(found, now, 1, 0.5)
    assert found.every_steps == 1


@pytest.mark.chaos
@pytest.mark.slow
def test_a_run_that_finds_out_its_interval_ends_in_the_same_bits(tmp_path: Path) -> None:
    config = tiny_config(train={"num_steps": 36})
    assert run_agents(run_spec(tmp_path / "straight", config, 12), 1, lambda _: None).ending is Ending.FINISHED
    saved: list[int] = []
    pids: dict[int, int] = {}

    def kill_once(event: Event) -> None:
        if event.kind == "trainer":
            pids[event.fields["rank"]] = event.fields["pid"]
        elif event.kind == "saved":
            saved.append(event.fields["step"])
            if len(saved) == 2:
                os.kill(pids[1], signal.SIGKILL)

    spec = run_spec(tmp_path / "run", config, "auto", max_lag_steps=14)  # at most every 7 steps
    outcome = run_agents(spec, 2, kill_once)
    assert outcome is not None and outcome.ending is Ending.FINISHED
    assert len(saved) >= 5 and saved[0] == 7 and saved[-1] == 36
    assert_same_state(tmp_path / "run", tmp_path / "straight")
