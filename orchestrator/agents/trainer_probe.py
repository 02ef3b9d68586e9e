"""What an agent can find out about its trainer from outside: its work, its stack, its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from orchestrator.messages.attempts import ExitKind, TrainerExit
from trainers.trace import Place

STACK_SIGNAL = signal.SIGRTMIN + 7
"""Makes a trainer write its stacks; a number that no library claims. It works while the GIL is held."""

_OWN_FAULT = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_NAMED = frozenset(signal.Signals)  # not all: most of those for real time are numbers
_SIGNAL_WAIT_S = 1.0
_QUIET_S = 0.05


def busy_s(pid: int) -> float | None:
    """Seconds that the main thread has run or wanted to run; what it waited for (peers, pipes) is left out.

    None where the kernel does not say. A thread that spins while a GPU works counts as busy all the time.
    """
    running_s, ready_s = _scheduled(pid)
    return None if ready_s is None else running_s + ready_s


def starved_s(pid: int) -> float | None:
    """Seconds of these in which it wanted to run and others had the CPU; None as for `busy_s`."""
    return _scheduled(pid)[1]


def _scheduled(pid: int) -> tuple[float, float | None]:
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            running_ns, ready_ns, _ = file.read().split()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return 0.0, None
    return int(running_ns) / 1e9, int(ready_ns) / 1e9


def read_stack(file: int, ask: Callable[[], None]) -> str:
    """The stacks that a trainer writes into `file` when asked; "" if it does not answer within a second.

    Args:
        file: descriptor of an empty file that trainer and agent share.
        ask: sends the signal.
    """
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)  # one offset for all who hold this descriptor
    ask()
    end, size, changed = time.monotonic() + _SIGNAL_WAIT_S, 0, time.monotonic()
    while (now := time.monotonic()) < end:
        if (seen := os.fstat(file).st_size) != size:
            size, changed = seen, now
        elif size and now - changed > _QUIET_S:
            break
        time.sleep(0.01)
    return os.pread(file, size, 0).decode(errors="replace")


def wordless_end(status: int, place: Place | None) -> TrainerExit:
    """Why a trainer is gone that has left no word.

    Args:
        status: as from `os.waitstatus_to_exitcode`.
        place: the microbatch at work.
    """
    if status >= 0:
        return TrainerExit(kind=ExitKind.ERROR, message=f"the trainer left with exit code {status} and no word")
    kind = ExitKind.CRASHED if -status in _OWN_FAULT else ExitKind.KILLED
    name = signal.Signals(-status).name if -status in _NAMED else f"signal {-status}"
    return TrainerExit(kind=kind, message=f"the trainer was ended by {name}", place=place)
