"""Whether this machine has room for what a row makes, asked before the row has run for minutes."""

from __future__ import annotations

import shutil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def missing_room(*, disk_bytes: int = 0, memory_bytes: int = 0, folder: str = "/tmp") -> str | None:
    """What there is too little of, in one line; None: nothing."""
    if (free := shutil.disk_usage(folder).free) < disk_bytes:
        return f"{folder} has {free / 1e9:.1f} GB left; {disk_bytes / 1e9:.1f} GB are needed"
    if (free := available_bytes()) < memory_bytes:
        return f"{free / 1e9:.1f} GB of memory are available; {memory_bytes / 1e9:.1f} GB are needed"
    return None


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Memory that processes may still take here: of the machine, or of the container if that has less."""
    lines = meminfo.read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if not (limit.exists() and used.exists()) or (most := limit.read_text().strip()) == "max":
        return available
    # Of what a container has used, pages of files are given back when they are wanted.
    reclaimable = _statistic(cgroup / "memory.stat", "inactive_file")
    return min(available, int(most) - int(used.read_text()) + reclaimable)


def _statistic(file: Path, name: str) -> int:
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
