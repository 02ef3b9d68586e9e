"""Section `tracking`: which sinks a run has."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainers.errors import ConfigError

_PROJECT = re.compile(r"[^/\\#?%:]{1,128}")


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """Which checkpoint is the best."""

    metric: str
    """A number of a validation: loss, or loss/ema/PROFILE."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is the best."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. The key comes from WANDB_API_KEY or from `wandb login`, never from here."""

    project: str
    """W&B project, at most 128 characters."""
    entity: str | None = None
    """W&B team or user; null: the one the key belongs to."""
    group: str | None = None
    """Group of runs that this one belongs to."""
    tags: tuple[str, ...] = ()
    """Tags, 1 to 64 characters each."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: offline where there is no key or no network; online: a missing key is an error at the start."""
    artifacts: bool = True
    """Log every checkpoint as a reference artifact `<run.name>-checkpoint`."""
    best: BestConfig | None = None
    """Gives the artifact of the best validated checkpoint the alias `best`; null: none has it."""
    rewind: bool = False
    """After a restart take W&B's history back to the restored step, and log the repeated steps again."""
    init_timeout_s: int = 30
    """Seconds that W&B gets to answer at the start before the run is tracked offline, >= 1."""

    def __post_init__(self) -> None:
        if not _PROJECT.fullmatch(self.project):
            raise ConfigError(f"project={self.project!r} is no W&B project; use 1 to 128 characters without /\\#?%:")
        if bad := [tag for tag in self.tags if not 1 <= len(tag) <= 64]:
            raise ConfigError(f"tags has {bad[0]!r}; a W&B tag has 1 to 64 characters")
        if self.init_timeout_s < 1:
            raise ConfigError(f"init_timeout_s={self.init_timeout_s} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Who is told what happens in a run. None of them can stop it or slow it down."""

    wandb: WandbConfig | None = None
    tensorboard: bool = False
    """Write TensorBoard event files to `<dir>/tensorboard`."""
    jsonl: bool = False
    """Keep every event as a JSON line in `<dir>/events.jsonl`, each step once; W&B and TensorBoard imply it: they are
    fed from that file."""
    prometheus: bool = False
    """Metrics for operators through Ray's Prometheus endpoints; deploy/grafana has the dashboard."""
    dir: str | None = None
    """Local folder for what the sinks write; null: `tracking` in the run's folder if that is local, else a folder of
    the run in the system's temporary one. On another machine it begins with what the run's own record has."""

    def __post_init__(self) -> None:
        if self.dir is not None and (not self.dir or "://" in self.dir):
            raise ConfigError(f"dir={self.dir!r} is no local path; give a folder on the machine of the driver")

    @property
    def wants_process(self) -> bool:
        """Whether a sink needs the tracking process."""
        return bool(self.jsonl or self.tensorboard or (self.wandb and self.wandb.mode != "disabled"))


def local_folder(config: TrackingConfig, run_url: str, run_id: str) -> Path:
    """Where the sinks of a run write on the machine of the driver."""
    if config.dir is not None:
        return Path(config.dir).expanduser().absolute()
    if "://" not in run_url:
        return Path(run_url) / "tracking"
    return Path(tempfile.gettempdir()) / f"unbroken-tracking-{os.getuid()}" / run_id
