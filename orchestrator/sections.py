"""The sections of a config that say how a run is kept alive; none of them decides a number."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from orchestrator.checkpoint.policy import RetentionConfig
from trainers.errors import ConfigError

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
            raise ConfigError(
                f"name={json.dumps(self.name)} is no safe folder name; start with a letter or digit and use only"
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
class CheckpointConfig:
    """When the state is saved, and for how long."""

    every_steps: int = 1000
    """A checkpoint after every so many steps, and one at the end, >= 1."""
    keep: RetentionConfig = field(default_factory=RetentionConfig)

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"every_steps={self.every_steps} must be at least 1")
        if self.keep.every_steps is not None and self.keep.every_steps % self.every_steps:
            raise ConfigError(
                f"keep.every_steps={self.keep.every_steps} is not a multiple of every_steps={self.every_steps}:"
                " most of these steps have no checkpoint; set a multiple"
            )
