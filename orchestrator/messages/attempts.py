"""What driver, agents and trainers say to each other. Plain values: everything here is pickled and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from orchestrator.checkpoint.peer_objects import PeerRing
from orchestrator.messages.saves import MemorySnapshot
from orchestrator.sections import CheckpointConfig, TierName
from trainers.exclusions import Exclusions
from trainers.progress import Progress
from trainers.trace import Place


class ExitKind(Enum):
    """How a trainer ended, one kind for each different reaction."""

    KILLED = "killed"  # by a signal that was not ours: start again
    PEER_LOST = "peer lost"  # a consequence of another rank's end
    DAMAGED = "damaged checkpoint"  # quarantine it, take the next older
    CONFIG = "configuration"  # the user's to mend: stop
    DIVERGED = "diverged"  # go back to before it began, leave that data out
    CORRUPTED = "corrupted"  # replicas of the state differ: go on from what was saved
    START = "start"  # no trainer can be started on this node: try a few times
    HANG = "hang"  # no progress: its stack is stored, start again
    STORAGE = "storage"  # reading or writing failed: try again
    ERROR = "error"  # an exception in model, data or our code
    CRASHED = "crashed"  # by a signal that its own code caused, such as SIGSEGV: as an error


@dataclass(frozen=True, kw_only=True)
class TrainerExit:
    """Why a trainer process is gone."""

    kind: ExitKind
    message: str
    details: str = ""
    """A stack trace, if there is one."""
    frame: str = ""
    """The line of the user's code, if an exception says so."""
    place: Place | None = None
    """The microbatch at work."""
    skip: tuple[int, int] | None = None
    """First and last step to undo and leave out, of a divergence."""
    num_rollbacks: int = 0
    """How often that was done before."""
    ranks: tuple[int, ...] = ()
    """Whose state is corrupted, as all ranks found; empty: the fault is that of the rank that says so."""
    alike_step: int = 0
    """After this step no state was."""


# fork server -> agent


@dataclass(frozen=True)
class ImportFailed:
    """The fork server can not import what trainers need, and has ended."""

    trace: str


@dataclass(frozen=True)
class ChildEnded:
    """A forked trainer is gone; `status` as from `os.waitstatus_to_exitcode`: negative for a signal."""

    pid: int
    status: int


# trainer -> agent


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Rank 0's trainer serves the rendezvous store of this attempt."""

    port: int


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A part of the trainer's start is done on this rank."""

    stage: str
    """process group, or built."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """The trainer stands where the checkpoint stood; from here it computes."""

    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """One step is complete."""

    progress: Progress
    metrics: Mapping[str, float]
    losses: tuple[float, ...] = ()
    """Of every microbatch, by index."""
    ranks: tuple[int, ...] = ()
    """Which rank each microbatch ran on."""
    broken: tuple[str, ...] = ()
    """Samples of the step that could not be read, and why; others took their places."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last step, or the one to stop at, is done and committed; or the trainer may not go on."""

    progress: Progress
    stopped: str | None = None
    """Why it stopped before the last step, on all ranks alike, if so."""


# agent -> trainer


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Everything a trainer needs to start; the first message it gets."""

    config: Mapping[str, Any]
    """The `TrainerConfig` as plain values."""
    run_url: str
    checkpoint: CheckpointConfig
    rank: int
    world_size: int
    restore: str | None
    """Name of the checkpoint to start from."""
    peers: PeerRing | None
    """Where that checkpoint is; None: in storage."""
    memory: MemorySnapshot | None
    """What to start from instead: it lies in the agent's buffer."""
    committed: Progress
    """Of the newest checkpoint committed in storage, as far as `max_lag_steps` asks for it."""
    exclusions: Exclusions
    """What is left out, beside what the checkpoint says."""
    every_steps: int | None = None
    """Steps to the first save; None: the config says it."""


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where rank 0's trainer listens."""

    host: str
    port: int


# agent -> coordinator


@dataclass(frozen=True, kw_only=True)
class Joined:
    """An agent is ready to start a trainer."""

    rank: int


@dataclass(frozen=True, kw_only=True)
class Started:
    """A trainer process runs."""

    attempt: int
    pid: int
    agent_pid: int
    node: str = ""
    """Ray's id of the node that they run on."""


@dataclass(frozen=True, kw_only=True)
class Down:
    """This rank's trainer is gone and its last words have been read."""

    attempt: int
    exit: TrainerExit
    pending: Progress | None
    """The snapshot that this agent still holds and will deliver."""
    held: Progress | None = None
    """The snapshot that is whole in this agent's buffer, whatever became of its save."""


@dataclass(frozen=True, kw_only=True)
class FromTrainer:
    """What a trainer says, passed on."""

    attempt: int
    message: object
    """`Listening`, `Reached`, `Restored`, `Stepped` or `Finished`; `Skipped` or `Paused` of `saves`; `Entered` or
    `AtGate` of `liveness`; those of `evaluations`."""


# coordinator -> agent


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Start a trainer for this attempt."""

    attempt: int
    restore: str | None
    """Name of the checkpoint to start from."""
    tier: TierName = "storage"
    """Where that checkpoint is."""
    memory: Progress | None = None
    """Start from the snapshot of this progress in the agents' buffers; no other one is to be used any more."""
    committed: Progress = field(default_factory=Progress)
    """Of the newest checkpoint committed in storage, as far as `max_lag_steps` asks for it."""
    exclusions: Exclusions = field(default_factory=Exclusions)
    every_steps: int | None = None
    """Steps to the first save; None: the config says it."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """End the trainer of this attempt, if it lives, and answer `Down`."""

    attempt: int
    cause: TrainerExit | None = None
    """Why, if the fault is its own."""


class Ending(Enum):
    """How a run, or this driver's part in it, ended."""

    FINISHED = "finished"
    GAVE_UP = "gave up"
    CONFIG = "refused"
    SUPERSEDED = "superseded"
    STORAGE = "storage"
    STOPPED = "stopped"
    REGROUP = "regroup"  # of these agents only: others take the run on
    BROKEN = "broken"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end, with the sentence that explains it."""

    ending: Ending
    message: str


# anybody -> driver


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something worth a line on the user's screen and in the run's log."""

    kind: str
    fields: Mapping[str, Any]
    time_s: float
    """Unix time at which it happened."""
