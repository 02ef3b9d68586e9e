"""The save in flight: the shards of all ranks on their way to becoming a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import CommitInfo, commit
from orchestrator.errors import SupersededError, UnbrokenError
from orchestrator.messages import Receipt, SaveEnded, SaveFailed
from orchestrator.run_spec import RunSpec
from trainers.progress import Progress


class SaveRound:
    """Takes every rank's word on the save in flight, and commits when all shards are there."""

    def __init__(self, spec: RunSpec, store: Store, world_size: int) -> None:
        self._spec = spec
        self._store = store
        self._world_size = world_size
        self._receipts: dict[int, Receipt] = {}
        self.ended: SaveEnded | None = None
        """How the last save of this attempt ended."""

    def begin_attempt(self) -> None:
        """Forget an incomplete set; its files stay behind as a checkpoint that was never committed."""
        self._receipts, self.ended = {}, None

    def has_ended(self, progress: Progress) -> bool:
        return self.ended is not None and self.ended.progress == progress

    def take(self, rank: int, message: Receipt | SaveFailed) -> Manifest | None:
        """One rank's shard, or that there is none; afterwards `ended` may tell of this save.

        Returns:
            The committed manifest, if this was the last shard missing.

        Raises:
            SupersededError: a newer attempt owns the run.
        """
        if isinstance(message, SaveFailed):
            self._end(message.progress, f"rank {rank}: {message.error}")
            return None
        self._receipts[rank] = message
        if len(self._receipts) < self._world_size:
            return None
        try:
            manifest = self._commit(message)
        except SupersededError:
            raise
        except UnbrokenError as error:  # it failed, or nobody knows whether it did
            self._end(message.progress, str(error))
            return None
        self._end(message.progress, None)
        return manifest

    def _end(self, progress: Progress, error: str | None) -> None:
        self._receipts = {}
        self.ended = SaveEnded(progress=progress, error=error)

    def _commit(self, last: Receipt) -> Manifest:
        receipts = [self._receipts[rank] for rank in range(self._world_size)]
        assert {receipt.progress for receipt in receipts} == {last.progress}, "one save is in flight at a time"
        final = last.progress.step == self._spec.num_steps
        info = CommitInfo(
            run_id=self._spec.run_id,
            attempt=last.attempt,
            progress=last.progress,
            reason="final" if final else "interval",
            strategy=self._spec.strategy,
            config_hash=self._spec.config_hash,
            versions=self._spec.versions,
            store={"kind": self._store.backend.kind, "conditional_create": self._store.conditional_create},
            scalars=receipts[0].scalars,
            health=_health(receipts[0].scalars, final),
        )
        return commit(self._store, [receipt.shard for receipt in receipts], info)


def _health(scalars: Mapping[str, Any], final: bool) -> dict[str, Any]:
    """Whether a run may go on from this state: not while steps are bad, for it may have gone wrong before them.

    A run whose last steps were bad, but too few to be a divergence, is finished with what it had before them.
    """
    num_bad = scalars.get("divergence", {}).get("num_bad", 0)
    if num_bad == 0 or final:
        return {"ok": True}
    return {"ok": False, "reason": f"the last {num_bad} steps before it were bad and made no update"}
