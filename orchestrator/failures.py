"""What went wrong, and what to do about it: pure functions, no clock, no processes.

A run goes on as long as restarts help. They do not help when the configuration is wrong, when the same step fails in
the same way again, or when attempt after attempt dies without a newer checkpoint; then it ends with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from orchestrator.messages import ExitKind, TrainerExit

MAX_SAME_STEP_ERRORS = 3
"""Attempts that may fail with an exception at one and the same step."""

MAX_ATTEMPTS_WITHOUT_PROGRESS = 30
"""Attempts in a row that may die without a newer checkpoint, whatever the reason."""

_BLAME = (
    ExitKind.CONFIG,
    ExitKind.DAMAGED,
    ExitKind.NON_FINITE,
    ExitKind.ERROR,
    ExitKind.HANG,
    ExitKind.KILLED,
    ExitKind.STORAGE,
    ExitKind.PEER_LOST,
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One attempt that ended before the run did."""

    kind: ExitKind
    rank: int
    message: str
    details: str = ""
    restored_step: int
    """Where the attempt began."""
    reached_step: int
    """The last step that it completed."""


class Action(Enum):
    RESTART = "restart"
    QUARANTINE = "quarantine and restart"
    REFUSE = "refuse"
    GIVE_UP = "give up"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do next, with the sentence that says why."""

    action: Action
    reason: str
    delay_s: float = 0.0
    """Seconds to wait before the next attempt."""


def classify(exits: Mapping[int, TrainerExit]) -> tuple[int, TrainerExit]:
    """The rank whose end explains those of the others, and that end.

    When one rank dies, the others lose their connections to it; the cause is the most specific kind among all.
    """
    rank = min(exits, key=lambda rank: (_BLAME.index(exits[rank].kind), rank))
    return rank, exits[rank]


def decide(history: Sequence[Failure]) -> Decision:
    """What to do after the last failure of `history`, which is in order of time and not empty."""
    last = history[-1]
    what = f"rank {last.rank}: {last.message}"
    if last.kind is ExitKind.CONFIG:
        return Decision(action=Action.REFUSE, reason=last.message)
    if last.kind is ExitKind.DAMAGED:
        return Decision(action=Action.QUARANTINE, reason=what)
    stalled = _stalled(history)
    if last.kind in (ExitKind.ERROR, ExitKind.NON_FINITE):
        same = 0
        for failure in reversed(history):
            if failure.kind is not last.kind or failure.reached_step != last.reached_step:
                break
            same += 1
        if same >= MAX_SAME_STEP_ERRORS:
            reason = f"step {last.reached_step + 1} failed {same} times in the same way; {what}"
            return Decision(action=Action.GIVE_UP, reason=reason)
    if stalled >= MAX_ATTEMPTS_WITHOUT_PROGRESS:
        reason = f"{stalled} attempts in a row made no newer checkpoint than step {last.restored_step}; last, {what}"
        return Decision(action=Action.GIVE_UP, reason=reason)
    return Decision(action=Action.RESTART, reason=what, delay_s=_backoff_s(stalled))


def _stalled(history: Sequence[Failure]) -> int:
    """How many of the last attempts began at the same checkpoint."""
    count = 0
    for failure in reversed(history):
        if failure.restored_step != history[-1].restored_step:
            break
        count += 1
    return count


def _backoff_s(stalled: int) -> float:
    """Nothing for the first three attempts from one checkpoint, then 0.2 s, doubling up to 10 s."""
    return 0.0 if stalled <= 3 else min(10.0, 0.1 * 2 ** (stalled - 3))
