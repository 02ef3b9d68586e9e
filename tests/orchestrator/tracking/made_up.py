"""Events of made-up runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.messages.attempts import Event
from orchestrator.tracking import wandb_files

RUN_ID = "0123456789ab"


def event(kind: str, /, **fields: Any) -> Event:
    return Event(kind=kind, fields=fields, time_s=time.time())


def opened(folder: Path, *, tensorboard: bool = False, **wandb: Any) -> Event:
    """The introduction of a run in `folder`. Args: wandb: of tracking.wandb; none: no W&B."""
    section = {"project": "p", "entity": None, "group": None, "tags": [], "mode": "offline", "artifacts": True}
    section |= {"best": None, "rewind": False, "init_timeout_s": 10, **wandb}
    return event(
        "opened",
        run_id=RUN_ID,
        run_url=str(folder),
        config={"run": {"name": "story"}, "train": {"global_batch_size": 8}},
        tracking={"wandb": section if wandb else None, "tensorboard": tensorboard},
        code={"git_commit": "c0ffee"},
        sync_command="unbroken tracking sync RUN",
    )


def attempt(number: int, begin: int, end: int, save: int | None = None) -> Iterator[Event]:
    """An attempt that computes the steps begin+1 .. end, with a checkpoint at `save`."""
    cause = "start" if number == 1 else "killed"
    yield event("attempt", attempt=number, restore=None, cause=cause, world_size=2)
    yield event("training", attempt=number, step=begin)
    for step in range(begin + 1, end + 1):
        yield event("step", attempt=number, step=step, metrics={"loss": 1 / step})
        if step == save:
            yield event("saved", step=step, attempt=number, checkpoint=str(CheckpointRef(step * 8, number)), bytes=9)


def records(folder: Path) -> Iterator[Any]:
    """Everything in W&B's offline folders, in the order in which `wandb sync` takes it."""
    for path in reversed(wandb_files.logs(folder / "wandb", RUN_ID)):
        for data in wandb_files.records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows in W&B's offline folders."""
    found = (record.history for record in records(folder) if record.HasField("history"))
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        | {"_step": row.step.num}
        for row in found
    ]
