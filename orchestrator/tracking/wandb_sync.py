"""Brings W&B up to what the journal has, after the fact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import UnbrokenError
from orchestrator.tracking.journal import NAME, exclusive, follow, last_opened
from orchestrator.tracking.process import WANDB_LOCK
from orchestrator.tracking.wandb_sink import WandbError, WandbSink, hide_replaced_logs
from trainers.errors import ConfigError


def sync(folder: Path, say: Callable[[str], None]) -> tuple[str | None, int]:
    """Upload what the server lacks; the run's address, and the number of steps that were uploaded.

    Raises:
        ConfigError: the run was not tracked by W&B.
        UnbrokenError: W&B cannot be reached.
    """
    path = folder / NAME
    opened = last_opened(path)
    if opened is None or not opened.fields["tracking"]["wandb"]:
        raise ConfigError(f"{path} is of a run without tracking.wandb; nothing is to be uploaded")
    end = path.stat().st_size
    with exclusive(folder / WANDB_LOCK):
        try:
            sink = WandbSink(opened, folder, "online", say)
            for event, _ in follow(path, lambda: end):
                sink.take(event)
            sink.close()
        except WandbError as error:
            raise UnbrokenError(f"W&B: {' '.join(str(error).split())}; try again later") from error
        hide_replaced_logs(folder, opened.fields["run_id"])
    return sink.url, sink.num_logged
