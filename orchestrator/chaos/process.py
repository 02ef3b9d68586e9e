"""The process that a drill causes faults to: `unbroken train`, followed event by event."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue

from orchestrator.messages.attempts import Event

_STACK = re.compile(r"\[0x[0-9a-f]+\]|\*\*\* StackTrace")


class DrilledProcess:
    """One life of the driver; see `orchestrator/chaos/drilled.py` for what it runs."""

    def __init__(self, config: Path, preload: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Args: log: takes what it prints."""
        # Not its stdout: Ray writes there too.
        ours, theirs = os.pipe()
        command = [sys.executable, "-m", "orchestrator.chaos.drilled", str(theirs), str(config), *preload]
        self._log = log
        with log.open("a") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, env=dict(environment), pass_fds=[theirs], start_new_session=True
            )
        os.close(theirs)
        self._lines = os.fdopen(ours, "rb")
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        """All that it tells; None: it is over."""
        self._reader = threading.Thread(target=self._read, name="drilled", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> int:
        """Kill it if it lives; what it told before is in `events`. Returns its exit code."""
        self._process.kill()
        code = self._process.wait()
        self._reader.join()
        return code

    def wait(self) -> int:
        return self._process.wait()

    def last_words(self) -> str:
        """Its last line; when Ray's own code has ended it, the one before the addresses on the stack."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = [line for line in lines if not _STACK.search(line)]
        return said[-1] if said else "it said nothing"

    def _read(self) -> None:
        try:
            with self._lines:
                for line in self._lines:
                    if line.endswith(b"\n"):  # one cut short is the last one of a killed process
                        kind, time_s, fields = json.loads(line)
                        self.events.put(Event(kind=kind, fields=fields, time_s=time_s))
        finally:
            self.events.put(None)
