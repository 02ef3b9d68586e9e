"""Processes below another one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

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


def test_a_name_may_hold_half_a_character(tmp_path: Path) -> None:
    """The kernel cuts names after 15 bytes, whosever process it is."""
    program = os.path.join(os.fsencode(tmp_path), b"half \xc3")
    shutil.copy(str(shutil.which("sleep")), program)
    with subprocess.Popen([program, "60"]) as process:
        try:
            assert process.pid in descendants(os.getpid())
        finally:
            process.kill()
