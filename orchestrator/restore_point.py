"""Which checkpoint an attempt starts from, and what happens to one that turns out to be damaged."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState, quarantine, take_over
from orchestrator.checkpoint.reader import verify
from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError

Report = Callable[[CheckpointInfo, str], None]


def newest_sound(store: Store, attempt: int, report: Report) -> CheckpointInfo | None:
    """The newest stable checkpoint. Damaged ones that are newer are quarantined and reported.

    To be called after `attempt` was claimed: from then on an older attempt can commit nothing newer than what this
    finds.
    """
    for info in take_over(store, attempt):
        if info.state is CheckpointState.STABLE:
            return info
        if info.state is CheckpointState.DAMAGED:
            quarantine(store, info.ref, info.detail, attempt)
            report(info, info.detail)
    return None


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
