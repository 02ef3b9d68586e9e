"""Real agents and trainers whose data is faulty at chosen samples: diverging, raising, dying, drifting."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.failures import FailureConfig
from orchestrator.messages.attempts import Ending, Event
from orchestrator.prove import prove
from orchestrator.tracking.recorder import Recorder
from tests.orchestrator.agent_processes import FAULTS, make_spec, run_agents
from tests.orchestrator.independent import assert_same_state
from tests.orchestrator.test_agents import Script
from tests.trainers.tiny import tiny_config
from trainers.data.sampler import sample_indices

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

STEPS, EVERY, G, B = 12, 3, 24, 4


def config(num_steps: int = STEPS, **sections: Any) -> dict[str, Any]:
    divergence = {"patience": 2, "rollback_steps": 1}
    return tiny_config(train={"num_steps": num_steps}, divergence=divergence, **sections)


def sample_at(step: int, microbatch: int) -> int:
    """The dataset index of the first sample of a microbatch, in scikit-learn's 1,797 digits."""
    return int(sample_indices(7, np.array([(step - 1) * G + microbatch * B]), 1797)[0])


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    yield
    FAULTS.unlink(missing_ok=True)


def faulty(**faults: Any) -> None:
    FAULTS.write_text(json.dumps(faults))


def assert_same(run: Path, straight: Path) -> None:
    proof = prove(Store.open(str(run)), Store.open(str(straight)))
    assert proof.equal, proof.first_difference
    assert proof.last.step == STEPS
    assert_same_state(run, straight)


def test_a_diverging_run_ends_in_the_same_bits_however_it_is_killed(tmp_path: Path) -> None:
    """Steps 6 and 7 are not finite, so 5 to 7 are left out; step 10 is bad alone."""
    faulty(nan=[sample_at(6, 1), sample_at(7, 0), sample_at(10, 5)])
    straight, killed = Script(), tmp_path / "killed"
    assert run_agents(make_spec(tmp_path / "straight", config(), EVERY), 1, straight).ending is Ending.FINISHED
    (diverged,) = straight.of("diverged")
    assert diverged["skip"] == [5, 7] and "loss is nan" in diverged["reason"]
    assert [event["step"] for event in straight.of("bad_step")] == [6, 10]
    found = {(i.step, i.ref.attempt): i for i in list_checkpoints(Store.open(str(tmp_path / "straight"))) if i.manifest}
    assert {key: info.state for key, info in found.items()} == {
        (3, 1): CheckpointState.STABLE,
        (6, 1): CheckpointState.UNHEALTHY,
        (6, 2): CheckpointState.STABLE,
        (9, 2): CheckpointState.STABLE,
        (12, 2): CheckpointState.STABLE,
    }
    assert "the last 1 steps before it were bad" in found[6, 1].detail

    # A first life ends in the middle of the trouble; the second is killed before, in and after its window.
    assert run_agents(make_spec(killed, config(num_steps=6), EVERY), 2, Script()).ending is Ending.FINISHED
    script = Script(
        ("training", {"step": 6}, [1]),
        ("diverged", {}, []),
        ("step", {"step": 5}, [0]),
        ("step", {"step": 7}, [1]),
        ("bad_step", {"step": 10}, [0]),
    )
    assert run_agents(make_spec(killed, config(), EVERY), 2, script).ending is Ending.FINISHED and script.done()
    (quarantined,) = script.of("quarantined")
    assert quarantined["reason"] == "training diverged in step 7; what it learned from step 5 on is undone"
    assert script.of("replay_differs") == []
    assert_same(killed, tmp_path / "straight")


def test_a_run_that_diverges_again_and_again_gives_up(tmp_path: Path) -> None:
    faulty(nan=list(range(1797)))
    spec = make_spec(tmp_path / "run", config(num_steps=60), EVERY)
    script = Script()
    outcome = run_agents(dataclasses.replace(spec, failures=FailureConfig(rollbacks=2)), 1, script)
    assert outcome.ending is Ending.GAVE_UP
    assert outcome.message.startswith(
        "training diverged after 2 rollbacks (failures.rollbacks=2): steps 5 to 6 are bad"
    )
    assert [event["skip"] for event in script.of("diverged")] == [[1, 2], [2, 4]]


def test_samples_that_kill_twice_are_left_out_in_the_same_way_everywhere(tmp_path: Path) -> None:
    """One can not be decoded, one kills whoever trains on it; two, as both ranks of a step may be hit."""
    raising, killing = [sample_at(2, 1), sample_at(2, 4)], sample_at(8, 3)
    faulty(**{"raise": raising, "signal": {killing: signal.SIGSEGV}})
    left_out = {}
    for world_size in (1, 2):
        script = Script()
        spec = make_spec(tmp_path / f"run-{world_size}", config(data={"quarantine": True}), EVERY)
        assert run_agents(spec, world_size, script).ending is Ending.FINISHED
        left_out[world_size] = sorted((event["step"], *event["samples"]) for event in script.of("left_out"))
    assert left_out[1] == left_out[2]
    assert [entry for entry in left_out[1] if entry[0] == 2] == sorted((2, index) for index in raising)
    (whole,) = [entry for entry in left_out[1] if entry[0] == 8]
    assert whole[1] == killing and len(whole) == 1 + B
    assert_same(tmp_path / "run-2", tmp_path / "run-1")


def test_without_quarantine_a_bug_ends_the_run_in_three_lines(tmp_path: Path) -> None:
    broken = sample_at(5, 1)
    faulty(**{"raise": [broken]})
    script = Script()
    outcome = run_agents(make_spec(tmp_path / "run", config(), EVERY), 2, script)
    assert outcome.ending is Ending.GAVE_UP
    what, where, samples = outcome.message.splitlines()
    assert what == f"step 5 failed 3 times in the same way; rank 0: ValueError('sample {broken} is broken')"
    assert "tests/orchestrator/faults.py:" in where and where.endswith("in read")
    assert samples == f"samples: microbatch 1 of step 5, from position 100: dataset indices {broken}"
    assert len(script.of("attempt")) == 3 and "Traceback" in script.of("failure")[-1]["details"]


@pytest.mark.parametrize("reaction", ["warn", "stop"])
def test_a_step_that_gives_other_bits_when_replayed_is_named(tmp_path: Path, reaction: str) -> None:
    """After the restart one sample of rank 1 is no longer what it was."""
    flag = tmp_path / "flag"
    faulty(drift={sample_at(5, 3): str(flag)})
    spec = make_spec(tmp_path / "run", config(), EVERY)
    spec = dataclasses.replace(spec, failures=FailureConfig(on_replay_difference=reaction))  # type: ignore[arg-type]
    script = Script(("step", {"step": 5}, [0]))

    def on_event(event: Event) -> None:
        if event.kind == "down":
            flag.touch()
        script(event)

    outcome = run_agents(spec, 2, on_event)
    (differs,) = script.of("replay_differs")
    assert (differs["step"], differs["ranks"]) == (5, [1])
    assert "first in microbatches 3 of rank 1" in differs["message"]
    assert outcome.ending is (Ending.FINISHED if reaction == "warn" else Ending.GAVE_UP)


class AtOnce:
    """In place of a thread: so few steps may be over before it has read the record."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], **_: Any) -> None:
        self.start = lambda: target(*args)


def test_steps_that_a_new_life_makes_again_are_compared_with_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All agents are gone, and with them what they knew; one sample is no longer what it was."""
    monkeypatch.setattr("orchestrator.coordination.past.threading", SimpleNamespace(Thread=AtOnce))
    flag, script = tmp_path / "flag", Script()
    faulty(drift={sample_at(5, 3): str(flag)})
    spec = make_spec(tmp_path / "run", config(), EVERY)
    recorder = Recorder(spec.run_url, spec.session, report=script)
    recorder.take(Event(kind="started", fields={"versions": spec.versions, "num_steps": STEPS}, time_s=time.time()))
    assert run_agents(spec, 2, recorder.take).ending is Ending.FINISHED
    recorder.close()
    for checkpoint in list_checkpoints(Store.open(spec.run_url)):
        if checkpoint.step > EVERY:
            shutil.rmtree(tmp_path / "run" / checkpoint.ref.folder)
    flag.touch()
    run_agents(make_spec(tmp_path / "run", config(), EVERY), 1, script)
    (differs,) = script.of("replay_differs")
    assert differs["step"] == 5 and "of which microbatch is not known" in differs["message"]


def test_a_node_whose_imports_fail_ends_the_run_with_the_trace(tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "run", config(), EVERY)
    script = Script()
    outcome = run_agents(dataclasses.replace(spec, preload=("no_such_module",)), 1, script)
    assert outcome.ending is Ending.GAVE_UP
    assert "its imports fail: ModuleNotFoundError: No module named 'no_such_module'" in outcome.message
    assert "3 times start" in outcome.message
    assert len(script.of("attempt")) == 3 and "in _import" in script.of("failure")[0]["details"]
