"""All that listens to a run in its driver: the screen, and the sinks of the section `tracking`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.store import Store
from orchestrator.config import RunConfig, to_dict
from orchestrator.errors import StorageError
from orchestrator.messages.attempts import Event
from orchestrator.run_spec import RunSpec
from orchestrator.tracking.backfill import fill_journal
from orchestrator.tracking.config import TrackingConfig, local_folder
from orchestrator.tracking.credentials import has_wandb_key
from orchestrator.tracking.journal import OPENED
from orchestrator.tracking.ray_metrics import RayMetrics
from orchestrator.tracking.sinks import Sink
from orchestrator.tracking.tracker import Tracker
from trainers.errors import ConfigError


def check_tracking(config: TrackingConfig) -> None:
    """Raises ConfigError if a sink is asked for that cannot work on this machine."""
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "tracking.tensorboard=true needs tensorboardX, which is not installed; pip install 'unbroken[tensorboard]'"
        )
    if config.wandb and config.wandb.mode == "online" and not has_wandb_key():
        raise ConfigError(
            'tracking.wandb.mode="online" needs a key; set WANDB_API_KEY, run `wandb login`, or use mode: auto'
        )


class FanOut:
    """Passes every event to the screen and to each sink."""

    def __init__(self, show: Callable[[Event], None]) -> None:
        self._show = show
        self._sinks: list[Sink] = []

    def open(self, config: RunConfig, spec: RunSpec) -> None:
        """Start the sinks; they are told what is taken from now on. Ray must be connected."""
        if config.tracking.prometheus:
            self._sinks.append(RayMetrics(config.run.name, config.train.global_batch_size))
        if config.tracking.wants_process:
            folder = local_folder(config.tracking, spec.run_url, spec.run_id)
            opened = introduction(config, spec)
            try:
                self._remember(folder, opened, spec)
                self._sinks.append(Tracker(opened, folder, self._say))
            except (OSError, subprocess.SubprocessError) as error:
                self._say(f"tracking: cannot start in {folder} ({error}); the run goes on without W&B and TensorBoard")

    def take(self, event: Event) -> None:
        self._show(event)
        for sink in self._sinks:
            sink.take(event)

    def close(self) -> None:
        """Wait, but not for ever, until what was taken is where it belongs."""
        for sink in self._sinks:
            sink.close()

    def _remember(self, folder: Path, opened: Event, spec: RunSpec) -> None:
        try:
            if count := fill_journal(folder, opened, Store.open(spec.run_url), spec.session):
                self._say(f"tracking: the run is new on this machine; took {count} events from its record")
        except StorageError as error:
            self._say(f"tracking: cannot read the run's record ({error}); steps of before may be missing")

    def _say(self, line: str) -> None:
        self._show(Event(kind="tracking", fields={"message": line}, time_s=time.time()))


def introduction(config: RunConfig, spec: RunSpec) -> Event:
    """What the sinks of a run are told about it. It ends up in W&B and in files: no secret may be in it."""
    command = ["unbroken", "tracking", "sync", spec.run_url]
    command += ["--dir", config.tracking.dir] if config.tracking.dir else []
    fields = {
        "run_id": spec.run_id,
        "run_url": spec.run_url,
        "config": to_dict(config),
        "tracking": dataclasses.asdict(config.tracking),
        "code": {"unbroken": importlib.metadata.version("unbroken"), **_git_state(), **spec.versions},
        "sync_command": shlex.join(command),
    }
    return Event(kind=OPENED, fields=fields, time_s=time.time())


def _git_state() -> dict[str, Any]:
    """Commit of the working folder, and whether it has changes; empty where there is no repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"git_commit": commit, "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
