"""Fork servers, of one agent and shared by those of a node; what they fork is no trainer here."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import orchestrator.agents.forkserver
from orchestrator.agents.forkserver import ForkServer, Keeper, open_fork_server
from orchestrator.agents.trainer_probe import STACK_SIGNAL
from orchestrator.errors import StartError
from orchestrator.messages.attempts import ChildEnded
from orchestrator.processes import parent

PRELOAD = ("tests.orchestrator.fake_trainer",)


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(orchestrator.agents.forkserver, "_FIND_S", 0.0)
    return uuid.uuid4().hex


@pytest.fixture
def keeper(name: str) -> Iterator[Keeper]:
    keeper = Keeper(name, PRELOAD)
    keeper.start()
    yield keeper
    keeper.close()
    assert keeper.process.wait(60) == 0, "it ends when nobody needs it any more"


def fork(server: ForkServer) -> tuple[int, Connection]:
    """A trainer: its id, and the pipe to it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        return server.fork(theirs.fileno()), Connection(ours.detach())


def is_gone(trainer: Connection) -> bool:
    with trainer:
        assert trainer.poll(30)
        try:
            trainer.recv()
        except (EOFError, ConnectionResetError):
            return True
    return False


def test_a_trainer_has_the_surroundings_of_its_agent(
    name: str, keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNBROKEN_TEST_PLACE", "here")
    agent = open_fork_server(name, PRELOAD)
    pid, trainer = fork(agent)
    with trainer:
        assert trainer.recv() == (str(tmp_path), "here")
        trainer.send(7)
        assert agent.hear() == ChildEnded(pid, 7)
    assert capfd.readouterr().out == "a trainer\n"
    agent.close()


def test_to_ask_a_trainer_for_its_stacks_before_it_can_give_them_ends_it_not(name: str, keeper: Keeper) -> None:
    agent = open_fork_server(name, PRELOAD)
    pid, trainer = fork(agent)
    with trainer:
        trainer.recv()
        agent.signal(pid, STACK_SIGNAL)
        trainer.send(7)
        assert agent.hear() == ChildEnded(pid, 7)
    agent.close()


def test_trainers_end_with_their_agent_and_the_server_with_the_last_one(name: str, keeper: Keeper) -> None:
    one, other = open_fork_server(name, PRELOAD), open_fork_server(name, PRELOAD)
    (_, first), (pid, second) = fork(one), fork(other)
    for trainer in (first, second):
        trainer.recv()
    one.signal(pid, signal.SIGKILL)  # not its own
    one.close()
    assert is_gone(first) and not second.poll(0.2)
    keeper.close()
    next_pid, third = fork(other)
    with third:
        third.recv()
    other.signal(pid, signal.SIGKILL)
    assert {other.hear(), other.hear()} == {ChildEnded(next_pid, 0), ChildEnded(pid, -signal.SIGKILL)}
    second.close()
    other.close()


def test_what_the_server_forked_dies_with_it(name: str, keeper: Keeper) -> None:
    agent = open_fork_server(name, PRELOAD)
    _, trainer = fork(agent)
    trainer.recv()
    keeper.process.kill()
    keeper.process.wait()
    assert is_gone(trainer)
    with pytest.raises(StartError, match="the process that trainers are forked from ended"):
        fork(agent)
    agent.close()
    own = open_fork_server(name, PRELOAD)  # nobody shares one under this name any more
    _, trainer = fork(own)
    trainer.recv()
    own.close()
    assert is_gone(trainer)
    keeper.process = subprocess.Popen(["true"])  # for the fixture


def test_a_shared_one_that_is_killed_is_started_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator.agents.forkserver, "_FIND_S", 60.0)
    keeper = Keeper(name, PRELOAD)
    keeping = threading.Thread(target=keeper.keep, daemon=True)
    keeping.start()
    servers = set()
    for _ in range(2):
        agent = open_fork_server(name, ["no_such_module"])
        pid, trainer = fork(agent)
        trainer.recv()
        server = keeper.process.pid
        servers.add(server)
        assert server == parent(pid)
        os.kill(server, signal.SIGKILL)
        assert is_gone(trainer)
        agent.close()
    assert len(servers) == 2
    keeper.close()
    keeping.join(60)
    assert not keeping.is_alive()


@pytest.mark.parametrize("shared", [True, False])
def test_one_that_is_stopped_is_ended(name: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator.agents.forkserver, "STOPPED_LIMIT_S", 0.1)
    monkeypatch.setattr(orchestrator.agents.forkserver, "BEAT_S", 0.02)
    keeper = Keeper(name, PRELOAD)
    if shared:
        keeper.start()
    agent = open_fork_server(name, PRELOAD)
    pid, trainer = fork(agent)
    trainer.recv()
    server = parent(pid)
    assert server is not None
    for _ in range(10):
        agent.look()
        time.sleep(0.02)
    assert not trainer.poll(), "it runs, so it is left alone"
    os.kill(server, signal.SIGSTOP)
    with pytest.raises(StartError, match="the process that trainers are forked from ended"):
        fork(agent)
    assert is_gone(trainer)
    agent.close()
    if shared:
        keeper.close()
        assert keeper.process.wait(60) == -signal.SIGKILL


def test_one_that_is_stopped_before_its_first_fork_is_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator.agents.forkserver, "STOPPED_LIMIT_S", 0.1)
    monkeypatch.setattr(orchestrator.agents.forkserver, "_FIND_S", 60.0)
    keeper = Keeper(name, PRELOAD)
    keeping = threading.Thread(target=keeper.keep, daemon=True)
    keeping.start()
    agent = open_fork_server(name, PRELOAD)
    while not hasattr(keeper, "process"):
        time.sleep(0.01)
    os.kill(server := keeper.process.pid, signal.SIGSTOP)
    told: list[str] = []

    def ask() -> None:
        with pytest.raises(StartError, match="the process that trainers are forked from ended"):
            fork(agent)
        told.append("it has ended")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(60)
    try:
        assert told, "the agent waits for it"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGCONT)
        keeper.close()
        agent.close()
    keeping.join(60)
    assert not keeping.is_alive()


def test_imports_that_fail_are_told(name: str) -> None:
    keeper = Keeper(name, ["no_such_module"])
    keeper.start()
    agent = open_fork_server(name, PRELOAD)
    with pytest.raises(StartError, match="its imports fail: ModuleNotFoundError: No module named 'no_such_module'"):
        fork(agent)
    agent.close()
    keeper.close()
    keeper.process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_gets_nothing(name: str, keeper: Keeper) -> None:
    stranger = f"""
import os, socket
os.setuid(65534)
end = socket.socket(socket.AF_UNIX)
end.connect("\\0unbroken-{name}")
print(end.recv(1))
"""
    done = subprocess.run([sys.executable, "-c", stranger], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "b''\n"
