"""What the record of a run says of the time before this group of agents: read in a thread, as storage may be slow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.checkpoint.attempts import read_attempt
from orchestrator.checkpoint.keys import EVENTS, METRICS
from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError
from orchestrator.messages.attempts import Event
from orchestrator.run_spec import RunSpec
from orchestrator.tracking.goodput import Bucket, account
from orchestrator.tracking.record import Row, RowsReader, in_order, one_row_a_step
from trainers.exclusions import Exclusions

_ENOUGH_ROWS = 10_000
_ENOUGH_EVENTS = 10_000
_CHANGES = frozenset({"diverged", "left_out", "corrupted"})
_SIGNS_OF_LIFE = frozenset({"step", "alive"})
_TIMES = frozenset({"started", "attempt", "training", "down", "agent_lost", "hang", "regroup", "controller_lost"})
_ENDS = frozenset({"outcome", "interrupted"})
_NO_FAILURES = frozenset({"interrupted", "regroup", "stopped"})


@dataclass(frozen=True, kw_only=True)
class Past:
    """What was."""

    steps: Mapping[int, Row] = field(default_factory=dict)
    """By step, the numbers that it must give when it is made again."""
    trained_s: float = 0.0
    """With a driver. This and the next one are known only if the interval of saves is found out from them."""
    failures: int = 0


class PastReader:
    """One for each group of agents."""

    def __init__(self, spec: RunSpec, event: Callable[..., None]) -> None:
        """Args: event: reports; called with the event's kind and its fields."""
        self._spec = spec
        self._event = event
        self._begun = False
        self.past: Past | None = None
        """Once it has been read."""

    def begin(self, attempt: int, step: int, exclusions: Exclusions) -> None:
        """The group begins with this attempt, after `step`; later calls change nothing.

        Args:
            exclusions: what its checkpoint leaves out.
        """
        if self._begun:
            return
        self._begun = True
        if attempt > 1:
            threading.Thread(target=self._read, args=(attempt, step, exclusions), name="past", daemon=True).start()

    def _read(self, attempt: int, step: int, exclusions: Exclusions) -> None:
        try:
            self.past = self._found(attempt, step, exclusions)
        except Exception as error:  # a damaged row may say anything; who trains must hear that nothing is compared
            why = str(error) if isinstance(error, UnbrokenError) else f"{type(error).__name__}: {error}"
            self._event("past_unread", error=why)

    def _found(self, attempt: int, step: int, exclusions: Exclusions) -> Past:
        store, spec = Store.open(self._spec.run_url), self._spec
        rows: list[Row] = []
        if spec.config.get("parallel", {}).get("reduction", "invariant") != "fast":  # whose numbers depend on workers
            rows = RowsReader(store, METRICS).rows(_ENOUGH_ROWS)
        rows = [row for row in rows if row["step"] > step and row["attempt"] < attempt]
        attempts = {row["attempt"] for row in rows}
        alike = {number for number in attempts if read_attempt(store, number).get("versions") == spec.versions}
        # A run of weeks has a million events: of most attempts none is read, and of the others few are kept.
        events = RowsReader(store, EVENTS, _outline if spec.checkpoint.automatic else _changes)
        enough = _ENOUGH_EVENTS if spec.checkpoint.automatic else 0
        found = in_order(events.rows(enough, since=min(alike, default=None)))
        before = [event for event in found if event.fields.get("attempt", 0) < attempt]
        book = account(before)
        return Past(
            steps=binding_steps(rows, alike, before, exclusions),
            trained_s=book.wall_s - book.seconds[Bucket.DOWN],
            failures=sum(recovery.cause not in _NO_FAILURES for recovery in book.recoveries),
        )


def _changes(rows: list[Row]) -> list[Row]:
    """What makes later numbers others."""
    return [row for row in rows if row["event"] in _CHANGES]


def _outline(rows: list[Row]) -> list[Row]:
    """That, and when training went on and when not; of signs of life in a row, the first and the last."""
    kept: list[Row] = []
    for row in rows:
        if row["event"] in _SIGNS_OF_LIFE and [_sign_of(other) for other in kept[-2:]] == [row["writer"]] * 2:
            kept[-1] = row
        elif row["event"] in _SIGNS_OF_LIFE | _TIMES | _ENDS | _CHANGES:
            kept.append(row)
    return kept


def _sign_of(row: Row) -> str | None:
    return row["writer"] if row["event"] in _SIGNS_OF_LIFE else None


def binding_steps(
    rows: Iterable[Row], alike: Collection[int], before: Sequence[Event], exclusions: Exclusions
) -> dict[int, Row]:
    """By step, the rows of the record that must be repeated bit by bit.

    Not those from before a rollback or a quarantine of samples on, unless the attempt leaves the same out; nor those
    that were made while the state may have been corrupted.

    Args:
        rows: of steps that are to be made again.
        alike: attempts with the same versions of libraries on the same kind of machine.
        before: events of these attempts and of later ones that are over.
        exclusions: what the attempt that begins leaves out.
    """
    changes = [change for event in before if (change := _change(event, exclusions)) is not None]
    binding = one_row_a_step(
        row
        for row in rows
        if row["attempt"] in alike
        and not any(row["step"] >= since and (until is None or row["attempt"] <= until) for since, until in changes)
    )
    return {row["step"]: row for row in binding if None not in (row.get("loss"), row.get("grad_norm"))}


def _change(event: Event, exclusions: Exclusions) -> tuple[int, int | None] | None:
    """(step, attempt): from this step on the numbers up to this attempt are others; None: those of all attempts."""
    fields = event.fields
    if event.kind == "diverged":
        first, last = fields["skip"]
        return first, fields["attempt"] if (first, last) in exclusions.steps else None
    if event.kind == "left_out":
        known = all((fields["step"], index) in exclusions.samples for index in fields["samples"])
        return fields["step"], fields["attempt"] if known else None
    if event.kind == "corrupted":
        return fields["since"], fields["attempt"]
    return None
