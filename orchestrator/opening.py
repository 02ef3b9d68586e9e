"""Opening an attempt: may it start, which number does it get, from which checkpoint does it go on?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.checkpoint.attempts import claim_attempt, read_attempts
from orchestrator.checkpoint.catalog import CheckpointInfo, newest_stable
from orchestrator.checkpoint.keys import CHECKPOINTS, CheckpointRef
from orchestrator.checkpoint.probe import probe
from orchestrator.checkpoint.retention import claim_fields
from orchestrator.checkpoint.store import Store
from orchestrator.errors import GaveUpError
from orchestrator.failures import MAX_ATTEMPTS_WITHOUT_PROGRESS
from orchestrator.restore_point import newest_sound
from orchestrator.run_spec import RunSpec
from trainers.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """A snapshot that every agent of this group holds in its buffer, whole."""

    progress: Progress
    committed: Progress
    """Of the newest checkpoint that this group committed or began from."""
    checkpoint: str | None
    """Its name."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """An attempt that owns the run."""

    attempt: int
    checkpoint: CheckpointInfo | None = None
    """Where it begins, unless in `memory`; None: at step 0."""
    memory: Progress | None = None
    """Begin from the snapshot of this progress in the agents' buffers."""
    committed: Progress = field(default_factory=Progress)
    """Of the newest committed checkpoint."""

    @property
    def progress(self) -> Progress:
        """Where it begins."""
        return self.memory or self.committed

    @property
    def restore(self) -> str | None:
        """Name of the checkpoint."""
        return _name(self.checkpoint)


class Opener:
    """Opens one attempt after the other."""

    def __init__(self, spec: RunSpec, store: Store, world_size: int, event: Callable[..., None]) -> None:
        """Args: event: reports; called with the event's kind and its fields."""
        self._spec = spec
        self._store = store
        self._world_size = world_size
        self._event = event
        self._probed = False
        self._claimed = 0
        """The newest attempt of this group."""

    def open(self, cause: str, remembered: Remembered | None = None) -> Opening:
        """Claim the next attempt and choose where it begins; damaged checkpoints on the way are quarantined.

        A snapshot in the agents' memory may be newer than every committed checkpoint. To begin from it is right only if
        nobody can have gone on from an older one, or there would be two pasts. Attempts tell:

        - Whoever goes on with a run claims an attempt first, with a number that nobody else gets. So if this claim's
          number follows the one of the group's last attempt, nobody claimed one in between; and who claims after us
          finds what we commit, or supersedes us, which our next commit notices.
        - An attempt that begins from memory keeps the snapshot, so the rule holds for the next one by induction; one
          that begins from storage has the agents forget theirs, as its past is another.
        - Whatever older attempts are still about to commit is not newer than the snapshot: a save is in flight only up
          to the snapshot, and it has the same bits. If storage lists anything newer, somebody else made it, and
          storage decides.

        Whether the memory still holds what was put there is checked by hashes when it is read, and by the fingerprints
        of the whole state. Of storage, only names are read.

        Args:
            remembered: what lies in the agents' memory, if it may be used.

        Raises:
            GaveUpError: groups of agents have died one after the other without a newer checkpoint.
            UnbrokenError: storage does not do it.
        """
        if not self._probed:
            facts, self._probed = probe(self._store), True
            self._event("store", kind=facts.kind, conditional_create=facts.conditional_create, warning=facts.warning)
        seen = remembered.checkpoint if remembered else _name(newest_stable(self._store))
        if cause == "start":
            self._check_progress_since(seen)
        info = {"session": self._spec.session, "cause": cause, "from": seen, "world_size": self._world_size}
        previous = self._claimed
        self._claimed = attempt = claim_attempt(self._store, info | claim_fields(self._spec.checkpoint.keep))
        if remembered and attempt == previous + 1 and not self._lists_newer(remembered.progress):
            return Opening(attempt=attempt, memory=remembered.progress, committed=remembered.committed)
        checkpoint = newest_sound(self._store, attempt, self.report_quarantine)
        progress = checkpoint.manifest.progress if checkpoint and checkpoint.manifest else Progress()
        return Opening(attempt=attempt, checkpoint=checkpoint, committed=progress)

    def _lists_newer(self, progress: Progress) -> bool:
        refs = [CheckpointRef.parse(name) for name in self._store.list(CHECKPOINTS)]
        return any(ref is not None and ref.samples_seen > progress.samples_seen for ref in refs)

    def report_quarantine(self, checkpoint: CheckpointInfo, reason: str) -> None:
        self._event("quarantined", checkpoint=str(checkpoint.ref), reason=reason)

    def _check_progress_since(self, newest: str | None) -> None:
        """Groups of agents that die one after the other leave nothing in memory; count them in storage."""
        stalled = 0
        for record in reversed(read_attempts(self._store)):
            if record.get("session") != self._spec.session or record.get("from") != newest:
                break
            stalled += 1
        if stalled >= MAX_ATTEMPTS_WITHOUT_PROGRESS:
            raise GaveUpError(f"{stalled} attempts in a row made no newer checkpoint than {newest}")


def _name(checkpoint: CheckpointInfo | None) -> str | None:
    return str(checkpoint.ref) if checkpoint else None
