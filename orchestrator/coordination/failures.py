"""What went wrong, and what to do about it: pure functions, no clock, no processes.

A run goes on as long as restarts help. They do not help when the configuration is wrong, when the same step fails in
the same way again, or when failure after failure comes without a newer checkpoint; then the run ends with a reason.
Failures that let the run make checkpoints in between exhaust no budget, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Literal

from orchestrator.messages.attempts import ExitKind, TrainerExit
from trainers.errors import ConfigError
from trainers.trace import Blame, Place

_BLAME = (
    ExitKind.CONFIG,
    ExitKind.DAMAGED,
    ExitKind.DIVERGED,
    ExitKind.CORRUPTED,
    ExitKind.START,
    ExitKind.ERROR,
    ExitKind.CRASHED,
    ExitKind.HANG,
    ExitKind.KILLED,
    ExitKind.STORAGE,
    ExitKind.PEER_LOST,
)

_SHOWN = 64  # of a list of samples

_KILLS_TWICE = 2
"""Times that a microbatch must have failed before its samples are left out."""


@dataclass(frozen=True, kw_only=True)
class FailureConfig:
    """When a run gives up. Budgets count failures of one kind that come without a newer checkpoint."""

    same_step: int = 3
    """Errors or crashes at one and the same step, with or without newer checkpoints, >= 1."""
    errors: int = 10
    """Errors and crashes at any steps, >= 1."""
    kills: int = 30
    """Trainers ended by SIGKILL or another signal from outside, >= 1."""
    hangs: int = 10
    """Trainers ended by the watchdog, >= 1."""
    lost_peers: int = 30
    """Connections between trainers that broke with none of them dead, >= 1."""
    storage: int = 30
    """Trainers that could not read or write storage, >= 1."""
    damaged: int = 10
    """Damaged checkpoints, >= 1."""
    corrupted: int = 5
    """Times that replicas of the state differed: see integrity.replicas_every, >= 1."""
    starts: int = 3
    """Nodes on which no trainer can be started, >= 1."""
    agents: int = 30
    """Groups of agents (Ray Train's workers) that died; and in a row those that failed before an attempt, >= 1."""
    rollbacks: int = 3
    """Rollbacks after a divergence, in the whole run, >= 0."""
    left_out: int = 1000
    """Samples left out by data.quarantine, in the whole run, >= 1."""
    max_backoff_s: float = 10.0
    """Longest wait before a restart, in seconds, >= 0. The first three restarts from a checkpoint do not wait."""
    on_replay_difference: Literal["warn", "stop"] = "warn"
    """When a replayed step gives other numbers than before the restart: report it, or end the run too."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, low = getattr(self, entry.name), 0 if entry.name in ("rollbacks", "max_backoff_s") else 1
            if not isinstance(value, str) and not low <= value < float("inf"):
                raise ConfigError(f"{entry.name}={value:g} must be at least {low}")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One attempt that ended before the run did."""

    rank: int
    exit: TrainerExit
    restored_step: int
    """Where the attempt began."""
    reached_step: int
    """The last step that it completed."""

    @property
    def kind(self) -> ExitKind:
        return self.exit.kind

    @property
    def place(self) -> Place | None:
        return self.exit.place


class Action(Enum):
    RESTART = "restart"
    QUARANTINE = "quarantine and restart"
    LEAVE_OUT = "leave the samples out and restart"
    ROLL_BACK = "roll back"
    REFUSE = "refuse"
    GIVE_UP = "give up"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do next, with the sentence that says why; three lines for one that gives up on a bug."""

    action: Action
    reason: str
    delay_s: float = 0.0
    """Seconds to wait before the next attempt."""


def classify(exits: Mapping[int, TrainerExit]) -> tuple[int, TrainerExit]:
    """The rank whose end explains those of the others, and that end.

    When one rank dies, the others lose their connections to it; the cause is the most specific kind among all.
    """
    rank = min(exits, key=lambda rank: (_BLAME.index(exits[rank].kind), rank))
    cause = exits[rank]
    return cause.ranks[0] if cause.ranks else rank, cause


def decide(history: Sequence[Failure], config: FailureConfig, quarantine: bool, num_left_out: int = 0) -> Decision:
    """What to do after the last failure of `history`, which is in order of time and not empty.

    Args:
        quarantine: samples that kill twice may be left out.
        num_left_out: samples that are left out already.
    """
    last = history[-1]
    what = last.exit.message if last.exit.ranks else f"rank {last.rank}: {last.exit.message}"
    stalled = _since_progress(history)
    delay_s = _backoff_s(len(stalled), config.max_backoff_s)
    if last.kind is ExitKind.CONFIG:
        return Decision(action=Action.REFUSE, reason=last.exit.message)
    if last.kind is ExitKind.DIVERGED:
        if last.exit.num_rollbacks >= config.rollbacks:
            tried = f"after {last.exit.num_rollbacks} rollbacks (failures.rollbacks={config.rollbacks})"
            return Decision(action=Action.GIVE_UP, reason=f"training diverged {tried}: {last.exit.message}")
        return Decision(action=Action.ROLL_BACK, reason=last.exit.message)
    if quarantine and last.place is not None and last.place.blame is not Blame.NONE and last.place.samples:
        decision = _judge_samples(history, last.place, config, num_left_out)
        if decision is not None:
            return decision
    elif last.kind in (ExitKind.ERROR, ExitKind.CRASHED):
        same = sum(failure.kind is last.kind for failure in _at_the_same_step(history))
        if same >= config.same_step:
            return _give_up(last, f"step {last.reached_step + 1} failed {same} times in the same way; {what}")
    name, kinds = next((name, kinds) for name, kinds in _BUDGETS.items() if last.kind in kinds)
    count, budget = sum(failure.kind in kinds for failure in stalled), getattr(config, name)
    if count >= budget:
        since = f"without a newer checkpoint than that of step {last.restored_step} (failures.{name}={budget})"
        return _give_up(last, f"{count} times {last.kind.value} {since}; last, {what}")
    if last.kind is ExitKind.DAMAGED:
        return Decision(action=Action.QUARANTINE, reason=what)
    # What is in memory is not gone on from: that is where wrong bits come from.
    action = Action.ROLL_BACK if last.kind is ExitKind.CORRUPTED else Action.RESTART
    return Decision(action=action, reason=what, delay_s=delay_s)


_BUDGETS = {
    "errors": (ExitKind.ERROR, ExitKind.CRASHED),
    "kills": (ExitKind.KILLED,),
    "hangs": (ExitKind.HANG,),
    "lost_peers": (ExitKind.PEER_LOST,),
    "storage": (ExitKind.STORAGE,),
    "damaged": (ExitKind.DAMAGED,),
    "corrupted": (ExitKind.CORRUPTED,),
    "starts": (ExitKind.START,),
}
"""Key of the config -> the kinds of failure that it counts."""


def _judge_samples(
    history: Sequence[Failure], place: Place, config: FailureConfig, num_left_out: int
) -> Decision | None:
    """What to do when the data may be to blame; None: nothing yet, it was the first time."""
    last = history[-1]
    here = [
        failure
        for failure in _at_the_same_step(history)
        if failure.place and (failure.place.step, failure.place.microbatch) == (place.step, place.microbatch)
    ]
    where = f"microbatch {place.microbatch} of step {place.step}"
    if sum(failure.place == place for failure in here) < _KILLS_TWICE:
        return None
    if place.blame is Blame.MICROBATCH and any(failure.place != place for failure in here):
        return _give_up(last, f"{where} fails with other samples too; rank {last.rank}: {last.exit.message}")
    if num_left_out + len(place.samples) > config.left_out:
        count = num_left_out + len(place.samples)
        return _give_up(last, f"{count} samples would be left out (failures.left_out={config.left_out})")
    reason = f"{where} failed twice: {last.exit.message}; samples {_listed(place.samples)}"
    return Decision(action=Action.LEAVE_OUT, reason=reason)


def _give_up(failure: Failure, what: str) -> Decision:
    """What, where, and which samples."""
    lines = [what]
    if failure.exit.frame:
        lines.append(f"where: {failure.exit.frame}")
    if failure.place is not None:
        place = failure.place
        lines.append(
            f"samples: microbatch {place.microbatch} of step {place.step}, from position {place.position}:"
            f" dataset indices {_listed(place.samples)}"
        )
    elif failure.exit.frame:
        lines.append("samples: none, no microbatch was worked on")
    return Decision(action=Action.GIVE_UP, reason="\n".join(lines))


def _listed(samples: Sequence[int]) -> str:
    """For people; all of them are in the event."""
    more = f", and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    return ", ".join(map(str, samples[:_SHOWN])) + more


def _at_the_same_step(history: Sequence[Failure]) -> list[Failure]:
    """The failures at the last one's step, back to the last time that the run got past it."""
    found = []
    for failure in reversed(history):
        if failure.reached_step > history[-1].reached_step:
            break
        if failure.reached_step == history[-1].reached_step:
            found.append(failure)
    return found


def _since_progress(history: Sequence[Failure]) -> list[Failure]:
    """The failures since an attempt last began at a newer checkpoint than the one before it, newest first."""
    found = [history[-1]]
    for failure in reversed(history[:-1]):
        if failure.restored_step < found[-1].restored_step:
            break
        found.append(failure)
    return found


def _backoff_s(stalled: int, longest_s: float) -> float:
    """Nothing for the first three attempts from one checkpoint, then 0.2 s, doubling."""
    return 0.0 if stalled <= 3 else min(longest_s, 0.1 * 2 ** min(stalled - 3, 20))
