"""What became of each fault: a pure function of the events that followed it, and the card that shows all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.chaos.faults import Fault, FaultKind
from orchestrator.messages.attempts import Event

_SIGNS = frozenset({"down", "agent_lost", "group_lost", "hang", "halting", "controller_lost", "attempt", "started"})
_SIGNS_OF = {
    FaultKind.HANG: frozenset({"hang"}),
    FaultKind.NAN: frozenset({"bad_step"}),
    FaultKind.DRAIN: frozenset({"halting"}),
    # Whoever goes on from a checkpoint with a wrong bit has noticed nothing.
    FaultKind.CORRUPT_CHECKPOINT: frozenset({"quarantined"}),
    FaultKind.SLOW_STORE: frozenset({"save_delayed", "save_failed", "save_skipped", "storage_trouble", "saved"}),
}
"""Kinds of event that say that the run has noticed."""


@dataclass(frozen=True, kw_only=True)
class Injection:
    """A fault that has happened."""

    fault: Fault
    time_s: float
    """Unix time."""
    step: int
    """The last step that was complete."""
    attempt: int
    """The one that it happened to."""
    detail: str
    """What was done to what."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What became of a fault."""

    fault: Fault
    injection: Injection | None
    """None: the run was over before it was its turn."""
    noticed_s: float | None = None
    """Seconds from the fault to the first event that says so."""
    noticed_by: str = ""
    """Kind of that event."""
    recovered_s: float | None = None
    """Seconds from the fault to the first step that was complete in an attempt that it had not hit; of `nan`, to the
    first good step; of `slow-store`, to the first save."""
    resumed_step: int | None = None
    """Where that attempt began."""
    lost_steps: int = 0
    """Steps that had to be done again."""
    num_attempts: int = 0
    """Begun until it was recovered from; 1: the first restart succeeded."""

    @property
    def passed(self) -> bool:
        return self.noticed_s is not None and self.recovered_s is not None


def score(injection: Injection, events: Sequence[Event]) -> Score:
    """What became of `injection`.

    Args:
        events: all that came after it, in the order in which they arrived; the first few may be older than it.
    """
    signs = _SIGNS_OF.get(injection.fault.kind, _SIGNS)
    noticed = next((event for event in events if event.kind in signs and event.time_s >= injection.time_s), None)
    highest, attempts, resumed, recovered = injection.step, 0, None, None
    for event in events:
        if event.kind == "attempt" and event.fields["attempt"] > injection.attempt:
            attempts += 1
        if event.kind == "training" and event.fields["attempt"] > injection.attempt:
            resumed = event.fields["step"]
        if event.time_s > injection.time_s and _is_recovery(injection, event):
            recovered = event
            break
        if event.kind == "step" and event.fields["attempt"] == injection.attempt:
            highest = max(highest, event.fields["step"])
    return Score(
        fault=injection.fault,
        injection=injection,
        noticed_s=None if noticed is None else noticed.time_s - injection.time_s,
        noticed_by="" if noticed is None else noticed.kind,
        recovered_s=None if recovered is None else recovered.time_s - injection.time_s,
        resumed_step=resumed,
        lost_steps=0 if resumed is None else max(0, highest - resumed),
        num_attempts=attempts,
    )


def _is_recovery(injection: Injection, event: Event) -> bool:
    if injection.fault.kind is FaultKind.SLOW_STORE:  # training need not wait for it
        return event.kind == "saved"
    if event.kind != "step":
        return False
    if injection.fault.kind is FaultKind.NAN:  # one bad step ends no attempt
        return event.fields["step"] > injection.fault.step and "skipped" not in event.fields["metrics"]
    return event.fields["attempt"] > injection.attempt


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """The outcome of a drill."""

    seed: int
    drilled: str
    """URL of the run with the faults."""
    undisturbed: str
    """URL of the run without."""
    scores: Sequence[Score]
    skipped: Mapping[FaultKind, str]
    """Kinds that were asked for and cannot be caused here, with the reason."""
    same_bits: bool | None
    """Whether the two runs are bitwise the same; None: the drilled run did not get to its end."""
    proof: str
    """What was compared, or the first difference, or why there is nothing to compare."""
    num_verified: int = 0
    """Checkpoints of the drilled run in storage of which every byte was read back and is right."""
    damaged: Sequence[str] = ()
    """Checkpoints that are offered though they are not, and why."""
    left_running: Sequence[int] = ()
    """Ids of trainers and agents that outlived the run."""

    @property
    def passed(self) -> bool:
        """Every fault happened, was noticed and recovered from, made no difference, and left nothing behind."""
        clean = not self.damaged and not self.left_running
        return self.same_bits is True and clean and all(score.passed for score in self.scores)

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "seed": self.seed,
            "drilled": self.drilled,
            "undisturbed": self.undisturbed,
            "faults": [asdict(score) | {"fault": asdict(score.fault), "passed": score.passed} for score in self.scores],
            "skipped": dict(self.skipped),
            "bitwise_same": self.same_bits,
            "proof": self.proof,
            "checkpoints_verified": self.num_verified,
            "checkpoints_damaged": list(self.damaged),
            "left_running": list(self.left_running),
        }

    def lines(self) -> list[str]:
        """The card, for a terminal."""
        rows = [("fault", "after step", "noticed after", "recovered after", "attempts", "steps lost", "")]
        rows += [_row(score) for score in self.scores]
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        found = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
        found += [f"skipped: {kind}: {reason}" for kind, reason in self.skipped.items()]
        answer = {True: "yes", False: "no", None: "not known"}[self.same_bits]
        found.append(f"bitwise the same as the undisturbed run: {answer} ({self.proof})")
        found.append(f"checkpoints in storage that verify: {self.num_verified}; that do not: {len(self.damaged)}")
        found += self.damaged
        if self.left_running:
            found.append(f"processes that outlived the run: {', '.join(map(str, self.left_running))}")
        recovered = sum(score.passed for score in self.scores)
        found.append(f"{recovered} of {len(self.scores)} faults noticed and recovered from; seed {self.seed}")
        return [line.rstrip() for line in found]


def _row(score: Score) -> tuple[str, ...]:
    injection = score.injection
    if injection is None:
        why = f"planned for step {score.fault.step}; the run was over first: give it more steps"
        return str(score.fault.kind), "-", "-", "-", "-", "-", why
    return (
        str(score.fault.kind),
        str(injection.step),
        "no" if score.noticed_s is None else f"{score.noticed_s:.2f} s, {score.noticed_by}",
        "no" if score.recovered_s is None else f"{score.recovered_s:.2f} s",
        str(score.num_attempts),
        str(score.lost_steps),
        injection.detail,
    )
