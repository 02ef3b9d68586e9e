"""The trainer's side of saving and restoring: when, and from and into which memory."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from orchestrator.agents.memory_restore import fill_from_memory
from orchestrator.agents.snapshot_layout import layout, owned_rows, owned_tensors, snapshot_bytes, targets
from orchestrator.checkpoint.catalog import load_manifest
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.reader import Destination, expected_fingerprints, read_rows
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.watchdog import Phase
from orchestrator.errors import StorageError
from orchestrator.messages.attempts import Begin, Restored
from orchestrator.messages.liveness import Entered
from orchestrator.messages.saves import Chunks, Overwriting, Paused, SaveEnded, Skipped, Snapshot
from orchestrator.sections import CheckpointConfig, TierName
from trainers.errors import StateMismatchError
from trainers.fingerprint import format_fingerprint
from trainers.ports import Directive
from trainers.progress import Progress
from trainers.state import LocalTensor, TrainState, fingerprints


class LaggingError(StorageError):
    """Training may not get further ahead of the newest committed checkpoint. All ranks raise it, at one step."""


class SaveSchedule:
    """A `Control`: saves every so many steps, and at the end."""

    def __init__(self, checkpointer: SharedMemoryCheckpointer, config: CheckpointConfig, num_steps: int) -> None:
        self._checkpointer = checkpointer
        self._config = config
        self._num_steps = num_steps

    def poll(self, progress: Progress) -> Directive:
        if progress.step == self._num_steps:
            return Directive(save=True)
        due = bool(self._config.tiers_due(progress.step, self._num_steps))
        due = due or (self._config.automatic and self._checkpointer.is_due(progress))
        return Directive(save=due and self._checkpointer.may_save(progress))

    def stop(self) -> Directive:
        """Stop here, saved. All ranks say so after the same step."""
        self._checkpointer.stopping = True
        return Directive(save=True, stop=True)


class SharedMemoryCheckpointer:
    """Copies this rank's rows into the agent's buffer and trains on; the agent stores them."""

    def __init__(self, agent: Connection, buffer: int, begin: Begin, num_steps: int) -> None:
        """Args: buffer: file descriptor of the shared memory that the agent keeps over the life of trainers."""
        self._agent = agent
        self._buffer_handle = buffer
        self._buffer: mmap.mmap | None = None
        self._begin = begin
        self._config = begin.checkpoint
        self._num_steps = num_steps
        self._pending: Progress | None = None
        self._committed = begin.committed
        """Of the newest committed checkpoint that this rank has heard of."""
        self._agreed = begin.committed
        """What all ranks had heard of when the last snapshot was taken."""
        self._every_steps = begin.every_steps or begin.checkpoint.interval_steps
        self._next_every_steps = self._every_steps
        """What this rank was told last; others may not have heard it yet."""
        self._next_step = 0
        self._undecided = False
        """A snapshot was taken that not all ranks are known to have heard the end of; alike on all ranks."""
        self._names: list[str] = []
        self._chunks = Chunks()
        """Where the tensors of these names lie in a snapshot."""
        self._targets: list[torch.Tensor] | None = None
        """Their places in the buffer."""
        self.stopping = False
        """The next save is the last of this process: it has to outlive the memory of the nodes."""

    def restore(self, state: TrainState) -> None:
        memory = self._begin.memory
        if memory is not None:
            state.load_scalars(memory.snapshot.scalars)
            expected = fill_from_memory(state, memory, self._room(memory.snapshot.size_bytes))
            state.progress = memory.snapshot.progress
            _check_fingerprints(fingerprints(state), expected, f"the snapshot of {state.progress} in memory")
            state.generators.apply()
            self._pending = state.progress if memory.pending else None
            self._undecided = memory.pending
        elif self._begin.restore is not None:
            self._restore_from_storage(state, self._begin.restore)
        self._room(snapshot_bytes(state))
        self._next_step = state.progress.step + self._every_steps
        self._agent.send(Restored(progress=state.progress))

    def is_due(self, progress: Progress) -> bool:
        """Whether it is time for a save by the interval that was found out; the same answer on all ranks."""
        return progress.step >= self._next_step

    def may_save(self, progress: Progress) -> bool:
        """Whether the save that is due now is made; `checkpoint.when_busy` says what it does if one still runs.

        Collective: all ranks, and all get the same answer. Who has heard already that the save before has ended is
        chance, so for `skip` they ask each other: one integer, and only after a snapshot.
        """
        if self._config.when_busy == "wait" or not self._undecided:
            return True
        if self._agent.poll():
            self._settle()
        if not _any_rank(self._pending is not None):
            self._undecided = False
            return True
        if self._lags(progress, self._agreed):
            self._settle()
            return True
        self._next_step = progress.step + self._every_steps
        self._agent.send(Skipped(progress=progress))
        return False

    def save(self, state: TrainState) -> None:
        begun_s = time.monotonic()
        self._settle()  # a failed save was reported by the coordinator; this newer one takes its place
        self._agreed = self._committed
        self._every_steps = self._next_every_steps  # by now every rank has heard the end of the save before
        self._next_step = state.progress.step + self._every_steps
        lags = self._lags(state.progress, self._agreed)
        self._agent.send(Entered(phase=Phase.SAVING))
        self._take_snapshot(state)
        error = self._settle() if lags else None
        self._agent.send(Paused(progress=state.progress, stall_s=time.monotonic() - begun_s))
        self._agent.send(Entered(phase=Phase.TRAINING))
        if error is not None:
            raise LaggingError(
                f"stopped at step {state.progress.step}: the newest committed checkpoint is of step"
                f" {self._agreed.step}, checkpoint.max_lag_steps={self._config.max_lag_steps} allows no more, and"
                f" saving fails: {error}; mend the storage, then run the same command again"
            )

    def _take_snapshot(self, state: TrainState) -> None:
        state.generators.capture()
        owned = owned_tensors(state)
        names = [local.spec.name for local in owned]
        if names != self._names:  # within one process a name stands for the same rows
            self._names, self._chunks, self._targets = names, layout(owned), None
        chunks, size_bytes = self._chunks, self._chunks[-1].end if owned else 0
        self._agent.send(Overwriting())
        rows, buffer = owned_rows(owned), self._room(size_bytes)
        if self._targets is None:
            self._targets = targets(chunks, rows, buffer)
        # One call for all: one a tensor takes a tenth longer, with numpy's arrays a quarter.
        if rows:
            torch._foreach_copy_(self._targets, rows)
        self._pending, self._undecided = state.progress, True
        self._agent.send(
            Snapshot(
                progress=state.progress,
                chunks=chunks,
                size_bytes=size_bytes,
                scalars=state.scalars(),
                tiers=self._tiers(state.progress),
            )
        )

    def wait(self) -> None:
        if (error := self._settle()) is not None:
            raise StorageError(error)

    def _settle(self) -> str | None:
        """Wait for the save in flight, if there is one; why it failed, if it did."""
        if self._pending is None:
            return None
        if not self._agent.poll():
            self._agent.send(Entered(phase=Phase.STORING))  # storage has limits of its own
        ended = self._agent.recv()
        assert isinstance(ended, SaveEnded) and ended.progress == self._pending, ended
        self._pending = None
        self._next_every_steps = ended.every_steps or self._next_every_steps
        if ended.error is None and ended.tier == "storage":
            self._committed = ended.progress
        return ended.error

    def _lags(self, progress: Progress, committed: Progress) -> bool:
        """Whether training must not go on to the next save before this one is committed."""
        most = self._config.max_lag_steps
        if most is None or "storage" not in self._tiers(progress):
            return False
        return progress.step + self._every_steps - committed.step > most

    def _tiers(self, progress: Progress) -> tuple[TierName, ...]:
        """Where the state of `progress` is saved; one that is saved for a reason of its own is to last.

        As this node may be gone before storage has it, the memory of others gets the last one first.
        """
        if self.stopping and self._config.peer is not None:
            return ("peer", "storage")
        return self._config.tiers_due(progress.step, self._num_steps) or ("storage",)

    def _restore_from_storage(self, state: TrainState, name: str) -> None:
        store = self._begin.peers.open() if self._begin.peers else Store.open(self._begin.run_url)
        manifest = _manifest(store, name)
        state.load_scalars(manifest.scalars)
        destinations = [_Destination(local) for local in state.tensors() if local.tensor.numel()]
        expected = expected_fingerprints(manifest)
        read_rows(store, manifest, [destination.wanted for destination in destinations])
        for destination in destinations:
            destination.finish()
        state.progress = manifest.progress
        _check_fingerprints(fingerprints(state), expected, name)
        state.generators.apply()

    def _room(self, size_bytes: int) -> mmap.mmap:
        """The buffer, at least this large. It only grows, and is reused over trainers.

        All of its pages are made and mapped here: page by page that takes some ten times as long as the copy, and a
        trainer's first save would be that much slower than the others.
        """
        if self._buffer is None or len(self._buffer) < size_bytes:
            size_bytes = max(1, size_bytes, os.fstat(self._buffer_handle).st_size)
            os.ftruncate(self._buffer_handle, size_bytes)
            self._buffer = mmap.mmap(self._buffer_handle, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._targets = None
        return self._buffer


class _Destination:
    """Where the rows of one tensor are read to: its own memory on a CPU, a staging copy for a GPU."""

    def __init__(self, local: LocalTensor) -> None:
        self._target = local.tensor.detach()
        direct = self._target.device.type == "cpu" and self._target.is_contiguous()
        self._host = self._target if direct else torch.empty_like(self._target, device="cpu").contiguous()
        self.wanted = Destination(
            spec=local.spec,
            row_offset=local.row_offset,
            num_rows=len(self._target) if self._target.ndim else 1,
            out=self._host.reshape(-1).view(torch.uint8).numpy().data,
        )

    def finish(self) -> None:
        if self._host is not self._target:
            self._target.copy_(self._host)


def _manifest(store: Store, name: str) -> Manifest:
    ref = CheckpointRef.parse(name)
    assert ref is not None, name
    return load_manifest(store, ref)


def _check_fingerprints(actual: Mapping[str, int], expected: Mapping[str, str], checkpoint: str) -> None:
    """Collective in effect: all ranks hold the same values, so all raise or none."""
    if missing := sorted(set(expected) ^ set(actual)):
        raise StateMismatchError(f"{checkpoint}: {missing[0]} is in the checkpoint or in this run's state, not in both")
    if wrong := sorted(name for name, value in actual.items() if expected[name] != format_fingerprint(value)):
        raise StateMismatchError(f"{checkpoint}: {wrong[0]} does not have its recorded fingerprint after loading")


def _any_rank(value: bool) -> bool:
    """Whether it is true anywhere. Collective: all ranks."""
    answer = torch.tensor(int(value), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)
