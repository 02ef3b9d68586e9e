"""Where the wall time of a run went: a pure function of its events. Every second is in exactly one bucket."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile

from orchestrator.messages.attempts import Ending, Event
from orchestrator.tracking.record import of_the_owner


class Bucket(StrEnum):
    PRODUCTIVE = "productive"
    """Steps whose result is in the run."""
    STALL = "stall"
    """The training loop waited for a save."""
    EVALUATE = "evaluate"
    """The training loop drew samples or validated."""
    LOST = "lost"
    """Steps (and all between them) that had to be done again."""
    DETECT = "detect"
    """From the last step before a failure until it was noticed; the step that was under way is in it."""
    RESTART = "restart"
    """From there until the state is restored."""
    START = "start"
    """From the start of a driver until training begins."""
    DOWN = "down"
    """No driver."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of wall time."""

    begin_s: float
    end_s: float
    bucket: Bucket

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One interruption of the training."""

    time_s: float
    """Of the last sign of the training before it."""
    cause: str
    from_step: int
    """The last step that was complete."""
    to_step: int
    """Where training went on."""
    seconds: float
    """From the last step before to the first step after, without the time that there was no driver."""
    attempt: int
    """The one that trained on."""

    @property
    def lost_steps(self) -> int:
        return max(0, self.from_step - self.to_step)


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The account."""

    begin_s: float
    end_s: float
    spans: Sequence[Span]
    """In order and without gaps, from `begin_s` to `end_s`."""
    recoveries: Sequence[Recovery]
    attempts: int
    """Claimed so far; some may not have come to train."""

    @property
    def wall_s(self) -> float:
        return self.end_s - self.begin_s

    @property
    def seconds(self) -> dict[Bucket, float]:
        totals = dict.fromkeys(Bucket, 0.0)
        for span in self.spans:
            totals[span.bucket] += span.seconds
        return totals

    @property
    def share(self) -> float | None:
        """Productive part of the wall time; None before there is any."""
        return self.seconds[Bucket.PRODUCTIVE] / self.wall_s if self.wall_s > 0 else None

    @property
    def lost_steps(self) -> int:
        return sum(recovery.lost_steps for recovery in self.recoveries)


_PAUSES = {"snapshot": ("stall_s", Bucket.STALL), "evaluated": ("seconds", Bucket.EVALUATE)}
"""Events at the end of a pause of the training loop: the field with its length, and the bucket."""


def account(events: Iterable[Event], now_s: float | None = None) -> Goodput:
    """The account of a run.

    Args:
        events: in order of time, as `read_events` gives them.
        now_s: Unix time at which it ends, if the run still goes on; else it ends with the last event.
    """
    book = Book()
    for event in of_the_owner(events):
        book.enter(event)
    return book.close(now_s)


@dataclass
class _Interruption:
    """Training stopped, and has not begun again."""

    time_s: float
    cause: str
    from_step: int
    to_step: int = 0
    attempt: int = 0


@dataclass
class Book:
    """An account that is being written."""

    spans: list[Span] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    begin_s: float | None = None
    at_s: float = 0.0
    bucket: Bucket = Bucket.START
    attempt: int = 0
    step: tuple[float, int] | None = None
    """Time and number of the last step, in training."""
    marks: dict[int, float] = field(default_factory=dict)
    """When a step was last complete, in order of steps."""
    highest: int = 0
    interruption: _Interruption | None = None

    def enter(self, event: Event) -> None:
        """Events come in order of time. Of steps, the first and the last between two other events are enough."""
        if event.kind == "already_finished":  # somebody looked; there was nothing that a driver could have done
            return
        if self.begin_s is None:
            self.begin_s = self.at_s = event.time_s
        if (handler := _HANDLERS.get(event.kind)) is not None:
            handler(self, event)
        self._until(event.time_s)

    def close(self, now_s: float | None) -> Goodput:
        if now_s is not None and self.begin_s is not None:
            self._until(now_s)
        begin_s = self.at_s if self.begin_s is None else self.begin_s
        return Goodput(
            begin_s=begin_s, end_s=self.at_s, spans=self.spans, recoveries=self.recoveries, attempts=self.attempt
        )

    def _until(self, time_s: float) -> None:
        """All time up to here that is not accounted for goes to the current bucket."""
        if time_s > self.at_s:
            self._add(self.at_s, time_s, self.bucket)
            self.at_s = time_s

    def _add(self, begin_s: float, end_s: float, bucket: Bucket) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and last.bucket is bucket:
            self.spans[-1] = Span(begin_s=last.begin_s, end_s=end_s, bucket=bucket)
        elif end_s > begin_s:
            self.spans.append(Span(begin_s=begin_s, end_s=end_s, bucket=bucket))

    def _turn(self, since_s: float, into: Bucket, *buckets: Bucket) -> None:
        """What was booked on one of `buckets` after `since_s` becomes `into`."""
        later: list[Span] = []
        while self.spans and self.spans[-1].end_s > since_s:
            later.append(self.spans.pop())
        for span in reversed(later):
            if span.begin_s < since_s:
                self._add(span.begin_s, since_s, span.bucket)
            bucket = into if span.bucket in buckets else span.bucket
            self._add(max(span.begin_s, since_s), span.end_s, bucket)

    def _stopped(self, cause: str) -> None:
        """Training, if it was going on, is not any more."""
        if self.step is None or self.interruption is not None:
            return
        self.interruption = _Interruption(time_s=self.step[0], cause=cause, from_step=max(self.highest, self.step[1]))

    def _down(self, event: Event) -> None:
        self._noticed(event.time_s, event.fields.get("kind", event.kind.replace("_", " ")))

    def _noticed(self, time_s: float, cause: str) -> None:
        self._until(time_s)
        if self.bucket is Bucket.DOWN:
            return  # an echo of the driver's end
        if self.bucket is Bucket.PRODUCTIVE and self.step is not None:
            self._turn(self.step[0], Bucket.DETECT, Bucket.PRODUCTIVE)
        self._stopped(cause)
        if self.bucket is not Bucket.START:
            self.bucket = Bucket.RESTART

    def _started(self, event: Event) -> None:
        if self.bucket is not Bucket.DOWN:
            self._stopped("driver lost")  # without a word: nobody was there since the last event
        if self.spans:
            self.bucket = Bucket.DOWN
        self._until(event.time_s)
        self.bucket = Bucket.START

    def _attempt(self, event: Event) -> None:
        if self.bucket is Bucket.PRODUCTIVE:  # all agents died, and with them whoever would have said so
            self._noticed(self.step[0] if self.step else self.at_s, "agents lost")
        self._until(event.time_s)
        self.attempt = event.fields["attempt"]
        if self.bucket is not Bucket.START:
            self.bucket = Bucket.RESTART

    def _training(self, event: Event) -> None:
        self._until(event.time_s)
        step = event.fields["step"]
        while self.marks and next(reversed(self.marks)) > step:
            self.marks.popitem()
        # What came after the state that is restored now; if its step is not recorded, after the last one before it.
        if self.marks:
            mark_s = self.marks[next(reversed(self.marks))]
            self._turn(mark_s, Bucket.LOST, Bucket.PRODUCTIVE, Bucket.STALL, Bucket.EVALUATE)
        self.bucket, self.marks[step] = Bucket.PRODUCTIVE, event.time_s
        if self.interruption is not None:
            self.interruption.to_step, self.interruption.attempt = step, self.attempt
        self.highest, self.step = step, (event.time_s, step)

    def _step(self, event: Event) -> None:
        self._until(event.time_s)
        if self.bucket is not Bucket.PRODUCTIVE or "step" not in event.fields:  # a sign of life may come before one
            return
        step = event.fields["step"]
        self.highest, self.step, self.marks[step] = max(self.highest, step), (event.time_s, step), event.time_s
        lost = self.interruption
        if lost is not None:
            since = takewhile(lambda span: span.end_s > lost.time_s, reversed(self.spans))
            down = (span for span in since if span.bucket is Bucket.DOWN)
            away_s = sum(min(span.end_s, event.time_s) - max(span.begin_s, lost.time_s) for span in down)
            recovery = Recovery(
                time_s=lost.time_s,
                cause=lost.cause,
                from_step=lost.from_step,
                to_step=lost.to_step,
                seconds=event.time_s - lost.time_s - away_s,
                attempt=lost.attempt,
            )
            self.recoveries.append(recovery)
            self.interruption = None

    def _pause(self, event: Event) -> None:
        name, bucket = _PAUSES[event.kind]
        self._until(event.time_s)
        if self.bucket is Bucket.PRODUCTIVE:
            self._turn(event.time_s - event.fields[name], bucket, Bucket.PRODUCTIVE)
            step = event.fields["step"]
            self.step, self.marks[step] = (event.time_s, step), event.time_s

    def _interrupted(self, event: Event) -> None:
        self._until(event.time_s)
        self._stopped("interrupted")
        self.bucket = Bucket.DOWN

    def _outcome(self, event: Event) -> None:
        self._until(event.time_s)
        if event.fields["ending"] == Ending.FINISHED.value:
            if self.bucket is Bucket.PRODUCTIVE and self.step is not None:
                self._turn(self.step[0], Bucket.STALL, Bucket.PRODUCTIVE)  # the last save was waited for
            self.step = None  # a training that goes on from here later was not interrupted
        else:
            self._stopped(event.fields["ending"])
        self.bucket = Bucket.DOWN


_HANDLERS = {
    "started": Book._started,
    "opened": Book._started,  # the journal's word for it
    "attempt": Book._attempt,
    "training": Book._training,
    "step": Book._step,
    "alive": Book._step,
    "down": Book._down,
    "agent_lost": Book._down,
    "hang": Book._down,
    "regroup": Book._down,
    "controller_lost": Book._down,
    "interrupted": Book._interrupted,
    "outcome": Book._outcome,
    **dict.fromkeys(_PAUSES, Book._pause),
}
"""All other kinds only say that time has passed."""
