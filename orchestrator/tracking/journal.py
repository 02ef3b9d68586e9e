"""The journal: every event of a run on this machine, one JSON line each, every step once.

It is what lies between a training that must not wait and sinks that may take their time: the sinks follow the file. It
outlives every process, so a sink that was killed goes on from the first event that it does not have.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.messages.attempts import Event

NAME = "events.jsonl"

OPENED = "opened"
"""Kind of the event with which a driver introduces itself; its fields are all that a sink knows of the run."""

_POLL_S = 0.2


def encode(event: Event, session: str, number: int) -> bytes:
    """The line of an event. `session` and `number` are its sender's: an event that is sent twice is kept once."""
    line = {"time_s": event.time_s, "kind": event.kind, "fields": event.fields, "sent": [session, number]}
    return json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n"


def decode(line: bytes) -> Event:
    """Raises ValueError if the line is damaged."""
    try:
        document = json.loads(line)
        return Event(kind=document["kind"], fields=document["fields"], time_s=document["time_s"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{error!r} in a line of the journal") from error


class Journal:
    """The writing end; one process at a time has it."""

    def __init__(self, path: Path) -> None:
        """Wait until the process of an earlier driver, if there is one, has written its last event."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._marks: dict[tuple[Any, ...], int] = {}
        self._rewind = False
        self._session, self._number = "", -1
        self.opened: Event | None = None
        """The newest introduction."""
        self._recover()
        self.size = os.fstat(self._file.fileno()).st_size

    def append(self, line: bytes) -> None:
        """Write an encoded event, unless it is here: sent again, or a step, validation or samples of a repeated step.

        Raises:
            OSError: it could not be written; nothing of it is in the file.
        """
        before = self._session, self._number, self._rewind, self.opened, dict(self._marks)
        if not self._admit(line):
            return
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(28, "no space left on device")
        except OSError:
            os.ftruncate(self._file.fileno(), self.size)
            # It is not here: sent again, or repeated by a later attempt, it is to be written.
            self._session, self._number, self._rewind, self.opened, self._marks = before
            raise
        self.size += len(line)

    def close(self) -> None:
        self._file.close()

    def _recover(self) -> None:
        end = 0
        self._file.seek(0)
        with open(os.dup(self._file.fileno()), "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # torn by a machine that died
                end += len(line)
                with suppress(ValueError, KeyError, TypeError):  # damaged: `follow` passes over it too
                    self._admit(line)
        os.ftruncate(self._file.fileno(), end)

    def _admit(self, line: bytes) -> bool:
        event, (session, number) = decode(line), json.loads(line)["sent"]
        if session == self._session and number <= self._number:
            return False
        self._session, self._number = session, number
        if event.kind == OPENED:
            self.opened = event
            self._rewind = bool((event.fields["tracking"]["wandb"] or {}).get("rewind"))
        elif event.kind == "training" and self._rewind:
            self._marks = {key: min(mark, event.fields["step"]) for key, mark in self._marks.items()}
        elif event.kind in ("step", "validation", "samples"):
            key = (event.kind, event.fields.get("title"))
            if event.fields["step"] <= self._marks.get(key, -1):
                return False
            self._marks[key] = event.fields["step"]
        return True


def follow(path: Path, end: Callable[[], int | None]) -> Iterator[tuple[Event, int]]:
    """The events of a journal that is being written, from its beginning, and the position behind each.

    A damaged line is left out: a sink would end at it, at every start.

    Args:
        end: the size at which the journal ends, once that is known.
    """
    position = 0
    with path.open("rb") as file:
        while True:
            limit = end()  # before reading: what was written before the end was known is read
            while (line := file.readline()).endswith(b"\n"):
                if limit is not None and position + len(line) > limit:
                    return  # the next driver's
                position += len(line)
                try:
                    event = decode(line)
                except ValueError:
                    continue
                yield event, position
            if limit is not None:
                return
            file.seek(position)
            time.sleep(_POLL_S)


def last_opened(path: Path) -> Event | None:
    """The newest introduction in a journal."""
    size = path.stat().st_size
    newest = None
    for event, _ in follow(path, lambda: size):  # of millions: none of the others is kept
        newest = event if event.kind == OPENED else newest
    return newest


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for, and hold, a lock that ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
