"""The trainer's side of saving, with an agent that only listens."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from orchestrator.agents import checkpointer
from orchestrator.agents.checkpointer import (
    LaggingError,
    SaveSchedule,
    SharedMemoryCheckpointer,
    _check_fingerprints,
)
from orchestrator.agents.trainer_process import StopOnOrder
from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.coordination.watchdog import Phase
from orchestrator.messages.attempts import Begin
from orchestrator.messages.liveness import AtGate, Entered, Gate, StopAt
from orchestrator.messages.saves import Overwriting, Paused, SaveEnded, Skipped, Snapshot
from orchestrator.sections import CheckpointConfig, Tier
from trainers.errors import StateMismatchError
from trainers.exclusions import Exclusions
from trainers.fingerprint import format_fingerprint
from trainers.ports import Directive
from trainers.progress import Progress
from trainers.shards import TensorSpec
from trainers.state import LocalTensor, TrainState

NUM_STEPS = 20
TIERS = (Tier(url="peer://", every=2, keep=2), Tier(url="/runs", every=6, keep=2))


class Trainer:
    """One rank, without training."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.agent, ours = Pipe()
        self.orders, ordered = cast(tuple[Connection, Connection], Pipe())
        self.buffer = os.memfd_create("test")
        begin = Begin(
            config={},
            run_url="memory://",
            checkpoint=config,
            rank=0,
            world_size=1,
            restore=None,
            peers=None,
            memory=None,
            committed=Progress(),
            exclusions=Exclusions(),
        )
        self.checkpointer = SharedMemoryCheckpointer(cast(Connection, ours), self.buffer, begin, NUM_STEPS)
        schedule = SaveSchedule(self.checkpointer, config, NUM_STEPS)
        self.control = StopOnOrder(schedule, NUM_STEPS, cast(Connection, ours), ordered)

    def poll(self, step: int) -> Directive:
        return self.control.poll(Progress(step, step))

    def save(self, step: int) -> None:
        self.checkpointer.save(self.state(step))

    def state(self, step: int) -> TrainState:
        """Four parameters, with an EMA that begins in step 1."""
        names = ("model/w", "ema/main/w") if step else ("model/w",)
        specs = [TensorSpec(name=name, dtype="F32", shape=(4,)) for name in names]
        state: Any = SimpleNamespace(
            progress=Progress(step, step),
            generators=SimpleNamespace(capture=lambda: None, apply=lambda: None),
            tensors=lambda: [
                LocalTensor(spec=spec, row_offset=0, tensor=torch.full((4,), float(step)), replica=0, num_replicas=1)
                for spec in specs
            ],
            parameters=[SimpleNamespace(name="w")],
            ema=SimpleNamespace(beginning=lambda step: ["main"] if step == 1 else []),
            scalars=dict,
        )
        return cast(TrainState, state)

    def told(self) -> list[Any]:
        """What the agent has heard since."""
        found = []
        while self.agent.poll():
            found.append(self.agent.recv())
        return found


@pytest.fixture
def closing() -> Iterator[list[Trainer]]:
    trainers: list[Trainer] = []
    yield trainers
    for trainer in trainers:
        os.close(trainer.buffer)


def start(closing: list[Trainer], **config: Any) -> Trainer:
    closing.append(Trainer(CheckpointConfig(**config)))
    return closing[-1]


@pytest.mark.parametrize("step", [3, 4, 6])
def test_the_save_before_a_stop_is_made_in_all_tiers_the_nearest_first(closing: list[Trainer], step: int) -> None:
    """3 is not due, 4 only in memory, 6 in both; and one that still runs leaves none of them out."""
    trainer = start(closing, tiers=TIERS, when_busy="skip")
    assert trainer.poll(2) == Directive(save=True)
    trainer.save(2)
    (snapshot,) = [message for message in trainer.told() if isinstance(message, Snapshot)]
    assert snapshot.tiers == ("peer",)
    trainer.orders.send(StopAt(attempt=1, step=step))
    assert trainer.poll(step) == Directive(save=True, stop=True)
    assert trainer.told() == [], "nobody is asked, nothing is skipped"
    trainer.agent.send(SaveEnded(progress=Progress(2, 2), tier="peer"))
    trainer.save(step)
    (snapshot,) = [message for message in trainer.told() if isinstance(message, Snapshot)]
    assert snapshot.tiers == ("peer", "storage"), "this node may be gone before storage has it"


def test_who_stands_at_the_gate_answers_every_order_to_come_there(closing: list[Trainer]) -> None:
    """Two orders, one after the other: the answer to the first may have been used up before the second came."""
    trainer = start(closing)
    for order in (Gate(attempt=1), Gate(attempt=1), StopAt(attempt=1, step=7)):
        trainer.orders.send(order)
    assert trainer.poll(6) == Directive()
    assert trainer.told() == 2 * [AtGate(progress=Progress(6, 6))]
    assert trainer.poll(7) == Directive(save=True, stop=True)


def test_the_memory_for_the_first_snapshot_is_there_before_training(closing: list[Trainer]) -> None:
    trainer = start(closing)
    trainer.checkpointer.restore(trainer.state(0))
    before = os.fstat(trainer.buffer)
    assert before.st_size == 2 * 4 * 4 and before.st_blocks > 0, "with an EMA that begins in the first step"
    trainer.save(5)
    (snapshot,) = [message for message in trainer.told() if isinstance(message, Snapshot)]
    assert os.fstat(trainer.buffer).st_size == snapshot.size_bytes == before.st_size
    assert [chunk.spec.name for chunk in snapshot.chunks] == ["model/w", "ema/main/w"]


def test_a_snapshot_is_laid_out_anew_when_there_is_more_in_it(closing: list[Trainer]) -> None:
    trainer = start(closing)
    for step in (0, 5, 10):
        trainer.save(step)
        trainer.agent.send(SaveEnded(progress=Progress(step, step)))
    sizes = [message.size_bytes for message in trainer.told() if isinstance(message, Snapshot)]
    assert sizes == [16, 32, 32] and os.pread(trainer.buffer, 32, 0) == torch.full((8,), 10.0).numpy().tobytes()


def test_the_agent_hears_that_a_snapshot_is_gone_before_and_that_one_is_there_after_the_copy(
    closing: list[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the trainer dies: what the agent takes for a snapshot is a whole one."""
    trainer, held = start(closing), []
    agent = trainer.checkpointer._agent
    send = agent.send

    def look(message: object) -> None:
        if isinstance(message, Overwriting | Snapshot):
            held.append(os.pread(trainer.buffer, 16, 0))
        send(message)

    monkeypatch.setattr(agent, "send", look)
    for step in (5, 10):
        trainer.save(step)
        trainer.agent.send(SaveEnded(progress=Progress(step, step)))
    _, first, before, second = held
    assert first == before == torch.full((4,), 5.0).numpy().tobytes()
    assert second == torch.full((4,), 10.0).numpy().tobytes()


def test_a_save_is_left_out_if_that_of_any_rank_still_runs(
    closing: list[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks leave it out, or none: whoever has heard of the end already is asked too."""
    asked: list[bool] = []
    monkeypatch.setattr(checkpointer, "_any_rank", lambda mine: asked.append(mine) or len(asked) == 1)
    trainer = start(closing, every_steps=2, when_busy="skip")
    trainer.save(2)
    trainer.agent.send(SaveEnded(progress=Progress(2, 2)))
    assert trainer.poll(4) == Directive() and trainer.told()[-1] == Skipped(progress=Progress(4, 4))
    assert trainer.poll(6) == Directive(save=True) and asked == [False, False]
    assert trainer.poll(8) == Directive(save=True) and len(asked) == 2, "nothing was saved since"


def test_tensors_that_only_one_side_has_are_named() -> None:
    actual, both = {"a": 1}, {"a": format_fingerprint(1)}
    _check_fingerprints(actual, both, "c")
    for expected, name in ((both | {"b": "0"}, "b"), ({}, "a"), ({"a": format_fingerprint(2)}, "a")):
        with pytest.raises(StateMismatchError, match=f"c: {name} "):
            _check_fingerprints(actual, expected, "c")


def phases(messages: list[Any]) -> list[Any]:
    return [message.phase if isinstance(message, Entered) else type(message) for message in messages]


def test_the_watchdog_hears_of_copies_and_of_waiting_for_storage(closing: list[Trainer]) -> None:
    trainer, heard = start(closing, every_steps=5, max_lag_steps=10), []
    trainer.save(5)
    assert phases(trainer.told()) == [Phase.SAVING, Overwriting, Snapshot, Paused, Phase.TRAINING]
    trainer.agent.send(SaveEnded(progress=Progress(5, 5), error="unreachable"))

    def store() -> None:
        """Answers only who says that it waits."""
        while not heard or heard[-1] != Entered(phase=Phase.TRAINING):
            heard.append(trainer.agent.recv())
            if heard[-1] == Entered(phase=Phase.STORING):
                trainer.agent.send(SaveEnded(progress=Progress(10, 10), error="unreachable"))

    agent = threading.Thread(target=store, daemon=True)
    agent.start()
    with pytest.raises(LaggingError, match="stopped at step 10"):
        trainer.save(10)
    agent.join(10)
    assert phases(heard) == [Phase.SAVING, Overwriting, Snapshot, Phase.STORING, Paused, Phase.TRAINING]


def test_an_interval_that_was_found_out_is_taken_up_when_every_rank_has_heard_it(closing: list[Trainer]) -> None:
    """It comes with the end of a save, which ranks read at different steps; they meet at the next save."""
    trainer = start(closing, every_steps="auto", keep=RetentionConfig(every_steps=17))
    trainer.checkpointer.restore(trainer.state(0))
    due = []
    for step in range(1, NUM_STEPS + 1):
        if trainer.poll(step).save:
            due.append(step)
            trainer.save(step)
            trainer.agent.send(SaveEnded(progress=Progress(step, step), every_steps=4 if step == 1 else 7))
    # 1, 2: the interval of the start; then 4, said at the end of 1; then 7. 17 is kept for good, 20 is the end.
    assert due == [1, 2, 6, 13, 17, 20]
