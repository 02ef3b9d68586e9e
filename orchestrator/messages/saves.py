"""What coordinator, agents and trainers say to each other about saving. Plain values."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.sections import TierName
from trainers.progress import Progress
from trainers.shards import Chunk

# trainer -> agent, and the last two -> coordinator


@dataclass(frozen=True, kw_only=True)
class Overwriting:
    """The trainer begins to write the next snapshot into the agent's buffer; the one before is gone."""


class Chunks(tuple[Chunk, ...]):
    """Where a rank's rows lie. Written down once, however often it is sent: training waits, and there are many."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _chunks, (self._pickled,)

    @cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps(tuple(self))


def _chunks(pickled: bytes) -> Chunks:
    return Chunks(pickle.loads(pickled))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """This rank's rows are in the agent's buffer; the trainer will not touch it until `SaveEnded`."""

    progress: Progress
    chunks: tuple[Chunk, ...]
    size_bytes: int
    scalars: Mapping[str, Any]
    tiers: tuple[TierName, ...] = ("storage",)
    """Where it is to be stored, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Paused:
    """The loop goes on after handing over a snapshot."""

    progress: Progress
    stall_s: float
    """Seconds that it stood still: waiting for saves, and copying."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A save was due and left out, on all ranks, as the one before still runs."""

    progress: Progress


# agent -> trainer


@dataclass(frozen=True, kw_only=True)
class MemorySnapshot:
    """A snapshot that outlived the trainer that took it."""

    snapshot: Snapshot
    chunks: tuple[Any, ...]
    """A `checkpoint.writer.ChunkReceipt` for each chunk: what the buffer must still hold."""
    pending: bool
    """It is not committed, and on its way to storage again."""


# coordinator -> agent -> trainer


@dataclass(frozen=True, kw_only=True)
class SaveEnded:
    """The snapshot of `progress` is committed, or its save failed for the reason in `error`; the buffer is free."""

    progress: Progress
    error: str | None = None
    tier: TierName = "storage"
    """The last one that it was meant for."""
    every_steps: int | None = None
    """Steps from the next save to the one after it; None: the config says it."""

    @property
    def summary(self) -> str:
        return f"step {self.progress.step} {'is' if self.error is None else 'could not be'} saved"


# agent -> coordinator


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """This rank's shard of a checkpoint is stored and verified."""

    attempt: int
    progress: Progress
    tier: TierName = "storage"
    last: bool = True
    """No other tier follows."""
    shard: Any
    """A `checkpoint.writer.ShardReceipt`."""
    scalars: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SaveFailed:
    """This rank's shard could not be stored."""

    attempt: int
    progress: Progress
    tier: TierName = "storage"
    last: bool = True
    """No other tier follows."""
    error: str


@dataclass(frozen=True, kw_only=True)
class SaveDelayed:
    """This rank's shard could not be stored at the first try; it is tried again."""

    attempt: int
    progress: Progress
    error: str
