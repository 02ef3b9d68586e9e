"""The trainer: `trainers.loop` in a forked process, its three ports wired to the agent's pipe and shared memory."""

from __future__ import annotations

import faulthandler
import mmap
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from orchestrator.agents.checkpointer import LaggingError, SaveSchedule, SharedMemoryCheckpointer
from orchestrator.agents.last_words import last_words
from orchestrator.agents.trainer_probe import STACK_SIGNAL
from orchestrator.coordination.watchdog import Phase
from orchestrator.data.files import data_files
from orchestrator.messages.attempts import (
    Begin,
    Finished,
    Listening,
    Reached,
    Rendezvous,
    Stepped,
)
from orchestrator.messages.evaluations import Drew, Evaluated, Validated
from orchestrator.messages.liveness import AtGate, Entered, Gate, StopAt
from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.loop import train
from trainers.ports import Directive
from trainers.progress import Progress
from trainers.trace import StepTrace


class StopOnOrder:
    """A `Control`: a `SaveSchedule`, and a stop after the step that the coordinator has agreed on with all ranks."""

    def __init__(self, schedule: SaveSchedule, num_steps: int, agent: Connection, orders: Connection) -> None:
        """Args: orders: delivers `Gate` (to rank 0) and `StopAt`; see `orchestrator/coordination/halting.py`."""
        self._schedule = schedule
        self._num_steps = num_steps
        self._agent = agent
        self._orders = orders
        self._stop_at: int | None = None

    def poll(self, progress: Progress) -> Directive:
        """The directive for `progress`. Raises EOFError when the agent has let go of this process."""
        while self._orders.poll():
            self._obey(self._orders.recv(), progress)
        # The schedule may leave a save out, or ask the other ranks whether to; this one is made in any case, by all.
        return self._schedule.stop() if progress.step == self._stop_at else self._schedule.poll(progress)

    def _obey(self, order: object, progress: Progress) -> None:
        if isinstance(order, StopAt):
            self._stop_at = order.step
        elif progress.step < self._num_steps:  # at the last step the run ends anyway
            assert isinstance(order, Gate), order
            self._agent.send(AtGate(progress=progress))
            while not isinstance(order := self._orders.recv(), StopAt):
                # For a more urgent order. If the first gate was settled before that came, nothing else is answered.
                self._agent.send(AtGate(progress=progress))
            self._stop_at = order.step


class PipeSink:
    """Numbers of a step and of an evaluation, sent to the agent."""

    def __init__(self, agent: Connection, trace: StepTrace, rank: int) -> None:
        self._agent = agent
        self._trace = trace
        self._rank = rank

    def log(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        losses, ranks = self._trace.losses, self._trace.ranks
        broken = self._trace.broken
        self._agent.send(Stepped(progress=progress, metrics=dict(metrics), losses=losses, ranks=ranks, broken=broken))

    def evaluating(self) -> None:
        self._agent.send(Entered(phase=Phase.EVALUATING))

    def validated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        self._report(Validated(progress=progress, metrics=dict(metrics)))

    def drew(self, progress: Progress, weights: str, png: bytes) -> None:
        self._report(Drew(progress=progress, weights=weights, png=png))

    def evaluated(self, progress: Progress, seconds: float) -> None:
        self._report(Evaluated(progress=progress, seconds=seconds))
        self._agent.send(Entered(phase=Phase.TRAINING))

    def _report(self, message: object) -> None:
        if self._rank == 0:  # the same on all ranks
            self._agent.send(message)


def _join(agent: Connection, orders: Connection, begin: Begin) -> None:
    """Form the process group; rank 0's trainer serves the store, so that every attempt has a fresh one.

    Args:
        orders: delivers the `Rendezvous`.
    """
    timeout = timedelta(minutes=30)
    served = None
    if begin.rank == 0:
        served = dist.TCPStore("0.0.0.0", 0, begin.world_size, is_master=True, wait_for_workers=False, timeout=timeout)
        agent.send(Listening(port=served.port))
    meeting = orders.recv()
    assert isinstance(meeting, Rendezvous), meeting
    store = served or dist.TCPStore(meeting.host, meeting.port, begin.world_size, is_master=False, timeout=timeout)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=begin.rank, world_size=begin.world_size)


def main(pipe: int, buffer: int, orders: int, stacks: int, trace_memory: int) -> int:
    """Train until done. Called in the forked process; returns its exit code.

    Args:
        pipe: file descriptor of the connection to the agent.
        buffer: file descriptor of the agent's shared memory for snapshots.
        orders: file descriptor of the connection that says where to meet, and orders to stop.
        stacks: file descriptor of the agent's memory for the stacks of a process that hangs.
        trace_memory: that of its memory for a `StepTrace`.
    """
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    agent, orders_from, trace, quarantine = Connection(pipe), Connection(orders), None, False
    begin = agent.recv()
    assert isinstance(begin, Begin), begin
    try:
        config = decode(TrainerConfig, begin.config)
        quarantine = config.data.quarantine
        trace = StepTrace(config.train.microbatch_size, memoryview(mmap.mmap(trace_memory, 0)))
        torch.set_num_threads(config.parallel.cpu_threads)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        _join(agent, orders_from, begin)
        agent.send(Reached(stage="process group"))
        state, task = build(config, device, trace, data_files)
        state.exclusions = begin.exclusions
        agent.send(Reached(stage="built"))
        checkpointer = SharedMemoryCheckpointer(agent, buffer, begin, config.train.num_steps)
        schedule = SaveSchedule(checkpointer, begin.checkpoint, config.train.num_steps)
        control = StopOnOrder(schedule, config.train.num_steps, agent, orders_from)
        stopped = None
        try:
            train(state, task, control, checkpointer, PipeSink(agent, trace, begin.rank))
        except LaggingError as error:
            stopped = str(error)
        agent.send(Finished(progress=state.progress, stopped=stopped))
        agent.recv()  # the others may still need this process; the agent closes the pipe when all are done
    except EOFError:
        return 0  # the agent has let go of us
    except BaseException as error:
        with suppress(BrokenPipeError):  # the agent has let go of us: nobody wants to know
            agent.send(last_words(error, trace.place() if trace else None, quarantine))
        return 1
    return 0
