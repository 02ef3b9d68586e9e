"""Processes below another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from orchestrator.processes import descendants, process_state


def test_all_that_come_from_a_process_parents_first() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as process:
        while not (below := descendants(process.pid)):
            pass
        every = descendants(os.getpid())
        assert every.index(process.pid) < every.index(below[0])
        assert process.pid not in below
        os.kill(below[0], signal.SIGKILL)
    assert process.pid not in descendants(os.getpid())


def test_a_process_may_have_a_name_that_is_cut_off_in_the_middle_of_a_character() -> None:
    name = "import ctypes; ctypes.CDLL(None).prctl(15, 'тренировка'.encode()); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process_state(process.pid) in ("R", "S")
        assert process.pid in descendants(os.getpid())
        process.kill()
