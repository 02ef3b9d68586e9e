"""A program under measurement that prints JSON lines, and can be frozen as a whole while another one is measured."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.processes import descendants

_ROOT = Path(__file__).parent.parent


class Arm:
    """One of the programs that are measured in turn.

    While one runs, every process of the others is stopped, helpers and daemons included: it has the machine for itself,
    and still both sides are measured within the same seconds.
    """

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start `python ARGUMENTS`. What it prints that is no JSON goes to a log file."""
        self.name = name
        # Of this user: another one's can not be written to.
        self.log = Path(tempfile.gettempdir()) / f"unbroken-bench-{os.getuid()}-{name}.log"
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=_ROOT,
            # Ray's workers start in other folders.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, *_: object) -> None:
        tree = self._signal(signal.SIGSTOP)  # so that nobody starts more while they are being ended
        _send(tree, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = 120) -> list[dict[str, Any]]:
        """The lines up to and with the first one that is `wanted`."""
        deadline, seen = time.monotonic() + timeout_s, []
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                raise TimeoutError(f"{self.name} said no more that was waited for; last: {seen[-3:]}; see {self.log}")
            seen.append(line)
            if wanted(line):
                return seen

    def so_far(self) -> list[dict[str, Any]]:
        """The lines that have come since the last look; waits for none."""
        seen = []
        while True:
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                return seen
            if line is None:
                raise TimeoutError(f"{self.name} has ended; last: {seen[-3:]}; see {self.log}")
            seen.append(line)

    def _signal(self, number: int) -> list[int]:
        tree = [self._process.pid, *descendants(self._process.pid)]
        _send(tree, number)
        return tree

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, self.log.open("w") as log:
            for text in lines:
                if text.startswith("{"):
                    self._lines.put(json.loads(text))
                else:
                    log.write(text)
                    log.flush()
        self._lines.put(None)


def _send(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended since it was seen
            os.kill(pid, number)
