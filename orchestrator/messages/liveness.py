"""What hub, agents and trainers say to each other about being alive, and about stopping together. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.coordination.watchdog import Phase
from trainers.progress import Progress

# trainer -> agent -> coordinator


@dataclass(frozen=True, kw_only=True)
class Entered:
    """This rank begins something that takes as long as it takes, or is back to training."""

    phase: Phase


@dataclass(frozen=True, kw_only=True)
class AtGate:
    """Rank 0 stands still after this step, and with it soon every rank, until it is told where to stop."""

    progress: Progress


# coordinator -> agent -> trainer


@dataclass(frozen=True, kw_only=True)
class Gate:
    """To rank 0: stand still after the step that you are in and say which it was."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class StopAt:
    """Save after this step and end. To rank 0: and go on from the gate."""

    attempt: int
    step: int


# between hub and agents, both ways


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The sender's process runs."""

    attempt: int = 0
    stopped_s: float = 0.0
    """For how long the trainer has been stopped by a signal (SIGSTOP)."""
    starved_s: float = 0.0
    """For how long, since the last beat, it wanted to run while others had the CPU."""


# coordinator -> agent


@dataclass(frozen=True, kw_only=True)
class Dump:
    """Answer with the `Stack` of this attempt's trainer."""

    attempt: int


# agent -> coordinator


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Where a trainer stands."""

    attempt: int
    state: str
    """Letter of its state in /proc: R running, S asleep, D waiting for a device, T stopped by a signal."""
    text: str
    """The stack of every thread; empty if the process did not answer."""


@dataclass(frozen=True, kw_only=True)
class Busy:
    """How long this rank's own work took over the last steps, without its waiting for others."""

    attempt: int
    num_steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Told:
    """`StopAt` lies in front of this rank's trainer, to be read after its next step."""

    attempt: int
    step: int
