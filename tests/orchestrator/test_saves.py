"""Saves of real agents and trainers, without Ray: slow, failing, left out, and remembered when trainers die."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import Shard, store_shard
from orchestrator.coordination.committing import CommitEnded
from orchestrator.coordination.coordinator import Coordinator
from orchestrator.errors import StorageError
from orchestrator.messages.attempts import Ending, Event, FromTrainer, Listening
from orchestrator.prove import prove
from tests.orchestrator.agent_processes import make_spec, run_agents
from tests.orchestrator.independent import assert_same_state
from tests.orchestrator.test_agents import EVERY, STEPS, Script, assert_same, config, straight
from tests.s3.fault_proxy import Fault, Kind

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

__all__ = ["straight"]  # a fixture

ON_RANK_1 = "shard-00001-of-00002.safetensors"


@pytest.fixture
def on_store(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[CheckpointRef, str], None]], None]:
    """Has a function called, with checkpoint and file name, before a shard is stored."""

    def install(before: Callable[[CheckpointRef, str], None]) -> None:
        def store_it(store: Store, ref: CheckpointRef, shard: Shard, *rest: Any) -> None:
            before(ref, shard.receipt.file.name)
            store_shard(store, ref, shard, *rest)

        monkeypatch.setattr("orchestrator.agents.shard_writer.store_shard", store_it)

    return install


class Opens(Script):
    """Lets go of whoever waits for `gate` when an event happens."""

    def __init__(self, kind: str, fields: dict[str, Any], *plan: tuple[str, dict[str, Any], list[int]]) -> None:
        super().__init__(*plan)
        self.gate = threading.Event()
        self._opens = kind, fields

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        kind, fields = self._opens
        if event.kind == kind and all(event.fields[key] == value for key, value in fields.items()):
            self.gate.set()


def test_a_save_that_is_due_while_another_runs_is_left_out_on_all_ranks(straight, tmp_path, on_store) -> None:
    script = Opens("save_skipped", {"step": 9})
    on_store(lambda ref, name: name == ON_RANK_1 and script.gate.wait(200))
    spec = make_spec(tmp_path / "run", config(), EVERY, when_busy="skip")
    assert run_agents(spec, 2, script).ending is Ending.FINISHED
    assert [skipped["step"] for skipped in script.of("save_skipped")] == [6, 9]
    assert [saved["step"] for saved in script.of("saved")] == [3, STEPS], "the last one is never left out"
    assert_same_state(tmp_path / "run", straight)


def test_a_write_that_fails_is_tried_again_and_training_goes_on(straight, tmp_path, on_store) -> None:
    errors = [StorageError("unreachable")] * 3

    def fail(ref: CheckpointRef, name: str) -> None:
        if name == ON_RANK_1 and errors:
            raise errors.pop()

    on_store(fail)
    script = Script()
    assert run_agents(make_spec(tmp_path / "run", config(), EVERY), 2, script).ending is Ending.FINISHED
    assert script.of("save_delayed") == [{"rank": 1, "step": 3, "error": "unreachable"}]
    assert script.of("save_failed") == [] and errors == []
    assert_same(tmp_path / "run", straight)


def test_a_store_that_fails_for_a_while_costs_a_checkpoint_and_nothing_else(straight, tmp_path, on_store) -> None:
    failing = {6: (ON_RANK_1, StorageError("disk full")), 9: ("", OSError("odd"))}

    def fail(ref: CheckpointRef, name: str) -> None:
        file, error = failing.get(ref.samples_seen // 24, ("none", None))
        if file in name and error:
            raise error

    on_store(fail)
    script = Script()
    assert run_agents(make_spec(tmp_path / "run", config(), EVERY, deadline_s=0.0), 2, script).ending is Ending.FINISHED
    assert [(event["step"], "disk full" in event["error"]) for event in script.of("save_failed")] == [
        (6, True),
        (9, False),
    ]
    assert len(script.of("attempt")) == 1
    assert_same_state(tmp_path / "run", straight)


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
def test_training_gets_no_further_ahead_of_its_checkpoints_than_it_may(tmp_path, on_store, when_busy) -> None:
    def fail(ref: CheckpointRef, name: str) -> None:
        if ref.samples_seen > 24 * EVERY:
            raise StorageError("unreachable")

    on_store(fail)
    spec = make_spec(tmp_path / "run", config(), EVERY, deadline_s=0.0, max_lag_steps=6, when_busy=when_busy)
    outcome = run_agents(spec, 2, script := Script())
    assert outcome.ending is Ending.STORAGE
    assert "stopped at step 9: the newest committed checkpoint is of step 3" in outcome.message
    assert "unreachable" in outcome.message
    assert script.of("step")[-1]["step"] == 9 and script.of("failure") == []


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_trainers_begin_again_from_memory(straight, tmp_path, strategy) -> None:
    # Before a trainer has heard that its save has ended it takes no other snapshot.
    script = Script(("saved", {"step": 3}, [0, 1]), ("saved", {"step": 9}, [0, 1]))
    spec = make_spec(tmp_path / "run", config(parallel={"strategy": strategy}), EVERY)
    assert run_agents(spec, 2, script).ending is Ending.FINISHED and script.done()
    assert [attempt["memory"] for attempt in script.of("attempt")] == [None, 3, 9]
    assert_same(tmp_path / "run", straight)


def test_trainers_of_a_hybrid_strategy_begin_again_from_memory(straight, tmp_path) -> None:
    """Replicas of shards: each rank has written a part of what it holds, and gets the rest from its replica only."""
    short = config(parallel={"strategy": "hsdp", "shard_size": 2})
    short["train"]["num_steps"] = 2 * EVERY
    script = Script(("saved", {"step": 3}, [0, 1, 2, 3]))
    assert run_agents(make_spec(tmp_path / "run", short, EVERY), 4, script).ending is Ending.FINISHED
    assert [attempt["memory"] for attempt in script.of("attempt")] == [None, 3]
    proof = prove(Store.open(str(tmp_path / "run")), Store.open(str(straight)))
    assert proof.equal and proof.num_checkpoints == 2


def test_a_snapshot_that_was_never_stored_is_gone_on_from_and_stored_then(
    straight, tmp_path, on_store, monkeypatch
) -> None:
    """Stored before the new trainers have even met: of a small state, or in the memory of nodes, that is quick."""
    handle, late, stored = Coordinator.handle, [], []

    def meet_late(coordinator: Coordinator, rank: int, message: Any) -> None:
        match message:
            case FromTrainer(attempt=2, message=Listening()) if not stored:
                late.append((rank, message))
                return
            case CommitEnded(attempt=2):
                stored.append(message.progress.step)
        handle(coordinator, rank, message)
        while stored and late:
            handle(coordinator, *late.pop())

    monkeypatch.setattr(Coordinator, "handle", meet_late)
    script = Opens("attempt", {"attempt": 2}, ("step", {"step": 7}, [1]))
    on_store(lambda ref, name: ref == CheckpointRef(6 * 24, 1) and script.gate.wait(200))
    assert run_agents(make_spec(tmp_path / "run", config(), EVERY), 2, script).ending is Ending.FINISHED
    assert stored[0] == 6 and [attempt["memory"] for attempt in script.of("attempt")] == [None, 6]
    assert (6, 2) in [(saved["step"], saved["attempt"]) for saved in script.of("saved")]
    assert_same(tmp_path / "run", straight)


def test_damage_in_memory_is_noticed_and_storage_is_taken(straight, tmp_path, monkeypatch) -> None:
    buffers, create = [], os.memfd_create
    monkeypatch.setattr(os, "memfd_create", lambda name: buffers.append(create(name)) or buffers[-1])

    class Damages(Script):
        def __call__(self, event: Event) -> None:
            if event.kind == "saved" and event.fields["step"] == 6:
                (byte,) = os.pread(buffers[0], 1, 1000)
                os.pwrite(buffers[0], bytes([byte ^ 1]), 1000)
            super().__call__(event)

    script = Damages(("saved", {"step": 6}, [0, 1]))
    assert run_agents(make_spec(tmp_path / "run", config(), 2 * EVERY), 2, script).ending is Ending.FINISHED
    assert [failure["kind"] for failure in script.of("failure")] == ["killed", "damaged checkpoint"]
    starts = [(attempt["memory"], attempt["restore"]) for attempt in script.of("attempt")]
    assert starts == [(None, None), (6, None), (None, "0000000000144-0001")]
    assert script.of("quarantined") == []
    assert_same_state(tmp_path / "run", straight)


@pytest.mark.s3
def test_a_store_that_is_unreachable_for_a_while_costs_no_step(straight, tmp_path, s3_proxy, monkeypatch) -> None:
    url, real = f"s3://tests/{tmp_path.name}-{os.getpid()}", Store.open
    spec = make_spec(url, config(), EVERY, when_busy="skip")
    monkeypatch.setattr(Store, "open", staticmethod(lambda url, deadline_s=3.0: real(url, deadline_s)))

    class Unreachable(Script):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if event.kind == "step" and event.fields["step"] == 4:
                s3_proxy.faults = [Fault(kind=Kind.BLACK_HOLE, count=10**6)]
            elif event.kind == "save_delayed":
                s3_proxy.faults = []

    script = Unreachable()
    assert run_agents(spec, 2, script).ending is Ending.FINISHED
    assert s3_proxy.fired(Kind.BLACK_HOLE) > 0
    assert script.of("failure") == script.of("save_failed") == [] and len(script.of("attempt")) == 1
    assert [event["step"] for event in script.of("step")] == list(range(1, STEPS + 1))
    newest = newest_stable(real(url))
    assert newest is not None and newest.step == STEPS
