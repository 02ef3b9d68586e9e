"""The process that a drill causes faults to: `unbroken train`, followed event by event."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue

from orchestrator.messages import Event


class DrilledProcess:
    """One life of the driver; see `orchestrator/chaos/drilled.py` for what it runs."""

    def __init__(self, config: Path, preload: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Args: log: takes what it writes to stderr."""
        command = [sys.executable, "-m", "orchestrator.chaos.drilled", str(config), *preload]
        self._log = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=dict(environment), start_new_session=True
            )
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
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.endswith(b"\n"):  # one cut short is the last one of a killed process
                    kind, time_s, fields = json.loads(line)
                    self.events.put(Event(kind=kind, fields=fields, time_s=time_s))
        self.events.put(None)
