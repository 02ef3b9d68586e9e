"""The save in flight: the shards of all ranks on their way to becoming a checkpoint."""

from __future__ import annotations

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import CommitInfo
from orchestrator.committing import CommitJob
from orchestrator.messages import Receipt, SaveEnded, SaveFailed
from orchestrator.opening import Opening
from orchestrator.run_spec import RunSpec
from trainers.progress import Progress


class SaveRound:
    """Takes every rank's word on the save in flight; when all shards are there, it is to be committed."""

    def __init__(self, spec: RunSpec, store: Store, world_size: int) -> None:
        self._spec = spec
        self._store = store
        self._world_size = world_size
        self._receipts: dict[int, Receipt] = {}
        self.ended: SaveEnded | None = None
        """How the last save of this attempt ended."""
        self.committed = Progress()
        """Of the newest committed checkpoint."""
        self.checkpoint: str | None = None
        """Its name."""

    def begin_attempt(self, opening: Opening) -> None:
        """Forget an incomplete set; its files stay behind as a checkpoint that was never committed."""
        self._receipts, self.ended = {}, None
        if opening.memory is None:
            self.committed, self.checkpoint = opening.committed, opening.restore

    def has_ended(self, progress: Progress) -> bool:
        """Whether the save of `progress` is over; steps only grow within an attempt."""
        return self.ended is not None and progress.step <= self.ended.progress.step

    def take(self, rank: int, message: Receipt | SaveFailed) -> CommitJob | None:
        """One rank's shard, or that there is none; afterwards `ended` may tell of this save.

        Returns:
            What to commit, if this was the last shard missing.
        """
        if isinstance(message, SaveFailed):
            self.end(message.progress, f"rank {rank}: {message.error}")
            return None
        self._receipts[rank] = message
        if len(self._receipts) < self._world_size:
            return None
        receipts = [self._receipts[rank] for rank in range(self._world_size)]
        assert {receipt.progress for receipt in receipts} == {message.progress}, "one save is in flight at a time"
        return CommitJob(shards=[receipt.shard for receipt in receipts], info=self._info(message))

    def end(self, progress: Progress, error: str | None, attempt: int = 0) -> None:
        """The save of `progress` is committed, by `attempt`, or has failed."""
        self._receipts = {}
        self.ended = SaveEnded(progress=progress, error=error)
        if error is None:
            self.committed, self.checkpoint = progress, str(CheckpointRef(progress.samples_seen, attempt))

    def _info(self, receipt: Receipt) -> CommitInfo:
        return CommitInfo(
            run_id=self._spec.run_id,
            attempt=receipt.attempt,
            progress=receipt.progress,
            reason="final" if receipt.progress.step == self._spec.num_steps else "interval",
            strategy=self._spec.strategy,
            config_hash=self._spec.config_hash,
            versions=self._spec.versions,
            store={"kind": self._store.backend.kind, "conditional_create": self._store.conditional_create},
            verify=self._spec.checkpoint.verify,
            scalars=receipt.scalars,
            health={"ok": True},  # a step that is not finite is never taken, so never saved
        )
