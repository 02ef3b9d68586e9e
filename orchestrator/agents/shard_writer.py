"""An agent's snapshots on their way to storage: in a thread, from the shared buffer, without a second copy."""

from __future__ import annotations

import mmap
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Pipe

from orchestrator.checkpoint.keys import CheckpointRef, shard_name
from orchestrator.checkpoint.writer import (
    ChunkReceipt,
    Shard,
    hash_shard,
    lay_out_shard,
    store_shard,
)
from orchestrator.errors import DamagedCheckpointError, UnbrokenError
from orchestrator.messages.saves import MemorySnapshot, Receipt, SaveDelayed, SaveFailed, Snapshot
from orchestrator.retries import Retries, patiently
from orchestrator.sections import CheckpointConfig, TierName
from orchestrator.stores import Stores


@dataclass(frozen=True, kw_only=True)
class HeldSnapshot:
    """What lies in the agent's buffer."""

    snapshot: Snapshot
    hashed: Future[tuple[ChunkReceipt, ...]] = field(default_factory=Future)
    """Hashes and fingerprints of its rows, taken right after the snapshot: who reads the buffer later can tell whether
    it still holds the same."""

    def recall(self, pending: bool) -> MemorySnapshot:
        """What a trainer starts from; `pending`: it is not committed."""
        # They are being hashed at most, which takes less than the trainer's start. None: the trainer will refuse it.
        chunks = () if self.hashed.exception() else self.hashed.result()
        return MemorySnapshot(snapshot=self.snapshot, chunks=chunks, pending=pending)


@dataclass(frozen=True, kw_only=True)
class _Job:
    attempt: int
    held: HeldSnapshot
    retries: Retries


class ShardWriter:
    """Stores one snapshot after the other; what fails is repeated from the same buffer until its deadline."""

    def __init__(self, stores: Stores, buffer: int, rank: int, world_size: int, config: CheckpointConfig) -> None:
        self._stores = stores
        self._buffer = buffer
        self._rank = rank
        self._world_size = world_size
        self._config = config
        self._snapshots: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._shards: queue.SimpleQueue[tuple[_Job, Shard] | None] = queue.SimpleQueue()
        self._retries = Retries(0.0)
        self._map: mmap.mmap | None = None
        self._telling = threading.Lock()
        self.connection, self._results = Pipe(duplex=False)
        """Delivers a `Receipt` or `SaveFailed` for each snapshot, and before that a `SaveDelayed` if a try failed."""
        # Two, so that a snapshot is hashed at once, even while the upload of one that failed hangs.
        threading.Thread(target=self._hash, name="shard-hasher", daemon=True).start()
        threading.Thread(target=self._write, name="shard-writer", daemon=True).start()

    def submit(self, attempt: int, held: HeldSnapshot) -> None:
        """Store it for `attempt`, in one of its tiers after the other.

        The buffer must not change until the last result is there, or until nobody wants it any more: see `drop`.
        """
        self._retries = Retries(self._config.deadline_s)
        self._snapshots.put(_Job(attempt=attempt, held=held, retries=self._retries))

    def drop(self) -> None:
        """Do not try the last one again: nobody waits for it any more."""
        self._retries.end()

    def close(self) -> None:
        """End the threads when they are done with what is under way; nobody waits for that."""
        self.drop()
        self._snapshots.put(None)

    def _hash(self) -> None:
        while (job := self._snapshots.get()) is not None:
            try:
                shard = self._lay_out(job)
            except Exception as error:  # whatever it is, the save has failed and the trainer waits to hear so
                for tier in job.held.snapshot.tiers:
                    self._fail(job, error, tier)
            else:
                self._shards.put((job, shard))  # it is written while it is hashed
                self._hash_shard(job, shard)
                del shard  # lets go of the buffer
        self._shards.put(None)

    def _hash_shard(self, job: _Job, shard: Shard) -> None:
        hashed = job.held.hashed
        try:
            receipt = hash_shard(shard)
            if not hashed.done():
                hashed.set_result(receipt.chunks)
            elif [chunk.hash for chunk in hashed.result()] != [chunk.hash for chunk in receipt.chunks]:
                # What is hashed anew would pass for sound ever after.
                raise DamagedCheckpointError(
                    f"rank {self._rank}: the snapshot of {job.held.snapshot.progress} changed in memory"
                )
        except Exception as error:  # as above: raised again where the shard is to be verified
            if not hashed.done():
                hashed.set_exception(error)
            shard.hashed.set_exception(error)
        else:
            shard.hashed.set_result(receipt)

    def _write(self) -> None:
        while (work := self._shards.get()) is not None:
            job, shard = work
            for tier in job.held.snapshot.tiers:
                try:
                    self._store_shard(job, shard, tier)
                except Exception as error:  # as above; the next tier may work
                    self._fail(job, error, tier)
                else:
                    self._tell(
                        Receipt(
                            attempt=job.attempt,
                            progress=job.held.snapshot.progress,
                            tier=tier,
                            last=tier == job.held.snapshot.tiers[-1],
                            shard=shard.receipt,
                            scalars=job.held.snapshot.scalars,
                        )
                    )
            del work, shard  # lets go of the buffer

    def _fail(self, job: _Job, error: Exception, tier: TierName) -> None:
        why = str(error) if isinstance(error, UnbrokenError) else repr(error)
        progress, last = job.held.snapshot.progress, tier == job.held.snapshot.tiers[-1]
        self._tell(SaveFailed(attempt=job.attempt, progress=progress, tier=tier, last=last, error=why))

    def _tell(self, message: Receipt | SaveFailed | SaveDelayed) -> None:
        with self._telling:  # both threads do, and a receipt may be longer than what a pipe takes in one piece
            self._results.send(message)

    def _lay_out(self, job: _Job) -> Shard:
        snapshot = job.held.snapshot
        try:
            data = self._mapped(snapshot.size_bytes)
            return lay_out_shard(shard_name(self._rank, self._world_size), snapshot.chunks, data, self._metadata(job))
        except Exception as error:
            if not job.held.hashed.done():
                job.held.hashed.set_exception(error)
            raise

    def _mapped(self, size_bytes: int) -> memoryview:
        """The snapshot. Mapped once, as long as it does not grow: page by page that takes longer than to hash it."""
        if self._map is None or len(self._map) < size_bytes:
            # The old one is unmapped when nothing refers to it; to close it fails while an error's trace holds views.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._map = mmap.mmap(self._buffer, size_bytes, flags=flags, prot=mmap.PROT_READ)
        return memoryview(self._map)[:size_bytes]

    def _store_shard(self, job: _Job, shard: Shard, tier: TierName) -> None:
        progress = job.held.snapshot.progress

        def delayed(error: UnbrokenError) -> None:
            self._tell(SaveDelayed(attempt=job.attempt, progress=progress, error=str(error)))

        ref, store = CheckpointRef(progress.samples_seen, job.attempt), self._stores.of(tier)
        if tier == "peer":
            store_shard(store, ref, shard, self._config.verify)  # there is a next time soon, and storage must not wait
        else:
            patiently(partial(store_shard, store, ref, shard, self._config.verify), job.retries.pause, delayed)

    def _metadata(self, job: _Job) -> dict[str, str]:
        """For people who find the file alone."""
        progress = job.held.snapshot.progress
        return {
            "format": "unbroken-1",
            "attempt": str(job.attempt),
            "step": str(progress.step),
            "samples_seen": str(progress.samples_seen),
            "rank": f"{self._rank} of {self._world_size}",
        }
