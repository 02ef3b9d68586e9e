"""What is made of the events that follow a fault."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.chaos.faults import Fault, FaultKind
from orchestrator.chaos.scores import Injection, Score, Scorecard, score
from orchestrator.messages.attempts import Event


def event(time_s: float, kind: str, /, **fields: Any) -> Event:
    return Event(kind=kind, fields=fields, time_s=time_s)


def step(time_s: float, attempt: int, number: int, **metrics: float) -> Event:
    return event(time_s, "step", attempt=attempt, step=number, metrics=metrics)


def injection(kind: FaultKind) -> Injection:
    fault = Fault(kind=kind, step=10, rank=1)
    return Injection(fault=fault, time_s=100.0, step=10, attempt=3, detail="SIGKILL to process 7")


RESTART = [
    step(99.9, 3, 11),  # was on its way
    event(100.25, "down", rank=1, kind="killed", message=""),
    event(100.3, "attempt", attempt=4, world_size=2),
    event(100.5, "training", attempt=4, step=8),
    step(100.75, 4, 9),
]


def test_a_kill_is_noticed_recovered_from_and_costs_steps() -> None:
    found = score(injection(FaultKind.KILL_WORKER), RESTART)
    assert (found.noticed_s, found.noticed_by, found.recovered_s) == (0.25, "down", 0.75)
    assert (found.resumed_step, found.num_attempts, found.lost_steps, found.passed) == (8, 1, 3, True)
    again = [*RESTART[:3], event(100.4, "down", rank=0, kind="killed", message=""), event(100.5, "attempt", attempt=5)]
    assert score(injection(FaultKind.KILL_WORKER), [*again, step(100.75, 5, 9)]).num_attempts == 2


@pytest.mark.parametrize("known", range(len(RESTART)))
def test_until_the_first_step_of_a_new_attempt_it_has_not_recovered(known: int) -> None:
    found = score(injection(FaultKind.KILL_WORKER), RESTART[:known])
    assert found.recovered_s is None and not found.passed


def test_who_goes_on_from_a_corrupt_checkpoint_has_not_noticed() -> None:
    found = score(injection(FaultKind.CORRUPT_CHECKPOINT), RESTART)
    assert found.noticed_s is None and found.recovered_s == 0.75 and not found.passed
    quarantined = event(100.26, "quarantined", checkpoint="", reason="")
    assert score(injection(FaultKind.CORRUPT_CHECKPOINT), [quarantined, *RESTART]).passed


def test_a_bad_step_ends_no_attempt() -> None:
    events = [event(100.0, "bad_step", step=10), step(100.5, 3, 11, skipped=1.0), step(101.0, 3, 12, loss=1.0)]
    found = score(injection(FaultKind.NAN), events)
    assert (found.noticed_by, found.recovered_s, found.lost_steps, found.passed) == ("bad_step", 1.0, 0, True)


def test_a_slow_store_is_over_with_the_next_save() -> None:
    events = [step(100.5, 3, 11), event(103.0, "saved", step=10, attempt=3), step(103.5, 3, 12)]
    found = score(injection(FaultKind.SLOW_STORE), events)
    assert (found.recovered_s, found.passed) == (3.0, True)


def card(scores: list[Score], same_bits: bool | None = True) -> Scorecard:
    skipped = {FaultKind.PARTITION: "network namespaces need root"}
    urls = {"drilled": "/r/a", "undisturbed": "/r/b"}
    return Scorecard(seed=5, scores=scores, skipped=skipped, same_bits=same_bits, proof="12 tensors", **urls)


def test_the_card_passes_only_with_every_fault_and_the_same_bits() -> None:
    good = score(injection(FaultKind.KILL_WORKER), RESTART)
    missed = Score(fault=good.fault, injection=None)
    assert card([good]).passed
    assert not card([good, missed]).passed
    assert not card([good], same_bits=False).passed and not card([good], same_bits=None).passed
    assert not replace(card([good]), damaged=["0000000000010-0001: a bit"]).passed
    assert not replace(card([good]), left_running=[7]).passed


def test_the_card_as_text_and_as_json() -> None:
    good = score(injection(FaultKind.KILL_WORKER), RESTART)
    shown = card([good, Score(fault=Fault(kind=FaultKind.HANG, step=14, rank=0), injection=None)])
    lines = shown.lines()
    assert lines[1].split("  ")[0] == "kill-worker" and "0.25 s, down" in lines[1] and "0.75 s" in lines[1]
    assert "planned for step 14; the run was over first" in lines[2]
    assert "skipped: partition: network namespaces need root" in lines
    assert "bitwise the same as the undisturbed run: yes (12 tensors)" in lines
    content = json.loads(json.dumps(shown.as_json()))
    assert content["passed"] is False and content["bitwise_same"] is True
    first, second = content["faults"]
    assert first["fault"] == {"kind": "kill-worker", "step": 10, "rank": 1, "moment": 0.0}
    assert (first["noticed_s"], first["recovered_s"], first["lost_steps"], first["passed"]) == (0.25, 0.75, 3, True)
    assert second["injection"] is None and content["skipped"] == {"partition": "network namespaces need root"}
