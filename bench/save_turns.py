"""Preloaded by a benchmark's fork server: in the place of the training loop, ways to save and restore take turns.

All of them get the state that a real trainer holds, in that trainer, on all ranks at once. Ours goes to the real agent.
Each turn is one line in `<rank>.jsonl` of the folder that FOLDER names, with the seconds that the trainer was held up,
those until the state was on disk, and the CPU seconds of this rank's processes.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch.distributed as dist
import xxhash

from bench.peers.saves import Peers
from bench.workload import pin
from orchestrator.agents import trainer_process
from orchestrator.agents.checkpointer import SharedMemoryCheckpointer
from orchestrator.agents.snapshot_layout import layout, owned_tensors
from orchestrator.checkpoint.keys import shard_name
from orchestrator.checkpoint.writer import hash_shard, lay_out_shard
from orchestrator.processes import cpu_s, parent
from trainers.progress import Progress
from trainers.state import TrainState
from trainers.step import Task, train_step

FOLDER = "UNBROKEN_BENCH_FOLDER"
"""Environment variable: where `turns.json` says what is to be done, and everything is written."""

Turn = Callable[[Path], Iterator[None]]
"""Yields when the call returns, and again if the state may change only then; ends when the state is safe.

Gets an empty folder that all ranks share.
"""


def take_turns(
    state: TrainState, task: Task, control: object, checkpointer: SharedMemoryCheckpointer, sink: object
) -> None:
    """In the place of `trainers.loop.train`. Collective: all ranks."""
    folder, rank = Path(os.environ[FOLDER]), dist.get_rank()
    plan: list[str] = json.loads((folder / "turns.json").read_text())
    pin(rank)
    checkpointer.restore(state)
    if state.progress.step == 0:
        train_step(state, task)  # so that there are moments, and an EMA
    ours = _Ours(state, checkpointer)
    bound = _Bound(ours.size_bytes)
    turns: dict[str, Turn] = {**ours.turns(), **bound.turns(), "hashing": lambda scratch: ours.hash(bound.target)}
    _announce(folder / f"{rank}.watch", [ours.size_bytes, _agent(), os.getpid()])
    if set(plan) - turns.keys():
        turns |= Peers(state, folder).turns()
    if (folder / f"{rank}.jsonl").exists():
        raise RuntimeError("the trainers were started anew in the middle: this machine is too busy to measure on")
    with (folder / f"{rank}.jsonl").open("x") as lines:
        for index, name in enumerate(plan):
            scratch = folder / "scratch" / (name if name.startswith("load ") else str(index))
            scratch.mkdir(parents=True, exist_ok=True)
            line = {"name": name, "size_bytes": ours.size_bytes, **_time(turns[name], scratch)}
            lines.write(f"{json.dumps(line)}\n")
            lines.flush()
            dist.barrier()
            if rank == 0 and not name.startswith("load "):
                shutil.rmtree(scratch)
            os.sync()  # what one has left to the system to write is not to be the next one's burden
            dist.barrier()


trainer_process.train = take_turns  # pyright: ignore[reportPrivateUsage]


def _announce(file: Path, numbers: list[int]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(" ".join(map(str, numbers)))
    temporary.rename(file)


def _time(turn: Turn, scratch: Path) -> dict[str, float]:
    dist.barrier()
    used, began, began_s = _cpu_s(), time.perf_counter(), time.time()
    yields = [time.perf_counter() - began for _ in turn(scratch)]
    times = {"returned_s": yields[0], "held_s": yields[-1], "total_s": time.perf_counter() - began}
    times |= {"cpu_s": _cpu_s() - used, "began_s": began_s, "ended_s": time.time()}
    for pid in _children():  # not only on the trainer's core, to which they were born: our agent is not either
        with suppress(ProcessLookupError):
            os.sched_setaffinity(pid, range(os.cpu_count() or 1))
    return times


def _cpu_s() -> float:
    """CPU seconds of this process with its children, and of its agent."""
    return sum(map(cpu_s, (_agent(), os.getpid(), *_children())))


def _agent() -> int:
    """The process id of this rank's agent: it is above the fork server."""
    agent = parent(os.getppid())
    assert agent is not None, "a trainer does not outlive its fork server"
    return agent


def _children() -> list[int]:
    pids = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            pids += [int(pid) for pid in (task / "children").read_text().split()]
    return pids


class _Ours:
    """The real checkpointer, and through it the real agent."""

    def __init__(self, state: TrainState, checkpointer: SharedMemoryCheckpointer) -> None:
        self._state = state
        self._checkpointer = checkpointer
        self._chunks = layout(owned_tensors(state))
        self.size_bytes = self._chunks[-1].end

    def turns(self) -> dict[str, Turn]:
        return {"save": self.save, "restore": self.restore}

    def save(self, scratch: Path) -> Iterator[None]:
        done = self._state.progress
        self._state.progress = Progress(done.step + 1, done.samples_seen + 1)
        self._checkpointer.save(self._state)
        yield
        self._checkpointer.wait()

    def restore(self, scratch: Path) -> Iterator[None]:
        self._checkpointer.restore(self._state)
        yield

    def hash(self, data: memoryview) -> Iterator[None]:
        """What the agent hashes in a save, as long as `verify` is `full`: before it is written, and as it is read."""
        hash_shard(lay_out_shard(shard_name(0, 1), self._chunks, data, {}))
        xxhash.xxh3_128_hexdigest(data)
        yield


class _Bound:
    """The least that could do it: one copy into warm shared memory, one hash, one file."""

    def __init__(self, size_bytes: int) -> None:
        self._source = memoryview(bytearray(b"\1") * size_bytes)
        handle = os.memfd_create("bound")
        os.ftruncate(handle, size_bytes)
        self.target = memoryview(mmap.mmap(handle, size_bytes))
        self._copy()  # its pages are there from now on

    def turns(self) -> dict[str, Turn]:
        return {"memcpy": self.copy, "xxh3": self.hash, "memcpy, xxh3, write": self.store, "read, xxh3": self.load}

    def _copy(self) -> None:
        np.copyto(np.frombuffer(self.target, np.uint8), np.frombuffer(self._source, np.uint8))

    def copy(self, scratch: Path) -> Iterator[None]:
        self._copy()
        yield

    def hash(self, scratch: Path) -> Iterator[None]:
        xxhash.xxh3_128_hexdigest(self.target)
        yield

    def store(self, scratch: Path) -> Iterator[None]:
        yield from self.copy(scratch)
        xxhash.xxh3_128_hexdigest(self.target)
        with (scratch / f"{dist.get_rank()}.raw").open("xb", buffering=0) as file:
            rest = self.target
            while len(rest):
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    def load(self, scratch: Path) -> Iterator[None]:
        """What a restore can not do without: the bytes, once, into memory that is there already."""
        path = scratch.parent / f"bound-{dist.get_rank()}.raw"
        if not path.exists():
            path.write_bytes(self._source)
        with path.open("rb", buffering=0) as file:
            rest = self.target
            while len(rest) and (count := file.readinto(rest)):
                rest = rest[count:]
        xxhash.xxh3_128_hexdigest(self.target)
        yield
