"""The trainer: `trainers.loop` in a forked process, its three ports wired to the agent's pipe and shared memory."""

from __future__ import annotations

import faulthandler
import mmap
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from orchestrator.checkpoint.catalog import load_manifest
from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.reader import Destination, expected_fingerprints, read_rows
from orchestrator.checkpoint.store import Store
from orchestrator.errors import StorageError
from orchestrator.last_words import last_words
from orchestrator.liveness import AtGate, Entered, Gate, StopAt
from orchestrator.messages import (
    Begin,
    Finished,
    Listening,
    Paused,
    Reached,
    Rendezvous,
    Restored,
    SaveEnded,
    Snapshot,
    Stepped,
)
from orchestrator.trainer_probe import STACK_SIGNAL
from orchestrator.watchdog import Phase
from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import StateMismatchError
from trainers.fingerprint import format_fingerprint
from trainers.loop import train
from trainers.ports import Directive
from trainers.progress import Progress
from trainers.shards import Chunk
from trainers.state import LocalTensor, TrainState, fingerprints
from trainers.trace import StepTrace


class EverySteps:
    """Save every so many steps, and at the end. A function of progress, so all ranks decide alike."""

    def __init__(self, every_steps: int, num_steps: int) -> None:
        self._every_steps = every_steps
        self._num_steps = num_steps

    def poll(self, progress: Progress) -> Directive:
        return Directive(save=progress.step % self._every_steps == 0 or progress.step == self._num_steps)


class StopOnOrder:
    """`EverySteps`, and a stop after the step that the coordinator has agreed on with all ranks."""

    def __init__(self, every: EverySteps, num_steps: int, agent: Connection, orders: Connection) -> None:
        """Args: orders: delivers `Gate` (to rank 0) and `StopAt`; see `orchestrator/halting.py`."""
        self._every = every
        self._num_steps = num_steps
        self._agent = agent
        self._orders = orders
        self._stop_at: int | None = None

    def poll(self, progress: Progress) -> Directive:
        """The directive for `progress`. Raises EOFError when the agent has let go of this process."""
        while self._orders.poll():
            self._obey(self._orders.recv(), progress)
        directive = self._every.poll(progress)
        return Directive(save=True, stop=True) if progress.step == self._stop_at else directive

    def _obey(self, order: object, progress: Progress) -> None:
        if isinstance(order, StopAt):
            self._stop_at = order.step
        elif progress.step < self._num_steps:  # at the last step the run ends anyway
            assert isinstance(order, Gate), order
            self._agent.send(AtGate(progress=progress))
            # An earlier order may still lie there; the one that answers the gate is for a later step than this.
            while not isinstance(order := self._orders.recv(), StopAt):
                continue
            self._stop_at = order.step


class PipeSink:
    """Numbers of a step, sent to the agent."""

    def __init__(self, agent: Connection, trace: StepTrace) -> None:
        self._agent = agent
        self._trace = trace

    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        losses, ranks = self._trace.losses, self._trace.ranks
        self._agent.send(Stepped(progress=progress, metrics=dict(metrics), losses=losses, ranks=ranks))


class SharedMemoryCheckpointer:
    """Copies this rank's rows into the agent's buffer and trains on; the agent stores them."""

    def __init__(self, agent: Connection, buffer: int, begin: Begin) -> None:
        """Args: buffer: file descriptor of the shared memory that the agent keeps over the life of trainers."""
        self._agent = agent
        self._buffer_handle = buffer
        self._buffer: mmap.mmap | None = None
        self._begin = begin
        self._pending: Progress | None = None

    def restore(self, state: TrainState) -> None:
        if self._begin.restore is not None:
            store = Store.open(self._begin.run_url)
            manifest = _manifest(store, self._begin.restore)
            state.load_scalars(manifest.scalars)
            destinations = [_Destination(local) for local in state.tensors() if local.tensor.numel()]
            expected = expected_fingerprints(manifest)
            read_rows(store, manifest, [destination.wanted for destination in destinations])
            for destination in destinations:
                destination.finish()
            state.progress = manifest.progress
            _check_fingerprints(fingerprints(state), expected, self._begin.restore)
            state.generators.apply()
        self._agent.send(Restored(progress=state.progress))

    def save(self, state: TrainState) -> None:
        begun_s = time.monotonic()
        self._settle()  # a failed save was reported by the coordinator; this newer one takes its place
        self._agent.send(Entered(phase=Phase.SAVING))
        state.generators.capture()
        chunks, pieces, end = [], [], 0
        for local in sorted(state.tensors(), key=_element_bytes, reverse=True):
            start, stop = local.owned_rows()
            if stop == start or not local.tensor.numel():
                continue
            begin, end = end, end + (stop - start) * local.spec.row_bytes
            offset = local.row_offset + start
            chunks.append(Chunk(spec=local.spec, row_offset=offset, num_rows=stop - start, begin=begin, end=end))
            pieces.append(local.tensor[start:stop] if local.tensor.ndim else local.tensor)
        target = torch.frombuffer(self._room(end), dtype=torch.uint8)
        for chunk, piece in zip(chunks, pieces, strict=True):
            target[chunk.begin : chunk.end].copy_(piece.detach().contiguous().view(-1).view(torch.uint8))
        self._pending = state.progress
        self._agent.send(
            Snapshot(progress=state.progress, chunks=tuple(chunks), size_bytes=end, scalars=state.scalars())
        )
        self._agent.send(Paused(progress=state.progress, stall_s=time.monotonic() - begun_s))
        self._agent.send(Entered(phase=Phase.TRAINING))

    def wait(self) -> None:
        if (error := self._settle()) is not None:
            raise StorageError(error)

    def _settle(self) -> str | None:
        """Wait for the save in flight, if there is one; why it failed, if it did."""
        if self._pending is None:
            return None
        self._agent.send(Entered(phase=Phase.STORING))
        ended = self._agent.recv()
        assert isinstance(ended, SaveEnded) and ended.progress == self._pending, ended
        self._pending = None
        return ended.error

    def _room(self, size_bytes: int) -> mmap.mmap:
        """The buffer, at least this large. It only grows and is reused over trainers, so its pages are warm."""
        if self._buffer is None or len(self._buffer) < size_bytes:
            size_bytes = max(size_bytes, os.fstat(self._buffer_handle).st_size)
            os.ftruncate(self._buffer_handle, size_bytes)
            self._buffer = mmap.mmap(self._buffer_handle, size_bytes)
        return self._buffer


def _element_bytes(local: LocalTensor) -> int:
    """Larger elements go first in a shard file, so that every tensor in it is aligned."""
    return local.tensor.element_size()


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


def _join(agent: Connection, begin: Begin) -> None:
    """Form the process group; rank 0's trainer serves the store, so that every attempt has a fresh one."""
    timeout = timedelta(minutes=30)
    served = None
    if begin.rank == 0:
        served = dist.TCPStore("0.0.0.0", 0, begin.world_size, is_master=True, wait_for_workers=False, timeout=timeout)
        agent.send(Listening(port=served.port))
    meeting = agent.recv()
    assert isinstance(meeting, Rendezvous), meeting
    store = served or dist.TCPStore(meeting.host, meeting.port, begin.world_size, is_master=False, timeout=timeout)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=begin.rank, world_size=begin.world_size)


def main(pipe: int, buffer: int, orders: int, stacks: int, trace_memory: int) -> int:
    """Train until done. Called in the forked process; returns its exit code.

    Args:
        pipe: file descriptor of the connection to the agent.
        buffer: file descriptor of the agent's shared memory for snapshots.
        orders: file descriptor of the connection that orders to stop come on.
        stacks: file descriptor of the agent's memory for the stacks of a process that hangs.
        trace_memory: that of its memory for a `StepTrace`.
    """
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    agent, trace, quarantine = Connection(pipe), None, False
    begin = agent.recv()
    assert isinstance(begin, Begin), begin
    try:
        config = decode(TrainerConfig, begin.config)
        quarantine = config.data.quarantine
        trace = StepTrace(config.train.microbatch_size, memoryview(mmap.mmap(trace_memory, 0)))
        torch.set_num_threads(config.parallel.cpu_threads)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        _join(agent, begin)
        agent.send(Reached(stage="process group"))
        state, task = build(config, device, trace)
        state.exclusions = begin.exclusions
        agent.send(Reached(stage="built"))
        every = EverySteps(begin.every_steps, config.train.num_steps)
        control = StopOnOrder(every, config.train.num_steps, agent, Connection(orders))
        train(state, task, control, SharedMemoryCheckpointer(agent, buffer, begin), PipeSink(agent, trace))
        agent.send(Finished(progress=state.progress))
        agent.recv()  # the others may still need this process; the agent closes the pipe when all are done
    except EOFError:
        return 0  # the agent has let go of us
    except BaseException as error:
        with suppress(BrokenPipeError):  # the agent has let go of us: nobody wants to know
            agent.send(last_words(error, trace.place() if trace else None, quarantine))
        return 1
    return 0
