"""The shards of the save in flight, on their way to becoming a checkpoint."""

from __future__ import annotations

from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import CommitInfo, commit
from orchestrator.messages import Receipt
from orchestrator.run_spec import RunSpec


class ShardCollection:
    """Takes every rank's receipt and commits when all are there."""

    def __init__(self, spec: RunSpec, store: Store, world_size: int) -> None:
        self._spec = spec
        self._store = store
        self._world_size = world_size
        self._receipts: dict[int, Receipt] = {}

    def clear(self) -> None:
        """Forget an incomplete set; its files stay behind as a checkpoint that was never committed."""
        self._receipts = {}

    def add(self, rank: int, receipt: Receipt) -> Manifest | None:
        """Add one rank's shard; the committed manifest if it was the last one missing.

        Raises:
            SupersededError: a newer attempt owns the run.
            UnbrokenError: the commit failed, or nobody knows whether it did.
        """
        self._receipts[rank] = receipt
        if len(self._receipts) < self._world_size:
            return None
        receipts = [self._receipts[rank] for rank in range(self._world_size)]
        assert {r.progress for r in receipts} == {receipt.progress}, "one save is in flight at a time"
        info = CommitInfo(
            run_id=self._spec.run_id,
            attempt=receipt.attempt,
            progress=receipt.progress,
            reason="final" if receipt.progress.step == self._spec.num_steps else "interval",
            strategy=self._spec.strategy,
            config_hash=self._spec.config_hash,
            versions=self._spec.versions,
            store={"kind": self._store.backend.kind, "conditional_create": self._store.conditional_create},
            scalars=receipts[0].scalars,
            health={"ok": True},  # a step that is not finite is never taken, so never saved
        )
        return commit(self._store, [receipt.shard for receipt in receipts], info)
