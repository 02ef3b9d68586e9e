"""An agent's work, without Ray: start the trainer, watch it, keep its snapshots, store its shards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from orchestrator.checkpoint.peer_objects import PeerRing
from orchestrator.forkserver import ForkServer
from orchestrator.messages import (
    Begin,
    ChildEnded,
    Down,
    ExitKind,
    FromTrainer,
    Kill,
    Launch,
    MemorySnapshot,
    Outcome,
    Overwriting,
    Paused,
    Rendezvous,
    SaveEnded,
    Skipped,
    Snapshot,
    Started,
    Stepped,
    TrainerExit,
)
from orchestrator.run_spec import RunSpec
from orchestrator.shard_writer import HeldSnapshot, ShardWriter
from orchestrator.stores import Stores
from trainers.progress import Progress


class Supervisor:
    """One for each rank: turns the coordinator's orders into a trainer process, and its life into messages."""

    def __init__(
        self,
        spec: RunSpec,
        rank: int,
        world_size: int,
        coordinator: Connection,
        start_fork_server: Callable[[Sequence[str]], ForkServer] = ForkServer,
        ring: PeerRing | None = None,
    ) -> None:
        """Args: ring: the memory of the nodes, as seen from this one, if the run uses it."""
        self._spec = spec
        self._rank = rank
        self._world_size = world_size
        self._coordinator = coordinator
        self._start_fork_server = start_fork_server
        self._fork_server = start_fork_server(spec.preload)
        # Anonymous shared memory: it outlives the trainers, and cannot outlive this process.
        self._buffer = os.memfd_create("unbroken-snapshot")
        self._ring = ring
        stores = Stores.open(spec.run_url, ring)
        self._writer = ShardWriter(stores, self._buffer, rank, world_size, spec.checkpoint)
        self._attempt = 0
        self._trainer: Connection | None = None
        self._pid: int | None = None
        self._exit: TrainerExit | None = None
        self._killed = False
        self._pending: Progress | None = None
        self._held: HeldSnapshot | None = None

    def run(self) -> Outcome:
        """Serve until the coordinator has an outcome.

        Raises:
            ConnectionError: the coordinator is gone.
        """
        try:
            while True:
                sources = [self._coordinator, self._fork_server.connection, self._writer.connection]
                if self._trainer is not None:
                    sources.append(self._trainer)
                # One at a time: serving a source may consume what made the next one ready.
                outcome = self._serve(wait(sources)[0])
                if outcome is not None:
                    return outcome
        finally:
            self._fork_server.close()
            self._coordinator.close()
            os.close(self._buffer)

    def _serve(self, source: object) -> Outcome | None:
        if source is self._coordinator:
            try:
                message = self._coordinator.recv()
            except (EOFError, OSError) as error:
                raise ConnectionError(f"rank {self._rank}: the coordinator on rank 0 is gone") from error
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
                self._launch(message)
            case Kill(attempt=attempt) if attempt == self._attempt and self._pid is not None:
                self._killed = True
                self._fork_server.kill(self._pid)
            case SaveEnded(progress=progress):
                if self._pending == progress:
                    self._pending = None
                    self._writer.drop()  # another rank's shard may have failed while this one's is tried again
                    self._tell_trainer(message)
            case Rendezvous():
                self._tell_trainer(message)

    def _launch(self, launch: Launch) -> None:
        self._attempt, self._exit, self._killed, self._pending = launch.attempt, None, False, None
        self._writer.drop()
        ours, theirs = socket.socketpair()
        with theirs:
            self._pid = self._fork_server.fork(theirs.fileno(), self._buffer)
        self._trainer = Connection(ours.detach())
        begin = Begin(
            config=self._spec.config,
            run_url=self._spec.run_url,
            checkpoint=self._spec.checkpoint,
            rank=self._rank,
            world_size=self._world_size,
            restore=launch.restore,
            peers=self._ring if launch.tier == "peer" else None,
            memory=self._recall(launch),
            committed=launch.committed,
        )
        self._tell_trainer(begin)
        self._coordinator.send(Started(attempt=launch.attempt, pid=self._pid, agent_pid=os.getpid()))

    def _recall(self, launch: Launch) -> MemorySnapshot | None:
        """The snapshot to start from, if it lies here; it is stored again, for this attempt, if it is not committed."""
        if launch.memory is None:
            # Whatever this attempt starts from may be older, or somebody else's: from here on the snapshot is of a past
            # that has been given up. It must not be taken for a present one after the next death.
            self._held = None
            return None
        held = self._held
        assert held is not None and held.snapshot.progress == launch.memory, (held, launch)
        # They are being hashed at most, which takes less than the trainer's start. None: the trainer will refuse it.
        chunks = () if held.hashed.exception() else held.hashed.result()
        pending = launch.memory != launch.committed
        if pending:
            self._pending = launch.memory
            self._store(launch.attempt, held)
        return MemorySnapshot(snapshot=held.snapshot, chunks=chunks, pending=pending)

    def _store(self, attempt: int, held: HeldSnapshot) -> None:
        tiers = self._spec.checkpoint.tiers_due(held.snapshot.progress.step, self._spec.num_steps)
        # A snapshot at no such step was taken for a reason of its own, and is to last.
        self._writer.submit(attempt, held, tiers or ("storage",))

    def _tell_trainer(self, message: object) -> None:
        # A trainer that is gone reads nothing; that it is gone is reported by the fork server.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self._trainer is not None:
                self._trainer.send(message)

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
                self._store(self._attempt, self._held)
            case Stepped() | Skipped() | Paused() if self._rank != 0:
                pass  # the numbers are the same on all ranks, and they wait for each other
            case _:
                self._coordinator.send(FromTrainer(attempt=self._attempt, message=message))

    def _hear_fork_server(self) -> None:
        try:
            ended = self._fork_server.connection.recv()
        except (EOFError, ConnectionResetError):
            self._fork_server.close()
            self._fork_server = self._start_fork_server(self._spec.preload)
            ended = ChildEnded(self._pid or 0, -signal.SIGKILL)  # the trainer went with it
        if ended.pid != self._pid:
            return
        self._pid = None
        while self._trainer is not None:  # its last words, up to the end of file
            self._hear_trainer()
        held = self._held.snapshot.progress if self._held else None
        cause = self._cause(ended.status)
        self._coordinator.send(Down(attempt=self._attempt, exit=cause, pending=self._pending, held=held))

    def _cause(self, status: int) -> TrainerExit:
        if self._exit is not None:
            return self._exit
        if self._killed:
            return TrainerExit(kind=ExitKind.PEER_LOST, message="ended together with the others")
        if status < 0:
            name = signal.Signals(-status).name
            return TrainerExit(kind=ExitKind.KILLED, message=f"the trainer was ended by {name}")
        return TrainerExit(kind=ExitKind.ERROR, message=f"the trainer left with exit code {status} and no word")
