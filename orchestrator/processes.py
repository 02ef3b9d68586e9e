"""Processes of this machine, as /proc shows them."""

from __future__ import annotations

from pathlib import Path


def birth(pid: int) -> int | None:
    """When a process was started, in clock ticks: with its id, a name that no other one gets. None: it has ended."""
    fields = _fields(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def parent(pid: int) -> int | None:
    """The process that `pid` was forked from, if both live. None: it has ended."""
    fields = _fields(pid)
    return None if fields is None else int(fields[1])


def _fields(pid: int) -> list[str] | None:
    """What the kernel says of a process, from its state on; the name before may hold spaces. None: it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def descendants(pid: int) -> list[int]:
    """All processes that come from `pid`, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name in parentheses may hold spaces; the parent is the second field after it.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has just ended
            children.setdefault(parent, []).append(int(entry.name))
    found = children.get(pid, []).copy()
    for below in found:
        found.extend(children.get(below, ()))
    return found
