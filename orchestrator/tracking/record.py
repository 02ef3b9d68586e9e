"""The run's own record: every event and the numbers of every step, in storage, as JSON lines.

`events/` and `metrics/` hold immutable objects (see `checkpoint.keys`), each a few lines or, merged, many. Any of them
reads with `pandas.read_json(path, lines=True)`:

    {"step": 7, "attempt": 1, "time_s": 1789000000.125, "loss": 0.91, "grad_norm": 1.2, "lr": 0.002}
    {"time_s": 1789000000.251, "event": "saved", "session": "…", "writer": "…", "seq": 9, "attempt": 1, "step": 7, ...}

A merge may be interrupted, or done twice, so a row may be in two objects; readers go by what a row says of itself:
a step by its attempt, an event by its writer and number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.checkpoint.keys import EVENTS, METRICS, RowsRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import MissingObjectError
from orchestrator.messages.attempts import Event

Row = dict[str, Any]

_NEEDED = {EVENTS: {"time_s", "event", "writer", "seq"}, METRICS: {"step", "attempt", "time_s"}}
_NEEDED_OF_KIND = {
    "started": {"session", "num_steps"},
    "attempt": {"attempt", "world_size"},
    "training": {"step"},
    "step": {"step"},
    "snapshot": {"step", "stall_s"},
    "evaluated": {"step", "seconds"},
    "validation": {"step", "metrics"},
    "diverged": {"attempt", "skip"},
    "left_out": {"attempt", "step", "samples"},
    "corrupted": {"attempt", "since"},
    "cadence": {"arithmetic"},
    "outcome": {"ending", "message"},
}
"""What readers take for granted: one bit can make another key of it, and the line is JSON all the same."""
_NUMBERS = frozenset({int, float})
_TYPES = {
    **dict.fromkeys(("step", "attempt", "seq", "world_size", "num_steps", "since"), frozenset({int})),
    **dict.fromkeys(("time_s", "stall_s", "seconds"), _NUMBERS),
    **dict.fromkeys(("event", "writer"), frozenset({str})),
    "metrics": frozenset({dict}),
}
"""And of which type, for keys that readers reckon with or sort by."""
_BETWEEN_S = 0.001
"""From the last event of a driver to the first of the next, where clocks do not say."""
_LISTINGS = 10
"""Times that a folder is listed anew because objects were merged while we read them."""
_PARALLEL_READS = 8


def step_row(event: Event) -> Row:
    """The row of `metrics` for a `step` event."""
    fields = event.fields
    who = {"step": fields["step"], "attempt": fields["attempt"], "time_s": round(event.time_s, 3)}
    return who | _finite(fields["metrics"])


def event_row(event: Event, session: str, writer: str, seq: int) -> Row:
    """The row of `events` for any event."""
    who = {"time_s": round(event.time_s, 3), "event": event.kind, "session": session, "writer": writer, "seq": seq}
    fields = {key: _finite(value) if key == "metrics" else value for key, value in event.fields.items()}
    return who | {key: value for key, value in fields.items() if key not in who}


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN and no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines. What JSON does not know becomes text: no field of an event may stop its record."""
    return b"".join(json.dumps(row, default=str, ensure_ascii=False).encode() + b"\n" for row in rows)


def decode(data: bytes, folder: str) -> tuple[list[Row], int]:
    """The rows of an object of `folder`, and how many of its lines are none: cut short, or overwritten."""
    return decode_lines(data.splitlines(), folder)


def decode_lines(lines: Sequence[bytes], folder: str) -> tuple[list[Row], int]:
    """As `decode`."""
    try:
        found = json.loads(b"[%s]" % b",".join(lines))  # far quicker than line by line
    except ValueError:
        found = [_parse(line) for line in lines]
    rows = [row for row in found if type(row) is dict and _has(row, _NEEDED[folder])]
    if folder == EVENTS:
        rows = [row for row in rows if _has(row, _NEEDED_OF_KIND.get(row["event"], ()))]
    return rows, len(lines) - len(rows)


def _has(row: Row, keys: Iterable[str]) -> bool:
    return all(key in row and (key not in _TYPES or type(row[key]) in _TYPES[key]) for key in keys)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class RowsReader:
    """The rows of one folder. It remembers what it has read: looking again costs only what is new."""

    def __init__(self, store: Store, folder: str, keep: Callable[[list[Row]], list[Row]] = lambda rows: rows) -> None:
        """Args: keep: what is wanted of the rows of one object; the rest is forgotten as soon as it is read."""
        self._store = store
        self._folder = folder
        self._keep = keep
        self._read: dict[RowsRef, tuple[list[Row], int]] = {}
        self.complete = True
        """Whether the last `rows` were all there are."""

    @property
    def damaged(self) -> list[str]:
        """One line for each object that is not wholly readable."""
        return say_damaged(self._store, self._folder, {ref: bad for ref, (_, bad) in self._read.items()})

    def rows(self, enough: int | None = None, since: int | None = None) -> list[Row]:
        """All rows, or at least the `enough` newest of them, in no particular order and some maybe twice.

        Args:
            since: also all rows of this attempt and of later ones.

        Raises:
            StorageError: the store could not be read.
        """
        for _ in range(_LISTINGS - 1):
            try:
                return self._pass(enough, since)
            except MissingObjectError:
                continue  # merged into another object, which a new listing names
        return self._pass(enough, since)

    def _pass(self, enough: int | None, since: int | None) -> list[Row]:
        refs = [ref for name in self._store.list(self._folder) if (ref := RowsRef.parse(name))]
        refs.sort(reverse=True)
        found: list[Row] = []
        used: set[RowsRef] = set()
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            while refs:
                # Of few that are wanted, not many more are read: twice as many objects each time.
                some = refs[: _PARALLEL_READS if enough is None else min(_PARALLEL_READS, max(1, len(used)))]
                if enough is not None and len(found) >= enough:
                    some = [ref for ref in some if since is not None and ref.attempt >= since]
                if not some:
                    break
                refs = refs[len(some) :]
                unread = [ref for ref in some if ref not in self._read]
                for ref, content in zip(unread, pool.map(self._decode, unread), strict=True):
                    self._read[ref] = content
                for ref in some:
                    found += self._read[ref][0]
                used.update(some)
        self._read = {ref: self._read[ref] for ref in used}
        self.complete = not refs
        return found

    def _decode(self, ref: RowsRef) -> tuple[list[Row], int]:
        rows, bad = decode(self._store.read(f"{self._folder}/{ref}"), self._folder)
        return self._keep(rows), bad


def say_damaged(store: Store, folder: str, counts: Mapping[RowsRef, int]) -> list[str]:
    """One line for each object of `folder` that has damaged lines. Args: counts: of these."""
    return [f"{store.url}/{folder}/{ref}: {bad} lines are damaged" for ref, bad in sorted(counts.items()) if bad]


def one_row_a_step(rows: Iterable[Row]) -> list[Row]:
    """By step, each exactly once: of a step that was replayed, the row of the newest attempt that did it."""
    newest: dict[int, Row] = {}
    for row in rows:
        known = newest.get(row["step"])
        if known is None or row["attempt"] > known["attempt"]:
            newest[row["step"]] = row
    return [newest[step] for step in sorted(newest)]


def in_order(rows: Iterable[Row]) -> list[Event]:
    """Events in order of time, each exactly once.

    A writer's own order stands above its clock: if that was set back, time stands still until it has caught up. And so
    does the order of attempts: a driver whose clock shows less than when an older one claimed its last attempt has the
    right time, as those who look now are nearer to it, and the older one's events lie before.
    """
    by_writer: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_writer.setdefault(row["writer"], {})[row["seq"]] = row
    timed: list[tuple[float, str, int, Row]] = []
    for writer, own in by_writer.items():
        latest = -math.inf
        for seq in sorted(own):
            latest = max(latest, own[seq]["time_s"])
            timed.append((latest, writer, seq, own[seq]))
    early = _set_back(timed)
    shifted = [
        (time_s - early.get(row.get("session", ""), 0.0), writer, seq, row) for time_s, writer, seq, row in timed
    ]
    shifted.sort(key=lambda item: item[:3])
    return [_event(time_s, row) for time_s, _, _, row in shifted]


def _set_back(timed: Iterable[tuple[float, str, int, Row]]) -> dict[str, float]:
    """By session, the seconds by which its events are to lie earlier."""
    times: dict[str, list[float]] = {}
    claims: dict[str, list[tuple[int, float]]] = {}
    for time_s, _, _, row in timed:
        session = row.get("session", "")
        times.setdefault(session, []).append(time_s)
        if row["event"] == "attempt":
            claims.setdefault(session, []).append((row["attempt"], time_s))
    early: dict[str, float] = {}
    newer: tuple[float, int, float] | None = None
    """When the next driver began; the number of its first attempt, and when it claimed that."""
    for session in sorted(claims, key=lambda session: min(claims[session]), reverse=True):
        if newer is not None and any(number < newer[1] and at > newer[2] for number, at in claims[session]):
            early[session] = max(times[session]) - newer[0] + _BETWEEN_S
        shift, (first, at) = early.get(session, 0.0), min(claims[session])
        newer = min(times[session]) - shift, first, at - shift
    return early


def _event(time_s: float, row: Row) -> Event:
    fields = {key: value for key, value in row.items() if key not in ("time_s", "event", "seq")}
    return Event(kind=row["event"], fields=fields, time_s=time_s)


def of_the_owner(events: Iterable[Event]) -> Iterator[Event]:
    """Without what superseded attempts did after a newer one was claimed: it counts for nothing."""
    owner, newest, claimants = None, 0, set()
    for event in events:
        session, attempt = event.fields.get("session"), event.fields.get("attempt")
        if event.kind == "attempt" and event.fields["attempt"] > newest:
            owner, newest = session, event.fields["attempt"]
            claimants.add(session)
        elif (attempt is not None and attempt < newest) or (session in claimants and session != owner):
            continue
        yield event


def read_events(store: Store) -> Sequence[Event]:
    """Every event of the run, in order; the fields also say which `session` (life of a driver) and `writer` it is from.

    Raises:
        StorageError: the store could not be read.
    """
    return in_order(RowsReader(store, EVENTS).rows())
