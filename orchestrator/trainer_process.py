"""The trainer: `trainers.loop` in a forked process, its three ports wired to the agent's pipe and shared memory."""

from __future__ import annotations

import faulthandler
import traceback
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from orchestrator.checkpointer import LaggingError, SaveSchedule, SharedMemoryCheckpointer
from orchestrator.errors import DamagedCheckpointError, RunMismatchError, StorageError
from orchestrator.messages import (
    Begin,
    ExitKind,
    Finished,
    Listening,
    Reached,
    Rendezvous,
    Stepped,
    TrainerExit,
)
from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError, NonFiniteError, StateMismatchError
from trainers.loop import train
from trainers.progress import Progress

_KINDS: dict[type[BaseException], ExitKind] = {
    ConfigError: ExitKind.CONFIG,
    RunMismatchError: ExitKind.CONFIG,
    NonFiniteError: ExitKind.NON_FINITE,
    StateMismatchError: ExitKind.DAMAGED,
    DamagedCheckpointError: ExitKind.DAMAGED,
    StorageError: ExitKind.STORAGE,
    dist.DistBackendError: ExitKind.PEER_LOST,
    dist.DistNetworkError: ExitKind.PEER_LOST,
    dist.DistStoreError: ExitKind.PEER_LOST,
}

_GLOO_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo", "Broken pipe")


class PipeSink:
    """Numbers of a step, sent to the agent."""

    def __init__(self, agent: Connection) -> None:
        self._agent = agent

    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        self._agent.send(Stepped(progress=progress, metrics=dict(metrics)))


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


def _describe(error: BaseException) -> TrainerExit:
    kind = next((kind for cls, kind in _KINDS.items() if isinstance(error, cls)), ExitKind.ERROR)
    if kind is ExitKind.ERROR and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GLOO_LOST):
        kind = ExitKind.PEER_LOST
    message = str(error) if kind in (ExitKind.CONFIG, ExitKind.DAMAGED, ExitKind.STORAGE) else repr(error)
    return TrainerExit(kind=kind, message=message, details=traceback.format_exc())


def main(pipe: int, buffer: int) -> int:
    """Train until done. Called in the forked process; returns its exit code.

    Args:
        pipe: file descriptor of the connection to the agent.
        buffer: file descriptor of the agent's shared memory for snapshots.
    """
    faulthandler.enable()
    agent = Connection(pipe)
    begin = agent.recv()
    assert isinstance(begin, Begin), begin
    try:
        config = decode(TrainerConfig, begin.config)
        torch.set_num_threads(config.parallel.cpu_threads)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        _join(agent, begin)
        agent.send(Reached(stage="process group"))
        state, task = build(config, device)
        agent.send(Reached(stage="built"))
        checkpointer = SharedMemoryCheckpointer(agent, buffer, begin, config.train.num_steps)
        control = SaveSchedule(checkpointer, begin.checkpoint, config.train.num_steps)
        stopped = None
        try:
            train(state, task, control, checkpointer, PipeSink(agent))
        except LaggingError as error:
            stopped = str(error)
        agent.send(Finished(progress=state.progress, stopped=stopped))
        agent.recv()  # the others may still need this process; the agent closes the pipe when all are done
    except EOFError:
        return 0  # the agent has let go of us
    except BaseException as error:
        agent.send(_describe(error))
        return 1
    return 0
