"""An agent's work, without Ray: start the trainer, watch it, keep its snapshots, store its shards."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from orchestrator.agents.forkserver import ForkServer
from orchestrator.agents.heartbeat import Heartbeat
from orchestrator.agents.shard_writer import HeldSnapshot, ShardWriter
from orchestrator.agents.trainer_probe import STACK_SIGNAL, busy_s, read_stack, wordless_end
from orchestrator.checkpoint.peer_objects import PeerRing
from orchestrator.coordination.hub import Wire
from orchestrator.coordination.stragglers import REPORT_S, REPORT_STEPS
from orchestrator.coordination.watchdog import BEAT_S, SILENT_LIMIT_S, Silence
from orchestrator.errors import StartError
from orchestrator.messages.attempts import (
    Begin,
    ChildEnded,
    Down,
    ExitKind,
    FromTrainer,
    Kill,
    Launch,
    Outcome,
    Rendezvous,
    Started,
    Stepped,
    TrainerExit,
)
from orchestrator.messages.liveness import Busy, Dump, Gate, Stack, StopAt, Told
from orchestrator.messages.saves import MemorySnapshot, Overwriting, Paused, SaveEnded, Skipped, Snapshot
from orchestrator.processes import process_state
from orchestrator.run_spec import RunSpec
from orchestrator.stores import Stores
from trainers.progress import Progress
from trainers.trace import num_bytes, read_place


class Supervisor:
    """One for each rank: turns the coordinator's orders into a trainer process, and its life into messages."""

    def __init__(
        self,
        spec: RunSpec,
        rank: int,
        world_size: int,
        coordinator: Wire,
        node: str = "",
        start_fork_server: Callable[[Sequence[str]], ForkServer] = ForkServer.start,
        ring: PeerRing | None = None,
    ) -> None:
        """Args: ring: the memory of the nodes, as seen from this one, if the run uses it."""
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._coordinator = coordinator
        self._node = node
        self._start_fork_server = start_fork_server
        self._fork_server: ForkServer | None = start_fork_server(spec.preload)
        # Anonymous shared memory: it outlives the trainers, and cannot outlive this process.
        self._buffer = os.memfd_create("unbroken-snapshot")
        # Also read when the trainer has left no word: which samples was it at?
        self._trace_handle = os.memfd_create("unbroken-trace")
        os.ftruncate(self._trace_handle, num_bytes(spec.config["train"]["microbatch_size"]))
        self._trace = mmap.mmap(self._trace_handle, 0)
        self._ring = ring
        stores = Stores.open(spec.run_url, ring)
        self._writer = ShardWriter(stores, self._buffer, rank, world_size, spec.checkpoint)
        self._attempt = 0
        self._stacks = os.memfd_create("unbroken-stacks")
        self._trainer: Connection | None = None
        self._orders: Connection | None = None
        self._pid: int | None = None
        self._exit: TrainerExit | None = None
        self._kill: Kill | None = None
        self._pending: Progress | None = None
        self._held: HeldSnapshot | None = None
        self._heartbeat = Heartbeat(coordinator.send)
        self._silence = Silence(time.monotonic())
        self._work: tuple[int, float, float] | None = None

    def run(self) -> Outcome:
        """Serve until the coordinator has an outcome.

        Raises:
            ConnectionError: the coordinator is gone.
        """
        try:
            while True:
                sources = [self._coordinator, self._writer.connection]
                if self._fork_server is not None:
                    sources.append(self._fork_server.connection)
                if self._trainer is not None:
                    sources.append(self._trainer)
                # One at a time: serving a source may consume what made the next one ready.
                ready = wait(sources, timeout=BEAT_S)
                if self._fork_server is not None:  # also if there is always something ready, such as rank 0's beats
                    self._fork_server.look()
                if ready and (outcome := self._serve(ready[0])) is not None:
                    return outcome
                if self._silence.passed(time.monotonic()) > SILENT_LIMIT_S:
                    raise ConnectionError(f"rank {self._rank}: rank 0 has been silent for {SILENT_LIMIT_S:g} s")
        finally:
            self._heartbeat.close()
            self._writer.close()
            if self._fork_server is not None:
                self._fork_server.close()
            self._coordinator.close()
            for handle in (self._trace_handle, self._buffer, self._stacks):
                os.close(handle)

    def _serve(self, source: object) -> Outcome | None:
        if source is self._coordinator:
            try:
                message = self._coordinator.recv()
            except (EOFError, OSError) as error:
                raise ConnectionError(f"rank {self._rank}: the coordinator on rank 0 is gone") from error
            self._silence.heard()
            if isinstance(message, Outcome):
                return message
            self._obey(message)
        elif source is self._trainer:
            self._hear_trainer()
        elif source is self._writer.connection:
            self._coordinator.send(self._writer.connection.recv())
        else:
            self._hear_fork_server()
        return None

    def _obey(self, message: object) -> None:
        match message:
            case Launch():
                try:
                    self._launch(message)
                except StartError as error:
                    self._drop_fork_server()
                    self._report_down(TrainerExit(kind=ExitKind.START, message=str(error), details=error.details))
            case Kill(attempt=attempt) if attempt == self._attempt and self._pid is not None:
                assert self._fork_server is not None, "the trainer's end was not reported"
                self._kill = message
                self._fork_server.signal(self._pid, signal.SIGKILL)
            case Dump(attempt=attempt) if attempt == self._attempt:
                self._coordinator.send(self._stack())
            case Gate(attempt=attempt) | StopAt(attempt=attempt) if attempt == self._attempt:
                self._tell(self._orders, message)
                if isinstance(message, StopAt):
                    self._coordinator.send(Told(attempt=attempt, step=message.step))
            case SaveEnded(progress=progress) if progress == self._pending:
                self._pending = None
                self._writer.drop()  # another rank's shard may have failed while this one's is tried again
                self._tell(self._trainer, message)
            case Rendezvous():
                self._tell(self._orders, message)  # on the other pipe the end of a save may come before it

    def _launch(self, launch: Launch) -> None:
        self._attempt, self._exit, self._kill, self._pending, self._work = launch.attempt, None, None, None, None
        self._writer.drop()
        # Before anything that can fail: a snapshot that is not wanted any more must not be offered again.
        memory = self._recall(launch)
        self._trace[:] = bytes(len(self._trace))
        if self._fork_server is None:
            self._fork_server = self._start_fork_server(self._spec.preload)
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        ours, theirs = socket.socketpair()
        orders, ordered = socket.socketpair()
        with ours, theirs, orders, ordered:
            handles = (theirs.fileno(), self._buffer, ordered.fileno(), self._stacks, self._trace_handle)
            self._pid = self._fork_server.fork(*handles)
            self._trainer, self._orders = Connection(ours.detach()), Connection(orders.detach())
        self._heartbeat.watch(launch.attempt, self._pid)
        begin = Begin(
            config=self._spec.config,
            run_url=self._spec.run_url,
            checkpoint=self._spec.checkpoint,
            rank=self._rank,
            world_size=self._world_size,
            restore=launch.restore,
            peers=self._ring if launch.tier == "peer" else None,
            memory=memory,
            committed=launch.committed,
            exclusions=launch.exclusions,
            every_steps=launch.every_steps,
        )
        self._tell(self._trainer, begin)
        self._coordinator.send(Started(attempt=launch.attempt, pid=self._pid, agent_pid=os.getpid(), node=self._node))

    def _recall(self, launch: Launch) -> MemorySnapshot | None:
        """The snapshot to start from, if it lies here; it is stored again, for this attempt, if it is not committed."""
        if launch.memory is None:
            # Whatever this attempt starts from may be older, or somebody else's: from here on the snapshot is of a past
            # that has been given up. It must not be taken for a present one after the next death.
            self._held = None
            return None
        held = self._held
        assert held is not None and held.snapshot.progress == launch.memory, (held, launch)
        if pending := launch.memory != launch.committed:
            self._pending = launch.memory
            self._writer.submit(launch.attempt, held)
        return held.recall(pending)

    def _tell(self, pipe: Connection | None, message: object) -> None:
        # A trainer that is gone reads nothing; that it is gone is reported by the fork server.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if pipe is not None:
                pipe.send(message)

    def _stack(self) -> Stack:
        pid, server, text = self._pid, self._fork_server, ""
        state = process_state(pid) if pid is not None else ""
        if pid is not None and server is not None and state not in ("", "T"):
            text = read_stack(self._stacks, lambda: server.signal(pid, STACK_SIGNAL))
        return Stack(attempt=self._attempt, state=state, text=text)

    def _measure(self, step: int) -> None:
        """Report this rank's own work now and then."""
        if self._pid is None or (work := busy_s(self._pid)) is None:
            return
        now = time.monotonic()
        since_step, since_s, since = self._work or (step, work, now)
        if step - since_step >= REPORT_STEPS and now - since >= REPORT_S:
            self._coordinator.send(Busy(attempt=self._attempt, num_steps=step - since_step, seconds=work - since_s))
            self._work = None
        self._work = self._work or (step, work, now)

    def _hear_trainer(self) -> None:
        assert self._trainer is not None
        try:
            message = self._trainer.recv()
        except (EOFError, OSError):  # the latter in the middle of a message: it was killed while it sent one
            self._trainer.close()
            self._trainer = None
            return
        match message:
            case TrainerExit():
                self._exit = message
            case Overwriting():
                self._held = None
            case Snapshot():
                self._pending, self._held = message.progress, HeldSnapshot(snapshot=message)
                self._writer.submit(self._attempt, self._held)
            case Stepped(progress=progress):
                self._measure(progress.step)
                if self._rank == 0:  # the numbers are the same on all ranks
                    self._coordinator.send(FromTrainer(attempt=self._attempt, message=message))
            case Skipped() | Paused() if self._rank != 0:
                pass  # all skip alike; they wait for each other
            case _:
                self._coordinator.send(FromTrainer(attempt=self._attempt, message=message))

    def _hear_fork_server(self) -> None:
        assert self._fork_server is not None
        try:
            ended = self._fork_server.hear()
        except StartError:
            # The next launch starts another one. If that can not start, it is a failure of that launch: bounded, and
            # with the reason.
            self._drop_fork_server()
            ended = ChildEnded(self._pid or 0, -signal.SIGKILL)  # the trainer went with it
        if self._pid is None or ended.pid != self._pid:
            return
        self._heartbeat.watch(self._attempt, None)
        while self._trainer is not None:  # its last words, up to the end of file
            if self._trainer.poll(BEAT_S):
                self._hear_trainer()
            elif process_state(ended.pid) in ("", "Z"):  # what it had started holds its pipe open
                self._trainer.close()
                self._trainer = None
        self._report_down(self._cause(ended.status))

    def _drop_fork_server(self) -> None:
        assert self._fork_server is not None
        self._fork_server.close()
        self._fork_server = None

    def _report_down(self, end: TrainerExit) -> None:
        self._pid = None
        held = self._held.snapshot.progress if self._held else None
        self._coordinator.send(Down(attempt=self._attempt, exit=end, pending=self._pending, held=held))

    def _cause(self, status: int) -> TrainerExit:
        if self._exit is not None:
            return self._exit
        if self._kill is not None:
            return self._kill.cause or TrainerExit(kind=ExitKind.PEER_LOST, message="ended together with the others")
        return wordless_end(status, read_place(memoryview(self._trace)))
