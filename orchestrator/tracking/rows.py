"""From events to rows of metrics: one for each step, with what a chart needs to show restarts."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.messages.attempts import Event
from orchestrator.tracking.goodput import Book, Bucket, Span

_UNSETTLED = 16
"""Newest spans of time that may still change without a restart."""
_FAILURES = ("down", "failure", "agent_lost", "controller_lost")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The metrics of one step."""

    step: int
    time_s: float
    """Unix time."""
    values: dict[str, float]


class Rows:
    """Follows a run through its attempts. Fed with a journal, so it sees every step once."""

    def __init__(self, global_batch_size: int) -> None:
        self._global_batch_size = global_batch_size
        self._attempt = 0
        self._world_size = 0
        self._last: tuple[int, float] | None = None
        self._last_step = 0
        self._failed_at_s: float | None = None
        self._markers: dict[str, float] = {}
        self._goodput = _RunningGoodput()

    def take(self, event: Event) -> Row | None:
        """The row that this event completes."""
        fields = event.fields
        self._goodput.take(event)
        if event.kind == "attempt":
            self._attempt, self._world_size, self._last = fields["attempt"], fields["world_size"], None
        elif event.kind in _FAILURES:
            self._failed_at_s = self._failed_at_s or event.time_s
        elif event.kind == "training":
            self._last = (fields["step"], event.time_s)
            if self._attempt > 1:
                self._mark_restart(fields["step"], event.time_s)
        elif event.kind == "evaluated" and self._last is not None:
            self._last = (self._last[0], event.time_s)  # steps are not slower for what is between them
        elif event.kind == "step":
            return self._row(event)
        return None

    def _mark_restart(self, step: int, time_s: float) -> None:
        self._markers = {
            "restart/attempt": self._attempt,
            "restart/from_step": step,
            "restart/replayed_steps": max(0, self._last_step - step),
            "restart/world_size": self._world_size,
        }
        if self._failed_at_s is not None:
            self._markers["restart/down_s"] = time_s - self._failed_at_s
        self._failed_at_s = None

    def _row(self, event: Event) -> Row:
        step, metrics = event.fields["step"], event.fields["metrics"]
        values = {f"train/{name}": value for name, value in metrics.items()}
        values |= {"run/attempt": self._attempt, "run/world_size": self._world_size}
        if self._last is not None and step == self._last[0] + 1 and event.time_s > self._last[1]:
            values["run/samples_per_s"] = self._global_batch_size / (event.time_s - self._last[1])
        if self._goodput.share is not None:
            values["run/goodput"] = self._goodput.share
        values |= self._markers
        self._markers, self._last, self._last_step = {}, (step, event.time_s), step
        return Row(step=step, time_s=event.time_s, values=values)


class _RunningGoodput:
    """Productive part of the wall time, up to the newest event that is not a step."""

    def __init__(self) -> None:
        self._book = Book()
        self._first = True
        self._latest: Event | None = None
        self._settled, self._settled_s = 0, 0.0
        """The oldest spans whose productive seconds are added up already, and these."""
        self._last_settled: Span | None = None
        self.share: float | None = None

    def take(self, event: Event) -> None:
        if event.kind == "step" and not self._first:
            self._latest = event  # one of millions: the book has only the ends of each row of them
            return
        if self._latest is not None:
            self._book.enter(self._latest)
        self._book.enter(event)
        self._first, self._latest = event.kind != "step", None
        if self._first:
            self.share = self._productive_part()

    def _productive_part(self) -> float | None:
        """`Goodput.share` without a look at all spans for every event: a year of saves leaves hundred thousands."""
        book, spans = self._book, self._book.spans
        if self._settled and (len(spans) < self._settled or spans[self._settled - 1] is not self._last_settled):
            self._settled, self._settled_s = 0, 0.0  # a restart has turned what was productive into what is lost
        for span in spans[self._settled : max(0, len(spans) - _UNSETTLED)]:
            self._settled += 1
            self._settled_s += span.seconds if span.bucket is Bucket.PRODUCTIVE else 0.0
            self._last_settled = span
        total_s = self._settled_s
        for span in spans[self._settled :]:
            total_s += span.seconds if span.bucket is Bucket.PRODUCTIVE else 0.0
        wall_s = 0.0 if book.begin_s is None else book.at_s - book.begin_s
        return total_s / wall_s if wall_s > 0 else None
