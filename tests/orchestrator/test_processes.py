"""Processes below another one."""

from __future__ import annotations

import os
import signal
import subprocess

from orchestrator.processes import descendants


def test_all_that_come_from_a_process_parents_first() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as process:
        while not (below := descendants(process.pid)):
            pass
        every = descendants(os.getpid())
        assert every.index(process.pid) < every.index(below[0])
        assert process.pid not in below
        os.kill(below[0], signal.SIGKILL)
    assert process.pid not in descendants(os.getpid())
