"""The save in flight: the shards of all ranks on their way to becoming a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.writer import CommitInfo
from orchestrator.committing import CommitJob
from orchestrator.messages import Receipt, SaveEnded, SaveFailed
from orchestrator.opening import Opening, Remembered
from orchestrator.run_spec import RunSpec
from orchestrator.sections import TierName
from orchestrator.stores import Stores
from trainers.progress import Progress


class SaveRound:
    """Takes every rank's word on the save in flight; when all shards are there, it is to be committed."""

    def __init__(self, spec: RunSpec, stores: Stores, world_size: int) -> None:
        self._spec = spec
        self._stores = stores
        self._world_size = world_size
        self._receipts: dict[TierName, dict[int, Receipt]] = {}
        self._over: dict[TierName, Progress] = {}
        self.ended: SaveEnded | None = None
        """How the last save of this attempt ended."""
        self.committed = Progress()
        """Of the newest checkpoint committed in storage."""
        self.checkpoint: str | None = None
        """Its name."""
        self._metrics: tuple[Progress, Mapping[str, float]] = (Progress(), {})

    def begin_attempt(self, opening: Opening) -> None:
        """Forget an incomplete set; its files stay behind as a checkpoint that was never committed."""
        self._receipts, self._over, self.ended = {}, {}, None
        if opening.memory is None:
            self.committed, self.checkpoint = opening.committed, opening.restore

    def remembered(self, held: Progress | None) -> Remembered | None:
        """What the agents hold, if it is a snapshot that all of them have."""
        return held and Remembered(progress=held, committed=self.committed, checkpoint=self.checkpoint)

    def note(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """The numbers of a step; they go into its checkpoint, if it gets one."""
        if self._spec.checkpoint.tiers_due(progress.step, self._spec.num_steps):
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self._metrics = progress, finite

    def has_ended(self, progress: Progress, tier: TierName | None = None) -> bool:
        """Whether the save of `progress` is over, in `tier` or in all; steps only grow within an attempt."""
        if tier is None:
            return self.ended is not None and progress.step <= self.ended.progress.step
        return tier in self._over and progress.step <= self._over[tier].step

    def take(self, rank: int, message: Receipt | SaveFailed) -> CommitJob | None:
        """One rank's shard, or that there is none; afterwards `ended` may tell of this save.

        Returns:
            What to commit, if this was the last shard missing.
        """
        if isinstance(message, SaveFailed):
            self.end(message.progress, message.tier, f"rank {rank}: {message.error}")
            return None
        receipts = self._receipts.setdefault(message.tier, {})
        receipts[rank] = message
        if len(receipts) < self._world_size:
            return None
        assert {receipt.progress for receipt in receipts.values()} == {message.progress}, "one save at a time"
        shards = [receipts[rank].shard for rank in range(self._world_size)]
        return CommitJob(shards=shards, info=self._info(message), tier=message.tier)

    def end(self, progress: Progress, tier: TierName, error: str | None, attempt: int = 0) -> None:
        """The save of `progress` is committed in `tier`, by `attempt`, or has failed there."""
        self._receipts.pop(tier, None)
        self._over[tier] = progress
        due = self._spec.checkpoint.tiers_due(progress.step, self._spec.num_steps) or ("storage",)
        if tier == due[-1]:
            self.ended = SaveEnded(progress=progress, error=error, tier=tier)
        if error is None and tier == "storage":
            self.committed, self.checkpoint = progress, str(CheckpointRef(progress.samples_seen, attempt))

    def _info(self, receipt: Receipt) -> CommitInfo:
        store = self._stores.of(receipt.tier)
        return CommitInfo(
            run_id=self._spec.run_id,
            attempt=receipt.attempt,
            progress=receipt.progress,
            reason="final" if receipt.progress.step == self._spec.num_steps else "interval",
            strategy=self._spec.strategy,
            config_hash=self._spec.config_hash,
            versions=self._spec.versions,
            store={"kind": store.backend.kind, "conditional_create": store.conditional_create},
            verify=self._spec.checkpoint.verify,
            metrics=self._metrics[1] if self._metrics[0] == receipt.progress else {},
            scalars=receipt.scalars,
            health={"ok": True},  # a step that is not finite is never taken, so never saved
        )
