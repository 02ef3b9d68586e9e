"""A state that is saved and restored, by two ranks: every bit of what decides the steps that follow is back."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash

from orchestrator.agents.checkpointer import SharedMemoryCheckpointer
from orchestrator.checkpoint.keys import CheckpointRef, shard_name
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import ShardReceipt, commit, store_shard
from orchestrator.messages.attempts import Begin
from orchestrator.messages.saves import MemorySnapshot, SaveEnded, Snapshot
from orchestrator.sections import CheckpointConfig
from tests.orchestrator.checkpoint.shards import prepare_shard
from tests.orchestrator.checkpoint.states import make_info
from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.errors import StateMismatchError
from trainers.exclusions import Exclusions
from trainers.generators import GeneratorStates
from trainers.progress import Progress
from trainers.state import TrainState
from trainers.step import train_step

WORLD_SIZE = 2
CONFIG = tiny_config(parallel={"strategy": "ddp"})
"""Both ranks hold all rows, and each saves half of them."""
IN_CHECKPOINT, TOLD = Exclusions(steps=((50, 60),)), Exclusions(samples=((70, 5),))


class Agent:
    """Listens only, and keeps the memory."""

    def __init__(self, url: str, buffer: int, **begin: Any) -> None:
        self.end, self.ours = cast(tuple[Connection, Connection], Pipe())
        fields: dict[str, Any] = {"restore": None, "memory": None, "committed": Progress(), "peers": None}
        fields |= {"rank": dist.get_rank(), "world_size": WORLD_SIZE, "exclusions": TOLD, "config": {}}
        self.checkpointer = SharedMemoryCheckpointer(
            self.ours, buffer, Begin(run_url=url, checkpoint=CheckpointConfig(every_steps=2), **(fields | begin)), 4
        )

    def snapshot(self) -> Snapshot:
        while not isinstance(message := self.end.recv(), Snapshot):
            pass
        return message


def live(state: TrainState) -> dict[str, str]:
    """Hashes of all memory that decides what follows, found without `TrainState.tensors`; and the clock."""
    found: dict[str, Any] = {f"weights of {p.name}": p.local for p in state.parameters}
    for p in state.parameters:
        found |= {f"{name} of {p.name}": value for name, value in state.optimizer.state[p.local].items()}
    for profile, average in state.ema.tensors().items():
        found |= {f"{profile} of {name}": value for name, value in average.items()}
    found |= GeneratorStates().tensors  # as the generators are now
    tensors = {name: torch.as_tensor(value).detach().reshape(-1).view(torch.uint8) for name, value in found.items()}
    hashes = {name: xxhash.xxh3_128_hexdigest(tensor.numpy()) for name, tensor in tensors.items()}
    scalars = {name: value for name, value in state.scalars().items() if name != "exclusions"}
    return hashes | {"clock": str(state.progress), "scalars": str(scalars)}


def train_on(state: TrainState, task: Any) -> tuple[list[dict[str, float]], dict[str, str]]:
    return [train_step(state, task) for _ in range(2)], live(state)


def store_all(url: str, buffer: int, snapshot: Snapshot) -> tuple[ShardReceipt, list[str]]:
    """This rank's shard, and the names of two checkpoints of it: a good one, and one with a wrong fingerprint."""
    store, rank, names = Store.open(url), dist.get_rank(), []
    data = memoryview(os.pread(buffer, snapshot.size_bytes, 0))
    shard = prepare_shard(shard_name(rank, WORLD_SIZE), snapshot.chunks, data, {})
    for attempt in (1, 2):
        ref = CheckpointRef(snapshot.progress.samples_seen, attempt)
        store_shard(store, ref, shard)
        receipts: list[Any] = [None] * WORLD_SIZE
        dist.all_gather_object(receipts, shard.receipt)
        if rank == 0:
            info = make_info(0, attempt, progress=snapshot.progress, scalars=snapshot.scalars)
            commit(store, receipts if attempt == 1 else with_a_wrong_fingerprint(receipts), info)
        dist.barrier()
        names.append(str(ref))
    return shard.receipt, names


def with_a_wrong_fingerprint(receipts: Sequence[ShardReceipt]) -> list[ShardReceipt]:
    first, *others = receipts
    chunk, *chunks = first.chunks
    return [replace(first, chunks=(replace(chunk, fingerprint=chunk.fingerprint ^ 1), *chunks)), *others]


def _save_and_restore(url: str) -> dict[str, Any]:
    state, task = build_tiny(CONFIG)
    state.exclusions = IN_CHECKPOINT
    for _ in range(2):
        train_step(state, task)
    for draw in (random.random, np.random.rand, lambda: torch.rand(())):  # code that users plug in may do that
        draw()
    buffer = os.memfd_create("test")
    saving = Agent(url, buffer)
    saving.checkpointer.save(state)
    snapshot = saving.snapshot()
    receipt, (good, wrong) = store_all(url, buffer, snapshot)
    found: dict[str, Any] = {"saved": live(state), "straight": train_on(state, task)}
    memory = MemorySnapshot(snapshot=snapshot, chunks=receipt.chunks, pending=True)
    for way, begin in (("storage", {"restore": good}), ("memory", {"memory": memory})):
        state, task = build_tiny(CONFIG)
        state.exclusions = TOLD
        agent = Agent(url, buffer, **begin)
        agent.checkpointer.restore(state)
        found[way] = live(state), state.exclusions
        agent.end.send(SaveEnded(progress=snapshot.progress))
        agent.checkpointer.wait()
        found[f"{way} waited"] = not agent.ours.poll()
        found[f"{way} later"] = train_on(state, task)
    if dist.get_rank() == 1:
        (byte,) = os.pread(buffer, 1, 1000)
        os.pwrite(buffer, bytes([byte ^ 1]), 1000)
    for begin in ({"restore": wrong}, {"memory": memory}):
        with pytest.raises(StateMismatchError, match="fingerprint"):
            Agent(url, buffer, **begin).checkpointer.restore(state)
    return found


def test_what_is_restored_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    for found in run_ranks(WORLD_SIZE, _save_and_restore, str(tmp_path)):
        for way in ("storage", "memory"):
            restored, exclusions = found[way]
            assert restored == found["saved"]
            assert exclusions == IN_CHECKPOINT.merged(TOLD)
            assert found[f"{way} later"] == found["straight"]
        assert found["memory waited"] and not found["storage waited"], "only that of the memory was on its way"
