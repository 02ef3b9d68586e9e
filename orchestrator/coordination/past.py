"""What the record of a run says of the time before this group of agents: read in a thread, as storage may be slow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.checkpoint.keys import METRICS
from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError
from orchestrator.messages.attempts import Event
from orchestrator.run_spec import RunSpec
from orchestrator.tracking.goodput import Bucket, account
from orchestrator.tracking.record import Row, RowsReader, one_row_a_step, read_events
from trainers.exclusions import Exclusions

_ENOUGH_ROWS = 10_000
_NO_FAILURES = frozenset({"interrupted", "regroup", "stopped"})


@dataclass(frozen=True, kw_only=True)
class Past:
    """What was."""

    steps: Mapping[int, Row] = field(default_factory=dict)
    """By step, the numbers that it must give when it is made again."""
    trained_s: float = 0.0
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
        store = Store.open(self._spec.run_url)
        events, rows = read_events(store), RowsReader(store, METRICS).rows(_ENOUGH_ROWS)
        before = [event for event in events if event.fields.get("attempt", 0) < attempt]
        book = account(before)
        return Past(
            steps=binding_steps(rows, before, step, self._spec, exclusions),
            trained_s=book.wall_s - book.seconds[Bucket.DOWN],
            failures=sum(recovery.cause not in _NO_FAILURES for recovery in book.recoveries),
        )


def binding_steps(
    rows: Iterable[Row], before: Sequence[Event], step: int, spec: RunSpec, exclusions: Exclusions
) -> dict[int, Row]:
    """The rows of the record that steps after `step` must repeat bit by bit.

    Not those of drivers with other versions of libraries or another machine; not those from before a rollback or a
    quarantine of samples on, unless the attempt leaves the same out; none with `parallel.reduction: fast`, whose
    numbers depend on the workers.

    Args:
        before: events of earlier attempts.
        exclusions: what the attempt that begins leaves out.
    """
    if spec.config.get("parallel", {}).get("reduction", "invariant") == "fast":
        return {}
    alike = {
        event.fields["session"] for event in before if event.kind == "started" and _versions(event) == spec.versions
    }
    attempts = {event.fields["attempt"] for event in before if event.kind == "attempt" and _session(event) in alike}
    changes = [change for event in before if (change := _change(event, exclusions)) is not None]
    binding = one_row_a_step(
        row
        for row in rows
        if row["step"] > step
        and row["attempt"] in attempts
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
    return None


def _versions(event: Event) -> Any:
    return event.fields.get("versions")


def _session(event: Event) -> Any:
    return event.fields.get("session")
