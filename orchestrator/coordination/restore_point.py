"""Which checkpoint an attempt starts from, and what happens to one that turns out to be damaged."""

from __future__ import annotations

from collections.abc import Callable, Collection

from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState, quarantine, take_over
from orchestrator.checkpoint.reader import verify
from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError
from trainers.exclusions import Exclusions

Report = Callable[[CheckpointInfo, str], None]
Distrusted = tuple[int, int]
"""(step, attempt): what attempts up to this one have made from this step on may be corrupted."""


def newest_sound(
    store: Store, attempt: int, report: Report, exclusions: Exclusions, distrusted: Collection[Distrusted] = ()
) -> CheckpointInfo | None:
    """The newest stable checkpoint. Newer ones that are damaged, or of a course that was undone, are quarantined.

    To be called after `attempt` was claimed: from then on an older attempt can commit nothing newer than what this
    finds.

    Args:
        report: told what is quarantined, and why.
        exclusions: what the run leaves out by now.
        distrusted: what else was undone.
    """
    for info in take_over(store, attempt):
        reason = info.detail if info.state is CheckpointState.DAMAGED else None
        if info.state is CheckpointState.STABLE:
            reason = undone(info, exclusions, distrusted)
            if reason is None:
                return info
        if reason is not None:
            quarantine(store, info.ref, reason, attempt)
            report(info, reason)
    return None


def undone(info: CheckpointInfo, exclusions: Exclusions, distrusted: Collection[Distrusted] = ()) -> str | None:
    """Why a checkpoint belongs to a course that a rollback has undone; None: it does not."""
    assert info.manifest is not None
    known = info.manifest.scalars.get("exclusions", {}).get("steps", [])
    for first, last in exclusions.steps:
        if info.step >= first and [first, last] not in known:
            return f"training diverged in step {last}; what it learned from step {first} on is undone"
    for since, until in distrusted:
        if info.step >= since and info.ref.attempt <= until:
            return undone_since(since)
    return None


def undone_since(since: int) -> str:
    """Why what was made from this step on is not gone on from, where corruption was found."""
    return f"a processor was found to be faulty; what was made from step {since} on may be wrong"


def set_aside(store: Store, checkpoint: CheckpointInfo, seen: str, attempt: int, report: Report) -> None:
    """Quarantine a checkpoint that a trainer could not load.

    Args:
        seen: what that trainer says; the reason, unless a full check of the checkpoint names the damage better.
    """
    try:
        reason = next(iter(verify(store, checkpoint.ref)), seen)
    except UnbrokenError:
        reason = seen
    quarantine(store, checkpoint.ref, reason, attempt)
    report(checkpoint, reason)
