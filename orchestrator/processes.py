"""Processes of this machine, as /proc shows them."""

from __future__ import annotations

import os
from pathlib import Path


def birth(pid: int) -> int | None:
    """When a process was started, in clock ticks: with its id, a name that no other one gets. None: it has ended."""
    fields = _fields(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def parent(pid: int) -> int | None:
    """The process that `pid` was forked from, if both live. None: it has ended."""
    fields = _fields(pid)
    return None if fields is None else int(fields[1])


def process_state(pid: int) -> str:
    """One letter: R running, S asleep, D waiting for a device, T stopped by a signal, Z ended; "": there is none."""
    fields = _fields(pid)
    return "" if fields is None else fields[0]


def command(pid: int) -> str:
    """The words that a process was started with; "": it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, with all of its threads; 0 if there is none."""
    fields = _fields(pid)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """All processes that come from `pid`, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (above := parent(int(entry.name))) is not None:
            children.setdefault(above, []).append(int(entry.name))
    found = children.get(pid, []).copy()
    for below in found:
        found.extend(children.get(below, ()))
    return found


def _fields(pid: int) -> list[str] | None:
    """What the kernel says of a process, from its state on; the name before may hold any bytes. None: it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
