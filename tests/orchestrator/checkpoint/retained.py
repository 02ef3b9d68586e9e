"""A run whose old checkpoints are removed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import list_checkpoints
from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.retention import Pruner
from orchestrator.checkpoint.store import Store
from tests.orchestrator.checkpoint.states import make_state, save

GRACE_S = 100.0


class Run:
    """A run with checkpoints of steps 1 to `num`, and a pruner with a clock that is set by hand."""

    def __init__(self, store: Store, num: int, **config) -> None:
        self.store, self.now_s, self.removed = store, 0.0, []
        self.attempt = claim_attempt(store, {})
        self.refs = [save(store, make_state(step), step=step, world_size=2).ref for step in range(1, num + 1)]
        self.pruner = Pruner(store, RetentionConfig(**({"grace_s": GRACE_S} | config)), lambda: self.now_s)

    def prune(self, after_s: float = 0.0) -> float | None:
        self.now_s += after_s
        return self.pruner.prune(self.attempt, self.removed.append)

    @property
    def steps(self) -> list[int]:
        return sorted(info.step for info in list_checkpoints(self.store) if info.state == "stable")

    @property
    def expired(self) -> list[int]:
        return sorted(info.step for info in list_checkpoints(self.store) if info.expired)


def leave_upload(store: Store, folder: str, age_s: float) -> Path:
    """What a writer leaves that is killed, so long ago."""
    path = Path(store.url) / folder / f".{len(folder):032x}.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a part")
    os.utime(path, (time.time() - age_s,) * 2)
    return path
