"""What is kept of a run's checkpoints, and why: a pure function of what is there.

It holds whatever the configuration says that
- the newest stable checkpoint stays, and nothing goes before enough newer ones are stable;
- what the newest attempt is writing is left alone;
- a damaged, unhealthy or quarantined checkpoint never counts as one of the newest, and is itself evidence: it stays as
  long as a stable one of its age would.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState
from orchestrator.checkpoint.keys import MANIFEST_NAME, CheckpointRef
from trainers.errors import ConfigError

Verify = Literal["full", "sample", "size"]
"""What is read back from storage before a checkpoint counts."""


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """Which checkpoints are kept; pinned ones always are."""

    last: int | None = 10
    """Number of newest stable checkpoints, >= 1; null keeps all."""
    every_steps: int | None = None
    """Checkpoints of steps that are a multiple of this are kept for good, >= 1; null: none."""
    grace_s: float = 600.0
    """Seconds that a checkpoint still exists after it was marked as expired, so that its readers can finish, >= 0."""

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ConfigError(f"last={self.last} must be at least 1, or null to keep all")
        if self.every_steps is not None and self.every_steps < 1:
            raise ConfigError(f"every_steps={self.every_steps} must be at least 1, or null for none")
        if not 0 <= self.grace_s < float("inf"):
            raise ConfigError(f"grace_s={self.grace_s:g} must be at least 0 and finite")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to happen with one checkpoint."""

    info: CheckpointInfo
    keep: bool
    reason: str


def judge(checkpoints: Iterable[CheckpointInfo], config: RetentionConfig, attempt: int) -> list[Verdict]:
    """A verdict on each checkpoint, in the order given.

    Args:
        attempt: the newest one.
    """
    checkpoints = list(checkpoints)
    stable = sorted((info.ref for info in checkpoints if info.state is CheckpointState.STABLE), reverse=True)
    return [_judge(info, stable, config, attempt) for info in checkpoints]


def _judge(info: CheckpointInfo, stable: list[CheckpointRef], config: RetentionConfig, attempt: int) -> Verdict:
    match info.state:
        case CheckpointState.WRITING if info.ref.attempt >= attempt:
            return Verdict(info=info, keep=True, reason="being written")
        case CheckpointState.WRITING:
            return Verdict(info=info, keep=False, reason=f"never committed by attempt {info.ref.attempt}")
        case CheckpointState.ABANDONED if info.names == (MANIFEST_NAME,):
            return Verdict(info=info, keep=True, reason="nothing left but the mark")
        case CheckpointState.ABANDONED:
            return Verdict(info=info, keep=False, reason=f"never committed by attempt {info.ref.attempt}")
        case CheckpointState.EXPIRED:
            return Verdict(info=info, keep=False, reason="its removal was interrupted")
    if info.pinned is not None:
        return Verdict(info=info, keep=True, reason=f"pinned: {info.pinned}")
    if info.state is CheckpointState.STABLE:
        if info.ref == stable[0]:
            return Verdict(info=info, keep=True, reason="newest stable")
        if config.every_steps is not None and info.step % config.every_steps == 0:
            return Verdict(info=info, keep=True, reason=f"every {config.every_steps} steps")
    if config.last is None:
        return Verdict(info=info, keep=True, reason="all are kept")
    if len(stable) < config.last or info.ref >= stable[config.last - 1]:
        return Verdict(info=info, keep=True, reason=f"newest {config.last}")
    return Verdict(info=info, keep=False, reason=f"older than the newest {config.last}")
