"""An agent alone: orders and a trainer's messages in, a fork server that only remembers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.agents.supervisor import Supervisor
from orchestrator.messages.attempts import Begin, ChildEnded, Down, Ending, ExitKind, Kill, Launch, Outcome, TrainerExit
from orchestrator.messages.liveness import Beat
from orchestrator.messages.saves import Overwriting, SaveEnded, Snapshot
from tests.orchestrator.group import make_spec
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

FIVE = Progress(5, 50)
CHUNK = Chunk(spec=TensorSpec(name="a", dtype="U8", shape=(100,)), row_offset=0, num_rows=100, begin=0, end=100)
SNAPSHOT = Snapshot(progress=FIVE, chunks=(CHUNK,), size_bytes=100, scalars={})
NO_PROCESS = 1 << 22  # the kernel gives no such id


@dataclass
class Trainer:
    pid: int
    pipe: Connection


class Forks:
    """In the place of a fork server."""

    def __init__(self) -> None:
        self.connection, self.end = cast(tuple[Connection, Connection], Pipe())
        self.trainers: list[Trainer] = []
        self.signals: list[tuple[int, int]] = []
        self.looks = 0

    def fork(self, pipe: int, buffer: int, *_: int) -> int:
        os.ftruncate(buffer, 100)
        self.trainers.append(Trainer(NO_PROCESS + len(self.trainers), Connection(os.dup(pipe))))
        return self.trainers[-1].pid

    def signal(self, pid: int, number: int) -> None:
        self.signals.append((pid, number))

    def hear(self) -> ChildEnded:
        return self.connection.recv()

    def look(self) -> None:
        self.looks += 1

    def close(self) -> None:
        self.connection.close()


class Agent:
    def __init__(self, folder: Path) -> None:
        self.forks, self.sent = Forks(), []
        self._inbox, orders = cast(tuple[Connection, Connection], Pipe())
        self._wire: Any = SimpleNamespace(
            send=self.sent.append, recv=orders.recv, fileno=orders.fileno, close=orders.close
        )
        forks: Any = self.forks
        self._supervisor = Supervisor(make_spec(str(folder)), 0, 1, self._wire, start_fork_server=lambda preload: forks)

    def obey(self, message: object) -> None:
        self._inbox.send(message)
        self._supervisor._serve(self._wire)

    def launch(self, attempt: int, **fields: Any) -> tuple[Trainer, Begin]:
        self.obey(Launch(attempt=attempt, restore=None, **fields))
        trainer = self.forks.trainers[-1]
        return trainer, trainer.pipe.recv()

    def hear(self, trainer: Trainer, *messages: object) -> None:
        for message in messages:
            trainer.pipe.send(message)
            self._supervisor._serve(self._supervisor._trainer)

    def lose(self, trainer: Trainer, status: int = -signal.SIGKILL) -> Down:
        """It ends, and the agent hears that first from its fork server."""
        trainer.pipe.close()
        self.forks.end.send(ChildEnded(trainer.pid, status))
        self._supervisor._serve(self.forks.connection)
        return next(message for message in reversed(self.sent) if isinstance(message, Down))

    def close(self) -> None:
        self._inbox.send(Outcome(ending=Ending.STOPPED, message="done"))
        self._supervisor.run()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path)
    yield agent
    agent.close()


def test_a_snapshot_is_offered_when_it_is_whole_and_not_while_it_is_overwritten(agent: Agent) -> None:
    trainer, _ = agent.launch(1)
    agent.hear(trainer, Overwriting(), SNAPSHOT)
    assert (down := agent.lose(trainer)).held == down.pending == FIVE
    trainer, _ = agent.launch(2, memory=FIVE)
    agent.hear(trainer, Overwriting())
    assert agent.lose(trainer).held is None


def test_who_begins_from_storage_forgets_what_lies_in_memory(agent: Agent) -> None:
    trainer, _ = agent.launch(1)
    agent.hear(trainer, Overwriting(), SNAPSHOT)
    agent.lose(trainer)
    trainer, _ = agent.launch(2)
    assert agent.lose(trainer).held is None


def test_a_snapshot_in_memory_is_stored_again_unless_it_is_committed(agent: Agent) -> None:
    trainer, begin = agent.launch(1)
    assert begin.memory is None
    agent.hear(trainer, Overwriting(), SNAPSHOT)
    agent.lose(trainer)
    for attempt, committed in ((2, Progress()), (3, FIVE)):
        trainer, begin = agent.launch(attempt, memory=FIVE, committed=committed)
        assert begin.memory is not None and begin.memory.pending == (committed != FIVE)
        assert [chunk.num_rows for chunk in begin.memory.chunks] == [100]
        assert agent.lose(trainer).pending == (None if committed == FIVE else FIVE)


def test_only_the_end_of_its_own_save_is_passed_on(agent: Agent) -> None:
    trainer, _ = agent.launch(1)
    agent.hear(trainer, Overwriting(), SNAPSHOT)
    agent.obey(SaveEnded(progress=Progress(4, 40)))
    assert not trainer.pipe.poll()
    agent.obey(SaveEnded(progress=FIVE))
    assert trainer.pipe.recv() == SaveEnded(progress=FIVE)
    assert agent.lose(trainer).pending is None


def test_an_order_to_end_another_attempt_is_not_obeyed(agent: Agent) -> None:
    trainer, _ = agent.launch(2)
    agent.obey(Kill(attempt=1))
    assert agent.forks.signals == []
    cause = TrainerExit(kind=ExitKind.HANG, message="no step")
    agent.obey(Kill(attempt=2, cause=cause))
    assert agent.forks.signals == [(trainer.pid, signal.SIGKILL)]
    assert agent.lose(trainer).exit == cause


def test_last_words_count_though_the_end_is_heard_before_them(agent: Agent) -> None:
    trainer, _ = agent.launch(1)
    trainer.pipe.send(words := TrainerExit(kind=ExitKind.CONFIG, message="model.args.x=1 is wrong"))
    assert agent.lose(trainer, status=1).exit == words


def test_a_trainer_is_gone_though_what_it_had_started_holds_its_pipe(agent: Agent) -> None:
    trainer, _ = agent.launch(1)
    trainer.pipe.send(words := TrainerExit(kind=ExitKind.DIVERGED, message="no number"))
    with Connection(os.dup(trainer.pipe.fileno())):  # a worker of a pool, say, that waits for its next job
        lost: list[Down] = []
        losing = threading.Thread(target=lambda: lost.append(agent.lose(trainer)), daemon=True)
        losing.start()
        losing.join(30)
        assert [down.exit for down in lost] == [words]


def test_the_fork_server_is_looked_at_though_there_is_always_something_to_read(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    for _ in range(20):
        agent._inbox.send(Beat())
    agent.close()
    assert agent.forks.looks >= 20


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (-signal.SIGKILL, ExitKind.KILLED, "SIGKILL"),
        (-signal.SIGTERM, ExitKind.KILLED, "SIGTERM"),
        (-signal.SIGSEGV, ExitKind.CRASHED, "SIGSEGV"),
        (-signal.SIGABRT, ExitKind.CRASHED, "SIGABRT"),
        (-41, ExitKind.KILLED, "signal 41"),  # one for real time, which has no name
        (3, ExitKind.ERROR, "exit code 3"),
    ],
)
def test_how_a_trainer_ended_that_left_no_word(agent: Agent, status: int, kind: ExitKind, message: str) -> None:
    trainer, _ = agent.launch(1)
    end = agent.lose(trainer, status).exit
    assert end.kind is kind and message in end.message
