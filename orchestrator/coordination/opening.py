"""Opening an attempt: may it start, which number does it get, from which checkpoint does it go on?"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from orchestrator.checkpoint.attempts import claim_attempt, read_attempts
from orchestrator.checkpoint.catalog import (
    CheckpointInfo,
    CheckpointState,
    newest_stable,
    quarantine,
    scan_checkpoints,
    take_over,
)
from orchestrator.checkpoint.keys import CHECKPOINTS, QUARANTINE_NAME, CheckpointRef, attempt_key
from orchestrator.checkpoint.probe import probe
from orchestrator.checkpoint.records import encode
from orchestrator.checkpoint.retention import claim_fields
from orchestrator.coordination.restore_point import Distrusted, newest_sound, set_aside, undone, undone_since
from orchestrator.errors import GaveUpError, UnbrokenError
from orchestrator.messages.attempts import Launch
from orchestrator.run_spec import RunSpec
from orchestrator.sections import TierName
from orchestrator.stores import Stores
from trainers.exclusions import Exclusions
from trainers.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """A snapshot that every agent of this group holds in its buffer, whole."""

    progress: Progress
    committed: Progress
    """As of the `Opening` that this group began with, or newer."""
    checkpoint: str | None
    """Name of the newest checkpoint that this group committed in storage, or began from."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """An attempt that owns the run."""

    attempt: int
    checkpoint: CheckpointInfo | None = None
    """Where it begins, unless in `memory`; None: at step 0."""
    tier: TierName = "storage"
    """Where that checkpoint is."""
    memory: Progress | None = None
    """Begin from the snapshot of this progress in the agents' buffers."""
    committed: Progress = field(default_factory=Progress)
    """Of the newest checkpoint committed in storage. Where it begins near, that is looked up only for
    `checkpoint.max_lag_steps`."""

    @property
    def progress(self) -> Progress:
        """Where it begins."""
        return self.memory or (self.checkpoint.progress if self.checkpoint else Progress())

    @property
    def restore(self) -> str | None:
        """Name of the checkpoint."""
        return _name(self.checkpoint)

    @property
    def facts(self) -> dict[str, Any]:
        """What is reported of it."""
        memory = self.memory and self.memory.step
        return {"attempt": self.attempt, "restore": self.restore, "tier": self.tier, "memory": memory}

    def launch(self, exclusions: Exclusions, every_steps: int | None) -> Launch:
        """The order to begin there."""
        return Launch(
            attempt=self.attempt,
            restore=self.restore,
            tier=self.tier,
            memory=self.memory,
            committed=self.committed,
            exclusions=exclusions,
            every_steps=every_steps,
        )


class Opener:
    """Opens one attempt after the other."""

    def __init__(self, spec: RunSpec, stores: Stores, world_size: int, event: Callable[..., None]) -> None:
        """Args: event: reports; called with the event's kind and its fields."""
        self._spec = spec
        self._stores = stores
        self._store = stores.storage
        self._peer = stores.peer
        self._world_size = world_size
        self._event = event
        self._group = uuid.uuid4().hex
        self._probed = False
        self._distrusted: list[Distrusted] = []
        self.claimed = 0
        """The newest attempt of this group."""

    def open(self, cause: str, exclusions: Exclusions, remembered: Remembered | None = None) -> Opening:
        """Claim the next attempt and choose where it begins; damaged checkpoints on the way are quarantined.

        A snapshot in the agents' memory may be newer than every committed checkpoint. To begin from it is right only if
        nobody can have gone on from an older one, or there would be two pasts. Attempts tell:

        - Whoever goes on with a run claims an attempt first, with a number that nobody else gets. This claim's number
          follows that of the group's last attempt, so nobody claimed one in between; and who claims after us finds what
          we commit, or supersedes us, which our next commit or claim notices.
        - An attempt that begins from memory keeps the snapshot, so the rule holds for the next one by induction; one
          that begins from storage has the agents forget theirs, as its past is another.
        - Whatever older attempts are still about to commit is not newer than the snapshot: a save is in flight only up
          to the snapshot, and it has the same bits. If storage lists anything newer, somebody else made it, and
          storage decides.

        Whether the memory still holds what was put there is checked by hashes when it is read, and by the fingerprints
        of the whole state. Of storage, only names are read.

        Args:
            exclusions: what the run leaves out since a divergence; checkpoints that do not know of it are quarantined.
            remembered: what lies in the agents' memory, if it may be used.

        Raises:
            SupersededError: somebody else has gone on with the run since this group, or its driver, began. Only a new
                driver takes a run over: two that took it from each other would both come to nothing.
            GaveUpError: groups of agents have died one after the other without a newer checkpoint.
            UnbrokenError: storage does not do it.
        """
        self._probe()
        seen = remembered.checkpoint if remembered else _name(self._newest_in_memory() or newest_stable(self._store))
        if cause == "start":
            self._check_progress_since(seen)
        info = {"session": self._spec.session, "cause": cause, "from": seen, "world_size": self._world_size}
        info |= {"conditional_create": self._store.conditional_create, "versions": dict(self._spec.versions)}
        info["group"] = self._group
        info |= claim_fields(self._spec.checkpoint.retention, self._spec.rollback_steps)
        # Kept if what follows fails: the next call claims a number that follows this one.
        self.claimed = attempt = self._claim(info)
        self._tell_peers(attempt, info)
        if remembered and not self._lists_newer(remembered.progress):
            return Opening(attempt=attempt, memory=remembered.progress, committed=remembered.committed)
        return self._from_checkpoint(attempt, exclusions)

    def _claim(self, info: Mapping[str, Any]) -> int:
        """The next attempt: after this group's own last one, or after that of its driver, if they have claimed any."""
        if self.claimed:  # another group of the same driver has other snapshots
            return claim_attempt(self._store, info, self.claimed, lambda claim: claim.get("group") == self._group)
        session = self._spec.session
        claims = self._records_in_memory() or read_attempts(self._store, after=self._spec.attempts_before)
        last = next((claim["attempt"] for claim in claims if claim.get("session") == session), None)
        # One that is damaged does not say whose it is; that must keep no run from going on.
        return claim_attempt(self._store, info, last, lambda claim: claim.get("session", session) == session)

    def _from_checkpoint(self, attempt: int, exclusions: Exclusions) -> Opening:
        """Begin from the newest sound checkpoint, near or far."""
        near = self._newest_in_memory(attempt, exclusions)
        near_is_newest = near is not None and not self._lists_newer(near.progress)
        if near_is_newest and self._spec.checkpoint.max_lag_steps is None:
            return Opening(attempt=attempt, checkpoint=near, tier="peer")
        checkpoint = newest_sound(self._store, attempt, self._report_quarantine, exclusions, self._distrusted)
        committed = checkpoint.progress if checkpoint else Progress()
        if near is not None and committed.step <= near.progress.step:
            return Opening(attempt=attempt, checkpoint=near, tier="peer", committed=committed)
        return Opening(attempt=attempt, checkpoint=checkpoint, committed=committed)

    def _probe(self) -> None:
        """Once for each group of agents; what an earlier group found is remembered by the peers."""
        if self._probed:
            return
        known = next((r for r in self._records_in_memory() if "conditional_create" in r), None)
        if known is not None:
            self._store.conditional_create = known["conditional_create"]
        else:
            facts = probe(self._store)
            self._event("store", kind=facts.kind, conditional_create=facts.conditional_create, warning=facts.warning)
        self._probed = True

    def _records_in_memory(self) -> list[dict[str, Any]]:
        """What the attempts of this driver said at their claim, as far as the nodes remember, newest first."""
        try:
            return list(read_attempts(self._peer)) if self._peer is not None else []
        except UnbrokenError:  # no memory is left: there is storage
            return []

    def _newest_in_memory(self, attempt: int = 0, exclusions: Exclusions | None = None) -> CheckpointInfo | None:
        """The newest whole checkpoint in the memory of the nodes; one that lacks what a lost node held counts not.

        Args:
            attempt: 0, or the one that takes over: older ones cannot commit anything newer any more.
            exclusions: as for `open`; those that do not know of it are quarantined there too, as the next group of
                agents finds them again.
        """
        if self._peer is None:
            return None
        try:
            for info in take_over(self._peer, attempt) if attempt else scan_checkpoints(self._peer):
                if info.state is not CheckpointState.STABLE:
                    continue
                reason = undone(info, exclusions, self._distrusted) if exclusions is not None else None
                if reason is None:
                    return info
                quarantine(self._peer, info.ref, reason, attempt)
                self._report_quarantine(info, reason)
        except UnbrokenError as error:  # no memory is left: there is storage
            self._event("peers_lost", error=str(error))
        return None

    def _tell_peers(self, attempt: int, info: Mapping[str, Any]) -> None:
        """The same claim in the memory of the nodes, so that an older attempt commits nothing there either."""
        if self._peer is not None:
            claim = {"attempt": attempt, "token": uuid.uuid4().hex, **info}
            try:
                self._peer.create(attempt_key(attempt), encode(claim))
            except UnbrokenError as error:
                self._event("peers_lost", error=str(error))

    def _lists_newer(self, progress: Progress) -> bool:
        """Whether storage has a folder of a later checkpoint that counts; asked without reading any."""
        refs = [CheckpointRef.parse(name) for name in self._store.list(CHECKPOINTS)]
        newer = [ref for ref in refs if ref is not None and ref.samples_seen > progress.samples_seen]
        # Nobody goes on from one that is quarantined; after a rollback there are some.
        return any(QUARANTINE_NAME not in self._store.list(ref.folder) for ref in newer)

    def distrust(self, since: int, attempt: int, pending: Progress | None) -> None:
        """What attempts up to this one have saved of step `since` and later ones is not gone on from any more.

        It is marked at once, wherever it lies: whoever goes on, after whatever happens next, may know nothing of this.

        Args:
            pending: a snapshot that is on its way. What is committed later must find its mark there.
        """
        self._distrusted.append((since, attempt))
        for store in filter(None, (self._store, self._peer)):
            with suppress(UnbrokenError):  # then the next attempt does it, unless the run ends here
                if pending is not None and self.distrusts(pending):
                    quarantine(store, CheckpointRef(pending.samples_seen, attempt), undone_since(since), attempt)
                newest_sound(store, attempt, self._report_quarantine, Exclusions(), self._distrusted)

    def distrusts(self, progress: Progress) -> bool:
        """Whether what the newest attempt of this group has saved of `progress` may be corrupted."""
        return any(progress.step >= since and self.claimed <= until for since, until in self._distrusted)

    def set_aside(self, opening: Opening, seen: str) -> None:
        """Quarantine the checkpoint, if any, that an attempt could not load: see `restore_point.set_aside`."""
        if opening.checkpoint is not None:
            store = self._stores.of(opening.tier)
            set_aside(store, opening.checkpoint, seen, opening.attempt, self._report_quarantine)

    def _report_quarantine(self, checkpoint: CheckpointInfo, reason: str) -> None:
        self._event("quarantined", checkpoint=str(checkpoint.ref), reason=reason)

    def _check_progress_since(self, newest: str | None) -> None:
        """Groups of agents that die one after the other leave nothing in memory; count them in storage."""
        groups: set[str] = set()  # each may have claimed many attempts, for trainers that died
        for record in self._records_in_memory() or read_attempts(self._store):
            if record.get("session") != self._spec.session or record.get("from") != newest:
                break
            groups.add(record.get("group", ""))
        if len(groups) >= (budget := self._spec.failures.agents):
            raise GaveUpError(
                f"{len(groups)} groups of agents in a row made no newer checkpoint than {newest}"
                f" (failures.agents={budget})"
            )


def _name(checkpoint: CheckpointInfo | None) -> str | None:
    return str(checkpoint.ref) if checkpoint else None
