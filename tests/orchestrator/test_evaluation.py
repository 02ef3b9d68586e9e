"""Evaluation in a run: killed in the middle of it, and what becomes of its numbers and pictures."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.catalog import scan_checkpoints
from orchestrator.checkpoint.store import Store
from orchestrator.config import RunConfig, to_dict
from orchestrator.messages.attempts import Ending, Event, FromTrainer, Stepped
from orchestrator.messages.evaluations import Drew, Evaluated, Validated
from orchestrator.prove import prove
from orchestrator.run_identity import conflicting_keys
from orchestrator.tracking.goodput import Bucket, account
from tests.orchestrator.agent_processes import FAULTS, make_spec, run_agents
from tests.orchestrator.group import Group
from tests.orchestrator.independent import assert_same_state
from tests.orchestrator.test_agents import Script
from tests.orchestrator.tiny_run import CONFIG as RUN
from tests.trainers.tiny import tiny_config
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.evaluation.config import ValidationConfig
from trainers.evaluation.split import split
from trainers.progress import Progress

STEPS, EVERY, SAVED = 8, 2, 4
CONFIG = tiny_config(
    objective={"label_drop": 0.1},
    train={"num_steps": STEPS},
    validation={"num_samples": 25, "every_steps": EVERY},
    samples={"every_steps": SAVED, "num_images": 6, "num_steps": 2, "weights": ["raw", "ema"]},
)


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    yield
    FAULTS.unlink(missing_ok=True)


class KilledOnce(Script):
    """The fault lasts until the first trainer has died of it."""

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if event.kind == "down":
            FAULTS.unlink(missing_ok=True)


def numbers(script: Script) -> dict[int, list[dict[str, float]]]:
    """The metrics of every validation, by step, however often it was made."""
    found: dict[int, list[dict[str, float]]] = {}
    for event in script.of("validation"):
        found.setdefault(event["step"], []).append(event["metrics"])
    return found


@pytest.mark.chaos
@pytest.mark.slow
def test_killed_in_the_middle_of_a_validation(tmp_path: Path) -> None:
    straight = Script()
    assert run_agents(make_spec(tmp_path / "straight", CONFIG, SAVED), 1, straight).ending is Ending.FINISHED
    _, held_out = split(ValidationConfig(num_samples=25), 7, 1797)
    assert held_out is not None
    # Whoever reads this sample, which is never trained on, dies: in the middle of the validation after step 2.
    FAULTS.write_text(json.dumps({"signal": {str(held_out[12]): signal.SIGKILL}}))
    script = KilledOnce(("validation", {"step": 6}, [1]))  # and once more, just after another one
    assert run_agents(make_spec(tmp_path / "killed", CONFIG, SAVED), 2, script).ending is Ending.FINISHED
    assert script.of("failure")[0]["step"] == 2

    proof = prove(Store.open(str(tmp_path / "killed")), Store.open(str(tmp_path / "straight")))
    assert proof.equal and proof.last.step == STEPS, proof.first_difference
    assert_same_state(tmp_path / "killed", tmp_path / "straight")
    expected = {step: metrics for step, (metrics,) in numbers(straight).items()}
    assert list(expected) == [2, 4, 6, 8] and set(expected[4]) == {"loss", "loss/ema/slow", "loss/ema/late"}
    for step, found in numbers(script).items():
        assert found == [expected[step]] * len(found), "bitwise, at another world size and after a resume"
    assert numbers(script).keys() == expected.keys()

    pictures = [f"samples/{weights}/{step:09d}.png" for weights in ("raw", "slow") for step in (4, 8)]
    for picture in pictures:
        assert (tmp_path / "killed" / picture).read_bytes() == (tmp_path / "straight" / picture).read_bytes()
    assert {event["path"] for event in script.of("samples")} == {str(tmp_path / "killed" / key) for key in pictures}
    last = next(scan_checkpoints(Store.open(str(tmp_path / "killed"))))
    assert last.manifest is not None and last.manifest.metrics["validation/loss"] == expected[8]["loss"]
    assert account(straight.events).seconds[Bucket.EVALUATE] > 0


def tell(group: Group, message: object) -> None:
    group.coordinator.handle(0, FromTrainer(attempt=group.attempt, message=message))


def test_numbers_are_reported_and_go_into_the_checkpoint_of_their_step(tmp_path: Path) -> None:
    group = Group(Store.open(str(tmp_path))).join()
    progress = Progress(5, 50)
    tell(group, Stepped(progress=progress, metrics={"loss": 1.0, "grad_norm": 2.0}))
    tell(group, Validated(progress=progress, metrics={"loss": 0.5, "loss/ema/slow": float("nan")}))
    tell(group, Drew(progress=progress, weights="slow", png=b"picture"))
    tell(group, Evaluated(progress=progress, seconds=1.5))
    group.save(5)
    manifest = next(scan_checkpoints(group.store)).manifest
    assert manifest is not None
    assert manifest.metrics == {"loss": 1.0, "grad_norm": 2.0, "validation/loss": 0.5}
    (picture,) = group.chores.pictures
    assert picture.key == "samples/slow/000000005.png" and picture.png == b"picture"
    kinds = [event.kind for event in group.events if event.kind in ("validation", "evaluated", "saved")]
    assert kinds == ["validation", "evaluated", "saved"]
    evaluated = next(event for event in group.events if event.kind == "evaluated")
    assert evaluated.fields == {"attempt": 1, "step": 5, "seconds": 1.5}


def run_config(**sections: Any) -> RunConfig:
    return decode(RunConfig, {**RUN, **sections})


HELD_OUT = {"num_samples": 9, "every_steps": 10}


def best(metric: str, every_steps: int | str = 10) -> dict[str, Any]:
    return {"every_steps": every_steps, "keep": {"best": {"metric": metric}}}


def test_the_best_checkpoint_may_be_that_of_a_validation() -> None:
    for metric in ("validation/loss", "validation/loss/ema/slow"):
        assert run_config(validation=HELD_OUT, checkpoint=best(metric)).checkpoint.keep.best is not None


@pytest.mark.parametrize(
    ("validation", "checkpoint", "message"),
    [
        ({}, best("validation/loss"), "is not measured; set validation.fraction"),
        ({**HELD_OUT, "every_steps": None}, best("validation/loss"), "is not measured; set validation.fraction"),
        (HELD_OUT, best("validation/loss/ema/fast"), "give validation/loss or validation/loss/ema/slow"),
        (HELD_OUT, best("validation/loss", every_steps=4), "every 4 steps have a validation of every 10 steps"),
        (
            HELD_OUT,
            best("validation/loss", every_steps="auto"),
            "with checkpoint.every_steps=auto few checkpoints have",
        ),
    ],
)
def test_a_best_checkpoint_needs_its_number(validation: dict[str, Any], checkpoint: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        run_config(validation=validation, checkpoint=checkpoint)


def test_what_is_held_out_is_fixed_and_what_is_looked_at_is_free() -> None:
    old = to_dict(run_config(validation=HELD_OUT))
    free = run_config(validation={**HELD_OUT, "every_steps": 3}, samples={"every_steps": 7, "seed": 1})
    assert conflicting_keys(old, free) == []
    other = run_config(validation={**HELD_OUT, "num_samples": 8})
    assert conflicting_keys(old, other) == ["validation.num_samples (9 in the run, 8 in the config)"]
    del old["validation"]
    assert conflicting_keys(old, run_config()) == []
