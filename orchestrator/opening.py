"""Opening an attempt: may it start, which number does it get, from which checkpoint does it go on?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.checkpoint.attempts import claim_attempt, read_attempts
from orchestrator.checkpoint.catalog import CheckpointInfo, newest_stable
from orchestrator.checkpoint.probe import probe
from orchestrator.checkpoint.retention import claim_fields
from orchestrator.checkpoint.store import Store
from orchestrator.errors import GaveUpError
from orchestrator.restore_point import newest_sound
from orchestrator.run_spec import RunSpec
from trainers.exclusions import Exclusions
from trainers.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Opening:
    """An attempt that owns the run."""

    attempt: int
    checkpoint: CheckpointInfo | None = None
    """Where it begins; None: at step 0."""

    @property
    def progress(self) -> Progress:
        """Where it begins."""
        return self.checkpoint.manifest.progress if self.checkpoint and self.checkpoint.manifest else Progress()

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

    def open(self, cause: str, exclusions: Exclusions) -> Opening:
        """Claim the next attempt and choose its restore point; damaged checkpoints on the way are quarantined.

        Args:
            exclusions: what the run leaves out since a divergence; checkpoints that do not know of it are quarantined.

        Raises:
            GaveUpError: groups of agents have died one after the other without a newer checkpoint.
            UnbrokenError: storage does not do it.
        """
        if not self._probed:
            facts, self._probed = probe(self._store), True
            self._event("store", kind=facts.kind, conditional_create=facts.conditional_create, warning=facts.warning)
        seen = _name(newest_stable(self._store))
        if cause == "start":
            self._check_progress_since(seen)
        info = {"session": self._spec.session, "cause": cause, "from": seen, "world_size": self._world_size}
        attempt = claim_attempt(self._store, info | claim_fields(self._spec.keep))
        checkpoint = newest_sound(self._store, attempt, self.report_quarantine, exclusions)
        return Opening(attempt=attempt, checkpoint=checkpoint)

    def report_quarantine(self, checkpoint: CheckpointInfo, reason: str) -> None:
        self._event("quarantined", checkpoint=str(checkpoint.ref), reason=reason)

    def _check_progress_since(self, newest: str | None) -> None:
        """Groups of agents that die one after the other leave nothing in memory; count them in storage."""
        stalled = 0
        for record in reversed(read_attempts(self._store)):
            if record.get("session") != self._spec.session or record.get("from") != newest:
                break
            stalled += 1
        if stalled >= (budget := self._spec.failures.agents):
            raise GaveUpError(
                f"{stalled} groups of agents in a row made no newer checkpoint than {newest} (failures.agents={budget})"
            )


def _name(checkpoint: CheckpointInfo | None) -> str | None:
    return str(checkpoint.ref) if checkpoint else None
