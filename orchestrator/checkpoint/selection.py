"""Which checkpoint a person means."""

from __future__ import annotations

from orchestrator.checkpoint.catalog import CheckpointInfo, list_checkpoints, newest_stable
from orchestrator.checkpoint.store import Store
from trainers.errors import ConfigError


def select_checkpoint(store: Store, step: int | None) -> CheckpointInfo:
    """The newest stable checkpoint, or the newest intact one of `step`; always with its manifest.

    Raises:
        ConfigError: there is none, or it is about to be removed.
    """
    if step is None:
        newest = newest_stable(store)
        if newest is None:
            raise ConfigError(f"{store.url} has no stable checkpoint; `unbroken checkpoints list` shows what it has")
        return newest
    intact = {}
    for info in reversed(list_checkpoints(store)):  # oldest first: of one step, the newest attempt stays
        if info.manifest is not None:
            intact[info.manifest.progress.step] = info
    if step not in intact:
        has = ", ".join(map(str, intact)) or "none"
        raise ConfigError(f"step={step} has no checkpoint in {store.url}; there are steps {has}")
    if intact[step].expired:
        raise ConfigError(f"step={step} of {store.url} is being removed: it is superfluous; take a newer one")
    return intact[step]
