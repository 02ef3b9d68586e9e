"""The save in flight: the shards of all ranks on their way to becoming a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.writer import CommitInfo
from orchestrator.coordination.cadence import Cadence
from orchestrator.coordination.committing import Chores, CommitEnded, CommitJob
from orchestrator.coordination.opening import Opening, Remembered
from orchestrator.coordination.past import Past
from orchestrator.messages.saves import Paused, Receipt, SaveEnded, SaveFailed, Skipped
from orchestrator.run_spec import RunSpec
from orchestrator.sections import TierName
from orchestrator.stores import Stores
from trainers.progress import Progress


class SaveRound:
    """Takes every rank's word on the save in flight, has it committed when all shards are there, and tells the end."""

    def __init__(
        self,
        spec: RunSpec,
        stores: Stores,
        world_size: int,
        chores: Chores,
        send: Callable[[int, object], None],
        event: Callable[..., None],
        past: Callable[[], Past | None],
    ) -> None:
        """
        Args:
            event: reports; called with the event's kind and its fields.
            past: what was before this group of agents, once that is known.
        """
        self._spec = spec
        self._stores = stores
        self._world_size = world_size
        self._chores = chores
        self._send = send
        self._event = event
        self.then: Callable[[], None] | None = None
        """What is to be done, once, when the save in flight has ended."""
        self._receipts: dict[TierName, dict[int, Receipt]] = {}
        self._over: dict[TierName, Progress] = {}
        self.ended: SaveEnded | None = None
        """How the last save of this attempt ended."""
        self.committed = Progress()
        """Of the newest checkpoint committed in storage."""
        self.checkpoint: str | None = None
        """Name of that, or of the one that this group began from."""
        self._noted: tuple[Progress, Mapping[str, float], str | None] = (Progress(), {}, None)
        self._cadence = Cadence(spec, past, event)
        self._attempt = 0

    def begin_attempt(self, opening: Opening) -> None:
        """Forget an incomplete set; its files stay behind as a checkpoint that was never committed."""
        self._receipts, self._over, self.ended, self._attempt = {}, {}, None, opening.attempt
        self._cadence.begin_attempt(time.monotonic())
        if opening.memory is None:
            self.committed, self.checkpoint = opening.committed, opening.restore

    def remembered(self, held: Progress | None) -> Remembered | None:
        """What the agents hold, if it is a snapshot that all of them have."""
        return held and Remembered(progress=held, committed=self.committed, checkpoint=self.checkpoint)

    @property
    def every_steps(self) -> int | None:
        """Steps from one save to the next, where that is found out: see `Cadence`."""
        return self._cadence.every_steps

    def note(self, progress: Progress, metrics: Mapping[str, float], reason: str | None) -> None:
        """The numbers of a step, for its checkpoint if it gets one.

        Args:
            reason: why it gets one even if none is due; None: it does not.
        """
        self._cadence.stepped(time.monotonic())
        checkpoint = self._spec.checkpoint
        if reason or checkpoint.automatic or checkpoint.tiers_due(progress.step, self._spec.num_steps):
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self._noted = progress, finite, reason

    def join(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Further numbers of the step that was noted, if it was."""
        noted, known, reason = self._noted
        if noted == progress:
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self._noted = progress, {**known, **finite}, reason

    def report(self, message: Skipped | Paused) -> None:
        """What training gave for a save: a pause; or a save, for having none."""
        if isinstance(message, Skipped):
            self._event("save_skipped", step=message.progress.step)
        else:
            self._cadence.paused(message.stall_s, time.monotonic())
            self._event("snapshot", attempt=self._attempt, step=message.progress.step, stall_s=message.stall_s)

    def has_ended(self, progress: Progress, tier: TierName | None = None) -> bool:
        """Whether the save of `progress` is over, in `tier` or in all; steps only grow within an attempt."""
        if self.ended is not None and progress.step <= self.ended.progress.step:
            return True
        return tier in self._over and progress.step <= self._over[tier].step

    def take(self, rank: int, message: Receipt | SaveFailed) -> None:
        """One rank's shard, or that there is none."""
        if self.has_ended(message.progress, message.tier):
            # Another rank's failure has ended this save, maybe before this rank took its snapshot: it has to be told
            # (again), or it waits for ever.
            if self.ended is not None:
                self._send(rank, self.ended)
            return
        if isinstance(message, SaveFailed):
            self._end(message, f"rank {rank}: {message.error}")
            return
        receipts = self._receipts.setdefault(message.tier, {})
        receipts[rank] = message
        if len(receipts) < self._world_size:
            return
        assert {receipt.progress for receipt in receipts.values()} == {message.progress}, "one save at a time"
        shards = [receipts[rank].shard for rank in range(self._world_size)]
        self._chores.commit(CommitJob(shards=shards, info=self._info(message), tier=message.tier, last=message.last))

    def take_commit(self, commit: CommitEnded) -> None:
        """The checkpoint is committed in one tier, or is not to be."""
        progress, tier = commit.progress, commit.tier
        if commit.error is None:
            ref = str(CheckpointRef(progress.samples_seen, commit.attempt))
            if tier == "storage":
                self.committed, self.checkpoint = progress, ref
            facts = {"checkpoint": ref, "bytes": commit.size_bytes, "tier": tier}
            self._event("saved", step=progress.step, attempt=commit.attempt, **facts)
            self._cadence.stored(time.monotonic())
            self._chores.prune(commit.attempt, tier)
        self._end(commit, commit.error)

    def _end(self, result: SaveFailed | CommitEnded, error: str | None) -> None:
        """Report a failure, and tell everybody if the save is over in all its tiers."""
        progress, tier = result.progress, result.tier
        # A tier may be slow: the save may have ended in another one, and the next one may have begun in this one.
        for over, receipts in self._receipts.items():
            if result.last or over == tier:
                self._receipts[over] = {rank: of for rank, of in receipts.items() if of.progress.step > progress.step}
        self._over[tier] = max(progress, self._over.get(tier, progress), key=lambda progress: progress.step)
        if error is not None:
            self._event("save_failed", step=progress.step, tier=tier, error=error)
        if result.last:
            self.ended = SaveEnded(progress=progress, error=error, tier=tier, every_steps=self.every_steps)
            for rank in range(self._world_size):
                self._send(rank, self.ended)
            if self.then is not None:
                then, self.then = self.then, None
                then()

    def _info(self, receipt: Receipt) -> CommitInfo:
        store = self._stores.of(receipt.tier)
        progress, metrics, reason = self._noted
        if progress != receipt.progress:
            metrics, reason = {}, None
        step = receipt.progress.step
        final = step == self._spec.num_steps
        due = final or self._spec.checkpoint.tiers_due(step, self._spec.num_steps)
        return CommitInfo(
            run_id=self._spec.run_id,
            attempt=receipt.attempt,
            progress=receipt.progress,
            reason="final" if final else "interval" if due or reason is None else reason,
            strategy=self._spec.strategy,
            config_hash=self._spec.config_hash,
            versions=self._spec.versions,
            store={"kind": store.backend.kind, "conditional_create": store.conditional_create},
            verify=self._spec.checkpoint.verify,
            metrics=metrics,
            scalars=receipt.scalars,
            health=_health(receipt.scalars, final),
        )


def _health(scalars: Mapping[str, Any], final: bool) -> dict[str, Any]:
    """Whether a run may go on from this state: not while steps are bad, for it may have gone wrong before them.

    A run whose last steps were bad, but too few to be a divergence, is finished with what it had before them.
    """
    num_bad = scalars.get("divergence", {}).get("num_bad", 0)
    if num_bad == 0 or final:
        return {"ok": True}
    return {"ok": False, "reason": f"the last {num_bad} steps before it were bad and made no update"}
