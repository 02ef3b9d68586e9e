"""What is kept of a run's checkpoints, and why: a pure function of what is there.

It holds whatever the configuration says that
- the newest stable checkpoint stays, and nothing goes before enough newer ones are stable;
- so does the newest one that a rollback could go back to, however many were saved since, and the one that follows it;
- what the newest attempt is writing is left alone;
- a damaged, unhealthy or quarantined checkpoint never counts as one of the newest, and is itself evidence: it stays as
  long as a stable one of its age would.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState
from orchestrator.checkpoint.keys import MANIFEST_NAME, CheckpointRef
from trainers.errors import ConfigError

Verify = Literal["full", "sample", "size"]
"""What is read back from storage before a checkpoint counts."""


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """Checkpoints that stay because a number was best at their step."""

    metric: str = "loss"
    """Which of the step's numbers: loss or grad_norm, which vary much from batch to batch; or of a validation:
    validation/loss, or validation/loss/ema/PROFILE."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""
    num: int = 1
    """How many stay, >= 1."""

    def __post_init__(self) -> None:
        if self.metric not in ("loss", "grad_norm") and not self.metric.startswith("validation/"):
            raise ConfigError(f"metric={self.metric!r} is no number of a step; give loss, grad_norm or validation/loss")
        if self.num < 1:
            raise ConfigError(f"num={self.num} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """Which checkpoints are kept; pinned ones always are."""

    last: int | None = 10
    """Number of newest stable checkpoints, >= 1; null keeps all."""
    every_steps: int | None = None
    """Checkpoints of steps that are a multiple of this are kept for good, >= 1; null: none."""
    best: BestConfig | None = None
    """The best stable ones by a number of their step are kept too; null: none."""
    grace_s: float = 600.0
    """Seconds that a checkpoint outlives its expiry, for its readers, and an upload its attempt, unfinished, >= 0."""

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


def judge(
    checkpoints: Iterable[CheckpointInfo], config: RetentionConfig, attempt: int, undo_steps: int = 0
) -> list[Verdict]:
    """A verdict on each checkpoint, in the order given.

    Args:
        attempt: the newest one.
        undo_steps: so many steps may be undone yet, of those that the newest stable one holds.
    """
    checkpoints = list(checkpoints)
    stable = _newest_first(checkpoints)
    best = _best(checkpoints, config.best) if config.best else set()
    verdicts = [_keep_best(_judge(info, stable, config, attempt), best, config.best) for info in checkpoints]
    refuges = _refuges(checkpoints, undo_steps) if undo_steps else set()
    return [
        replace(verdict, keep=True, reason="for a rollback")
        if verdict.info.ref in refuges and not verdict.keep
        else verdict
        for verdict in verdicts
    ]


def decisive(checkpoints: Iterable[CheckpointInfo], config: RetentionConfig, undo_steps: int = 0) -> set[CheckpointRef]:
    """Those that stand for others: if one of them were not what it seems, another one might have to stay.

    Of all others it is enough that they were once what they seem: whatever they have become, `judge` removes nothing
    more for it that is not one of themselves.
    """
    checkpoints = list(checkpoints)
    stable = _newest_first(checkpoints)
    found = {*stable[: config.last or 1]}
    found |= _best(checkpoints, config.best) if config.best else set()
    return found | (_refuges(checkpoints, undo_steps) if undo_steps else set())


def _newest_first(checkpoints: Iterable[CheckpointInfo]) -> list[CheckpointRef]:
    """The stable ones."""
    return sorted((info.ref for info in checkpoints if info.state is CheckpointState.STABLE), reverse=True)


def _refuges(checkpoints: Iterable[CheckpointInfo], undo_steps: int) -> set[CheckpointRef]:
    """Where a run goes on if the last steps of the newest stable one are undone: what is older, or the oldest.

    And the one that follows it, which is old enough some time: if all went before they are, none would ever be.
    """
    stable = [info for info in checkpoints if info.state is CheckpointState.STABLE]
    if not stable:
        return set()
    newest = max(stable, key=lambda info: info.ref)
    old_enough = (info.ref for info in stable if info.step <= newest.step - undo_steps)
    refuge = max(old_enough, default=min(info.ref for info in stable))
    return {refuge, min((info.ref for info in stable if info.ref > refuge and not info.expired), default=refuge)}


def _best(checkpoints: Iterable[CheckpointInfo], config: BestConfig) -> set[CheckpointRef]:
    """The best stable ones; of equals, the newer."""
    sign = 1.0 if config.mode == "min" else -1.0
    found = [
        (sign * value, info.ref)
        for info in checkpoints
        if info.state is CheckpointState.STABLE and info.manifest is not None
        if (value := info.manifest.metrics.get(config.metric)) is not None
    ]
    found.sort(key=lambda item: item[1], reverse=True)
    found.sort(key=lambda item: item[0])
    return {ref for _, ref in found[: config.num]}


def _keep_best(verdict: Verdict, best: set[CheckpointRef], config: BestConfig | None) -> Verdict:
    if verdict.keep or config is None or verdict.info.ref not in best:
        return verdict
    return Verdict(info=verdict.info, keep=True, reason=f"best {config.metric}")


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
