"""Real agents and trainers, without Ray: killed at placed moments, damaged, resized, and always the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.store import Store
from orchestrator.messages.attempts import Ending, Event
from orchestrator.prove import prove
from tests.orchestrator.agent_processes import FAULTS, make_spec, run_agents
from tests.orchestrator.independent import assert_same_state
from tests.trainers.tiny import tiny_config

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

STEPS, EVERY = 12, 3


def config(**sections: Any) -> dict[str, Any]:
    return tiny_config(train={"num_steps": STEPS}, **sections)


class Script:
    """Remembers events and trainers, and kills at the moments that `plan` names."""

    def __init__(self, *plan: tuple[str, dict[str, Any], list[int]]) -> None:
        self.events: list[Event] = []
        self.pids: dict[int, int] = {}
        self._plan = list(plan)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "trainer":
            self.pids[event.fields["rank"]] = event.fields["pid"]
        if self._plan:
            kind, fields, ranks = self._plan[0]
            if event.kind == kind and all(event.fields[key] == value for key, value in fields.items()):
                del self._plan[0]
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):  # it has just finished by itself
                        os.kill(self.pids[rank], signal.SIGKILL)

    def done(self) -> bool:
        return not self._plan

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [dict(event.fields) for event in self.events if event.kind == kind]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, on one worker."""
    run = tmp_path_factory.mktemp("straight") / "run"
    outcome = run_agents(make_spec(run, config(), EVERY), 1, Script())
    assert outcome.ending is Ending.FINISHED
    return run


def assert_same(run: Path, straight: Path) -> None:
    proof = prove(Store.open(str(run)), Store.open(str(straight)))
    assert proof.equal, proof.first_difference
    assert proof.last.step == STEPS and proof.num_checkpoints == STEPS // EVERY
    assert_same_state(run, straight)


def test_killed_in_every_phase(straight: Path, tmp_path: Path) -> None:
    script = Script(
        ("trainer", {"rank": 1}, [1]),  # as soon as it exists: while it joins, builds, restores
        ("step", {"step": 2}, [0]),
        ("step", {"step": 3}, [1]),  # its save is under way
        ("trainer", {"rank": 1, "attempt": 4}, [1]),  # during the restore
        ("step", {"step": 6}, [0, 1]),
        ("saved", {"step": 9}, [1]),
        ("step", {"step": STEPS}, [1]),  # the last step is done, its checkpoint is not
    )
    outcome = run_agents(make_spec(tmp_path / "run", config(), EVERY), 2, script)
    assert outcome.ending is Ending.FINISHED and script.done()
    kinds = [failure["kind"] for failure in script.of("failure")]
    # A slow machine may be done with what a kill was meant for before it comes: then it costs no attempt.
    assert set(kinds) == {"killed"} and len(kinds) >= 5
    assert_same(tmp_path / "run", straight)


def test_a_bit_that_turns_over_in_one_replica_makes_no_difference(straight: Path, tmp_path: Path) -> None:
    """One that only the comparison before a save finds, and one that makes the next step's loss infinite."""
    flips = [[1, 4, 0, str(tmp_path / "low")], [0, 7, 30, str(tmp_path / "high")]]
    FAULTS.write_text(json.dumps({"flip": flips}))
    script = Script()
    try:
        outcome = run_agents(make_spec(tmp_path / "run", config(parallel={"strategy": "ddp"}), EVERY), 2, script)
    finally:
        FAULTS.unlink()
    assert outcome.ending is Ending.FINISHED
    found = [(event["since"], event["ranks"]) for event in script.of("corrupted")]
    assert found == [(4, [0, 1]), (7, [0, 1])]
    # A rank's end may be heard before the last step of another.
    reached = [event["step"] for event in script.of("corrupted")]
    assert reached[0] in (5, 6) and reached[1] in (6, 7)
    assert {failure["action"] for failure in script.of("failure")} == {"roll back"}
    begun = [attempt["restore"] for attempt in script.of("attempt")]
    assert begun == [None, "0000000000072-0001", "0000000000144-0002"], "steps 3 and 6, from storage"
    assert script.of("bad_step") == script.of("replay_differs") == script.of("diverged") == []
    assert_same(tmp_path / "run", straight)


RESIZES = [
    (2, {"strategy": "fsdp"}),
    (3, {"strategy": "ddp"}),
    (1, {"strategy": "fsdp"}),
    (4, {"strategy": "hsdp", "shard_size": 2}),
]


def test_resized_and_under_other_strategies(straight: Path, tmp_path: Path) -> None:
    """2 -> 3 -> 1 -> 4 workers, one stretch of the run each."""
    for index, (world_size, parallel) in enumerate(RESIZES):
        until = {**config(parallel=parallel)["train"], "num_steps": EVERY * (index + 1)}
        script = Script()
        outcome = run_agents(
            make_spec(tmp_path / "run", {**config(parallel=parallel), "train": until}, EVERY), world_size, script
        )
        assert outcome.ending is Ending.FINISHED
        assert [attempt["restore"] is None for attempt in script.of("attempt")] == [index == 0]
    assert_same(tmp_path / "run", straight)


def test_the_state_of_an_optimizer_of_whole_tensors(tmp_path: Path) -> None:
    """Prodigy keeps tensors of other shapes than its parameters, and numbers: from memory, and then from storage."""
    sections = {"optimizer": {"name": "prodigy", "lr": 1.0}, "parallel": {"strategy": "ddp"}}
    half, whole = (tiny_config(**sections, train={"num_steps": steps}) for steps in (4, 6))
    assert run_agents(make_spec(tmp_path / "straight", whole, 2), 1, Script()).ending is Ending.FINISHED
    script = Script(("saved", {"step": 2}, [1]))
    assert run_agents(make_spec(tmp_path / "run", half, 2), 2, script).ending is Ending.FINISHED and script.done()
    assert run_agents(make_spec(tmp_path / "run", whole, 2), 3, Script()).ending is Ending.FINISHED
    proof = prove(*(Store.open(str(tmp_path / name)) for name in ("run", "straight")))
    assert proof.equal and proof.num_checkpoints == 3, proof.first_difference
    assert_same_state(tmp_path / "run", tmp_path / "straight")


def flip_data(folder: Path) -> None:
    _flip(folder / "shard-00000-of-00001.safetensors", -1000)


def flip_header(folder: Path) -> None:
    _flip(folder / "shard-00000-of-00001.safetensors", 20)


def flip_manifest(folder: Path) -> None:
    _flip(folder / "manifest.json", 100)


def cut_shard(folder: Path) -> None:
    path = folder / "shard-00000-of-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def lose_shard(folder: Path) -> None:
    (folder / "shard-00000-of-00001.safetensors").unlink()


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_data, flip_header, flip_manifest, cut_shard, lose_shard])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    straight: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """The newest is damaged, and read by two workers where one wrote it: partly, so no hash covers what they read."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = max((run / "checkpoints").iterdir())
    damage(newest)
    script = Script()
    outcome = run_agents(make_spec(run, config(), EVERY), 2, script)
    assert outcome.ending is Ending.FINISHED
    (quarantined,) = script.of("quarantined")
    assert quarantined["checkpoint"] == newest.name and quarantined["reason"]
    assert (newest / "quarantine.json").exists()
    assert_same(run, straight)


def test_an_exception_at_one_step_ends_the_run_with_its_trace(tmp_path: Path) -> None:
    images = tmp_path / "images" / "class"
    images.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(b"no image")
    model = tiny_config()["model"]
    model["args"] = {**model["args"], "in_channels": 3, "out_channels": 3}
    broken = config(data={"source": "folder", "path": str(tmp_path / "images"), "image_size": 8}, model=model)
    script = Script()
    outcome = run_agents(make_spec(tmp_path / "run", broken, EVERY), 2, script)
    assert outcome.ending in (Ending.GAVE_UP, Ending.CONFIG)
    assert "a.png" in outcome.message or "b.png" in outcome.message
