"""An agent's thread that stores snapshots."""

from __future__ import annotations

import mmap
import queue
import threading
from multiprocessing.connection import Pipe

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import write_shard
from orchestrator.errors import UnbrokenError
from orchestrator.messages import Receipt, SaveFailed, Snapshot
from trainers.progress import Progress


class ShardWriter:
    """Stores snapshots in a thread: the shard goes from the shared buffer to storage without a second copy."""

    def __init__(self, store: Store, buffer: int, rank: int, world_size: int) -> None:
        self._store = store
        self._buffer = buffer
        self._rank = rank
        self._world_size = world_size
        self._jobs: queue.SimpleQueue[tuple[int, Snapshot]] = queue.SimpleQueue()
        self.connection, self._results = Pipe(duplex=False)
        """Delivers a `Receipt` or `SaveFailed` for each snapshot."""
        threading.Thread(target=self._work, name="shard-writer", daemon=True).start()

    def submit(self, attempt: int, snapshot: Snapshot) -> None:
        self._jobs.put((attempt, snapshot))

    def _work(self) -> None:
        while True:
            attempt, snapshot = self._jobs.get()
            progress = snapshot.progress
            try:
                # Unmapped when nothing refers to it; to close it here fails while an error's trace holds views.
                data = memoryview(mmap.mmap(self._buffer, snapshot.size_bytes, prot=mmap.PROT_READ))
                key = CheckpointRef(progress.samples_seen, attempt).shard(self._rank, self._world_size)
                shard = write_shard(self._store, key, snapshot.chunks, data, self._metadata(attempt, progress))
            except Exception as error:  # whatever it is, the save has failed and the trainer waits to hear so
                why = str(error) if isinstance(error, UnbrokenError) else repr(error)
                self._results.send(SaveFailed(attempt=attempt, progress=progress, error=why))
            else:
                self._results.send(Receipt(attempt=attempt, progress=progress, shard=shard, scalars=snapshot.scalars))

    def _metadata(self, attempt: int, progress: Progress) -> dict[str, str]:
        """For people who find the file alone."""
        return {
            "format": "unbroken-1",
            "attempt": str(attempt),
            "step": str(progress.step),
            "samples_seen": str(progress.samples_seen),
            "rank": f"{self._rank} of {self._world_size}",
        }
