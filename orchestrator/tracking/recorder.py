"""Writes the run's own record beside the training: in a thread, with a client of its own, never waited for."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.checkpoint.keys import EVENTS, METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError
from orchestrator.messages.attempts import Event
from orchestrator.tracking.merging import Merger
from orchestrator.tracking.record import Row, encode, event_row, step_row

_CAN_WAIT = frozenset({"step", "trainer", "reached", "alive", "pruned"})
"""Kinds that are stored with the next flush. All others are stored at once: what follows may be the end."""
_LONGEST_PAUSE_S = 30.0
_CLOSE_S = 15.0


@dataclass(frozen=True, kw_only=True)
class RecorderConfig:
    """When to write, and how much to hold."""

    flush_s: float = 5.0
    """Seconds between two flushes while a run trains."""
    alive_s: float = 30.0
    """After so many seconds without an event a sign of life is recorded."""
    most_waiting: int = 100_000
    """Events held while storage is away (some 60 MB). Beyond that, steps are dropped and counted; events are not,
    up to twice as many."""


class Recorder:
    """A `Sink`: appends every event and every step's numbers to storage.

    While storage is away it holds what comes, up to a bound, and tries again for ever.
    """

    def __init__(
        self,
        url: str,
        session: str,
        report: Callable[[Event], None],
        config: RecorderConfig | None = None,
        open_store: Callable[[str], Store] = Store.open,
    ) -> None:
        """Args:
        session: the life of the driver that this belongs to.
        report: told, from the thread, when the record cannot be written and when it can again.
        """
        self._url = url
        self._report = report
        self._config = config or RecorderConfig()
        self._open_store = open_store
        self._lock = threading.Lock()
        self._waiting: list[Event] = []
        self._dropped = 0
        self._wake = threading.Event()
        self._closing = False
        self._batches = _Batches(session[:8])
        self._unwritten: list[tuple[str, RowsRef, bytes]] = []
        self._failures = 0
        self._store: Store | None = None
        self._mergers: dict[str, Merger] = {}
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def take(self, event: Event) -> None:
        with self._lock:
            limit = self._config.most_waiting * (1 if event.kind == "step" else 2)
            if len(self._waiting) >= limit:
                self._dropped += 1
                return
            self._waiting.append(event)
        if event.kind not in _CAN_WAIT:
            self._wake.set()

    def close(self) -> None:
        """Write what is still here: one more try, and seconds at most."""
        self._closing = True
        self._wake.set()
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        silent_since, pause_s = time.monotonic(), self._config.flush_s
        while True:
            self._wake.wait(pause_s)
            self._wake.clear()
            closing = self._closing
            if self._waiting:
                silent_since = time.monotonic()
            elif not closing and time.monotonic() - silent_since >= self._config.alive_s:
                silent_since = time.monotonic()
                self.take(_event("alive"))
            pause_s = self._config.flush_s if self._flush() else self._pause_s(closing)
            if closing:
                return

    def _pause_s(self, closing: bool) -> float:
        """How long to leave storage alone after a failure, whatever comes in meanwhile."""
        pause_s = min(_LONGEST_PAUSE_S, 0.5 * 2 ** min(self._failures, 10))  # 2**1024 is no float any more
        end = time.monotonic() + pause_s
        while not self._closing and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.2, left))
        return 0.0

    def _flush(self) -> bool:
        """Write what has come; False if storage did not take it."""
        try:
            self._write()  # first what could not be written before; until then what comes is held, and bounded
            with self._lock:
                batch, self._waiting = self._waiting, []
            self._unwritten = self._batches.objects(batch)
            self._write()
            for merger in self._mergers.values():
                merger.merge()
        except Exception as error:  # storage raises what it likes; a bug in here must not end a training that is well
            why = str(error) if isinstance(error, UnbrokenError) else f"{type(error).__name__}: {error}"
            self._failed(why)
            return False
        self._recovered()
        return True

    def _write(self) -> None:
        self._store = self._store or self._open_store(self._url)
        while self._unwritten:
            folder, ref, data = self._unwritten[0]
            self._store.write(f"{folder}/{ref}", [data])
            del self._unwritten[0]
            self._merger(self._store, folder).add(ref)

    def _merger(self, store: Store, folder: str) -> Merger:
        if folder not in self._mergers:
            self._mergers[folder] = merger = Merger(store, folder, self._batches.name)
            merger.adopt()
        return self._mergers[folder]

    def _failed(self, error: str) -> None:
        self._failures += 1
        if self._failures == 1:
            self._report(_event("record_failed", error=error))

    def _recovered(self) -> None:
        if not self._failures:
            return
        self._failures = 0
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        resumed = _event("record_resumed", dropped=dropped)
        self._report(resumed)
        self.take(resumed)


class _Batches:
    """Turns events into objects: keys that no other process uses, rows that say who wrote them."""

    def __init__(self, session: str) -> None:
        self._session = session
        self._writer = uuid.uuid4().hex[:8]
        self._attempt = 0
        self._number = 0
        self._seq = 0
        self._latest_step: Event | None = None
        self._after_event = True

    def objects(self, batch: list[Event]) -> list[tuple[str, RowsRef, bytes]]:
        """Folder, reference and content of what stores `batch`."""
        steps = [step_row(event) for event in batch if event.kind == "step"]
        events = self._events(batch)
        for event in batch:
            self._attempt = max(self._attempt, event.fields.get("attempt", 0))
        found = [(EVENTS, events), (METRICS, steps)]
        return [(folder, self.name(self._attempt, 0), encode(rows)) for folder, rows in found if rows]

    def name(self, attempt: int, level: int) -> RowsRef:
        self._number += 1
        return RowsRef(attempt, self._number, self._writer, level)

    def _events(self, batch: list[Event]) -> list[Row]:
        """All events, but of the steps only the first and the last between two others.

        These say when work began and how far it came; a sign of life at the end says that it goes on.
        """
        rows: list[Row] = []
        for event in batch:
            if event.kind != "step":
                if self._latest_step is not None:
                    rows.append(self._row(_mark(self._latest_step, "step")))
                rows.append(self._row(event))
                self._latest_step, self._after_event = None, True
            elif self._after_event:
                rows.append(self._row(_mark(event, "step")))
                self._after_event = False
            else:
                self._latest_step = event
        if batch and batch[-1] is self._latest_step:
            rows.append(self._row(_mark(batch[-1], "alive")))
        return rows

    def _row(self, event: Event) -> Row:
        self._seq += 1
        return event_row(event, self._session, self._writer, self._seq)


def _mark(step: Event, kind: str) -> Event:
    """A step as an event of its own, without its numbers: these are in `metrics`."""
    return Event(kind=kind, fields={key: step.fields[key] for key in ("attempt", "step")}, time_s=step.time_s)


def _event(kind: str, /, **fields: object) -> Event:
    return Event(kind=kind, fields=fields, time_s=time.time())
