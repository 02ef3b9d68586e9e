"""The sections of a config that say how a run is kept alive; none of them decides a number."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator.checkpoint.policy import RetentionConfig, Verify
from trainers.errors import ConfigError

PEER_URL = "peer://"
TierName = Literal["peer", "storage"]

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What the run is called."""

    name: str
    """Folder of the run inside `storage`: letters, digits, `.`, `_`, `-`, at most 100. The same name continues it."""
    grace_s: float = 25.0
    """Seconds from SIGTERM or Ctrl-C to the end, > 0: what the last save may take. Less than your scheduler grants."""

    def __post_init__(self) -> None:
        if not SAFE_NAME.fullmatch(self.name):
            shown = json.dumps(self.name, ensure_ascii=False)
            raise ConfigError(
                f"name={shown} is no safe folder name; start with a letter or digit and use only"
                " letters, digits, '.', '_' and '-', at most 100"
            )
        if not self.grace_s > 0:
            raise ConfigError(f"grace_s={self.grace_s:g} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """A range of workers: the run takes what the cluster has."""

    min: int
    """Fewest workers to run with, >= 1."""
    max: int
    """Most workers to run with, >= min."""

    def __post_init__(self) -> None:
        if self.min < 1:
            raise ConfigError(f"min={self.min} must be at least 1")
        if self.max < self.min:
            raise ConfigError(f"max={self.max} is below min={self.min}; set max to at least {self.min}")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker asks Ray for."""

    cpu: float = 1.0
    """CPUs a worker, >= 0."""
    gpu: float = 0.0
    """GPUs a worker, 0 <= gpu <= 1: a worker drives one device."""

    def __post_init__(self) -> None:
        if self.cpu < 0:
            raise ConfigError(f"cpu={self.cpu:g} must be at least 0")
        if not 0 <= self.gpu <= 1:
            raise ConfigError(f"gpu={self.gpu:g} must be between 0 and 1; for more GPUs raise workers")


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One place for checkpoints."""

    url: str
    """peer:// for the memory of the nodes, else a folder or URL, which takes the place of `storage`."""
    every: int
    """A checkpoint there after every so many steps, >= 1."""
    keep: int
    """Number of newest checkpoints that stay there, >= 1."""

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and for how long."""

    every_steps: int | Literal["auto"] = 1000
    """A checkpoint after every so many steps, >= 1, and one at the end. auto: as often as what saves and failures cost
    makes best, measured in the run; and at the multiples of keep.every_steps."""
    when_busy: Literal["wait", "skip"] = "wait"
    """When a save is due and the one before still runs: training waits, or this one is left out on all workers."""
    deadline_s: float = 600.0
    """Seconds in which a failed write, or commit, is repeated; then training goes on without this checkpoint, >= 0. A
    restart waits so long for storage too, a minute at least."""
    max_lag_steps: int | None = None
    """Steps without a committed checkpoint; then training waits for one, and stops if that fails. Null: no limit."""
    verify: Verify = "full"
    """Read back before a checkpoint counts: every byte, 1 % at random, or sizes. Loading checks all in any case."""
    keep: RetentionConfig = field(default_factory=RetentionConfig)
    tiers: tuple[Tier, ...] = ()
    """Instead of storage, every_steps and keep.last: one tier peer:// and one on storage; empty: only storage."""

    def __post_init__(self) -> None:
        if self.every_steps != "auto" and self.every_steps < 1:
            raise ConfigError(f"every_steps={self.every_steps} must be at least 1, or auto")
        if not 0 <= self.deadline_s < float("inf"):
            raise ConfigError(f"deadline_s={self.deadline_s:g} must be at least 0 and finite")
        self._check_tiers()
        every = self.interval_steps
        if self.max_lag_steps is not None and self.max_lag_steps < 2 * every:
            raise ConfigError(
                f"max_lag_steps={self.max_lag_steps} is less than two intervals: every save would be waited for; set"
                f" at least {2 * every}, or null for no limit"
            )
        if self.keep.every_steps is not None and self.keep.every_steps % every:
            raise ConfigError(
                f"keep.every_steps={self.keep.every_steps} is not a multiple of every_steps={every}:"
                " most of these steps have no checkpoint; set a multiple"
            )

    def _check_tiers(self) -> None:
        if not self.tiers:
            return
        names = ", ".join(tier.url for tier in self.tiers)
        if [tier.url == PEER_URL for tier in self.tiers].count(False) != 1 or len(self.tiers) > 2:
            raise ConfigError(
                f"tiers={names}: give at most one {PEER_URL}, and exactly one tier that outlives the nodes"
            )
        if self.every_steps != 1000 or self.keep.last != RetentionConfig().last:
            raise ConfigError(
                f"every_steps={self.every_steps} and keep.last={self.keep.last} are given by the tiers ({names});"
                " remove them here"
            )
        if self.peer is not None and self.peer.every >= self.interval_steps:
            raise ConfigError(
                f"tiers: {PEER_URL} has every={self.peer.every}, which is not more often than"
                f" every={self.interval_steps} of the other tier; set less"
            )

    @property
    def peer(self) -> Tier | None:
        """The tier in the memory of the nodes."""
        return next((tier for tier in self.tiers if tier.url == PEER_URL), None)

    @property
    def storage(self) -> Tier | None:
        """The tier that outlives the nodes, if tiers are given."""
        return next((tier for tier in self.tiers if tier.url != PEER_URL), None)

    @property
    def automatic(self) -> bool:
        """Whether the interval is found out while the run runs."""
        return self.every_steps == "auto"

    @property
    def interval_steps(self) -> int:
        """Steps between two checkpoints in storage; the fewest there can be, if that is automatic."""
        every = 1 if self.every_steps == "auto" else self.every_steps
        return self.storage.every if self.storage else every

    @property
    def retention(self) -> RetentionConfig:
        """Of the checkpoints in storage."""
        return replace(self.keep, last=self.storage.keep) if self.storage else self.keep

    def tiers_due(self, step: int, num_steps: int) -> tuple[TierName, ...]:
        """Where the state of `step` is saved whatever is found out, nearest first; nowhere for most steps."""
        peer = self.peer is not None and step % self.peer.every == 0 and step != num_steps
        every = self.keep.every_steps if self.automatic else self.interval_steps
        storage = (every is not None and step % every == 0) or step == num_steps
        return (*(("peer",) if peer else ()), *(("storage",) if storage else ()))
