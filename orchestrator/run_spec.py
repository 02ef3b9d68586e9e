"""What coordinator and agents know of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.coordination.failures import FailureConfig
from orchestrator.coordination.watchdog import WatchdogConfig
from orchestrator.sections import CheckpointConfig


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Made by the driver, sent to every agent."""

    run_id: str
    run_url: str
    session: str
    """One life of the driver; crash loops are counted within it."""
    config: Mapping[str, Any]
    """The `TrainerConfig` as plain values."""
    config_hash: str
    strategy: str
    checkpoint: CheckpointConfig
    num_steps: int
    versions: Mapping[str, str]
    """Of the libraries that decide numbers; recorded in every manifest."""
    preload: tuple[str, ...]
    """What the fork server imports before the first trainer."""
    attempts_before: int = 0
    """The newest attempt when this life began: its own are later ones."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    failures: FailureConfig = field(default_factory=FailureConfig)
    rollback_steps: int = 0
    """`RunConfig.rollback_steps`."""
    quarantine: bool = False
    """`data.quarantine` of the config."""
