"""The memory of a benchmark's processes over time, watched from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

_EVERY_S = 0.02


class MemoryWatch:
    """Samples the private memory of each rank's processes, and knows what shared memory they have beside it."""

    def __init__(self, folder: Path, num_ranks: int) -> None:
        """Args: folder: where `<rank>.watch` appears: the state's bytes, then the process ids of a rank."""
        self._files = [folder / f"{rank}.watch" for rank in range(num_ranks)]
        self._samples: list[list[tuple[float, int]]] = [[] for _ in range(num_ranks)]
        self._sizes = [0] * num_ranks
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> MemoryWatch:
        for file in self._files:
            file.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def extra(self, spans: Sequence[tuple[float, float]]) -> float:
        """The most that a rank had in one of the spans of time more than before it, its snapshot included.

        Relative to what it saves.
        """
        most = 0.0
        for samples, size_bytes in zip(self._samples, self._sizes, strict=True):
            for begin, end in spans:
                before = [num_bytes for at, num_bytes in samples if at < begin]
                within = [num_bytes for at, num_bytes in samples if begin <= at <= end]
                if before and within:
                    most = max(most, (size_bytes + max(within) - before[-1]) / size_bytes)
        return most

    def _work(self) -> None:
        while not self._over.wait(_EVERY_S):
            for rank, file in enumerate(self._files):
                if not file.exists():
                    continue
                size_bytes, *pids = map(int, file.read_text().split())
                self._sizes[rank] = size_bytes
                self._samples[rank].append((time.time(), sum(map(_private_bytes, pids))))


def _private_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
