"""`unbroken checkpoints list | inspect | verify`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from orchestrator.checkpoint.catalog import CheckpointInfo
    from orchestrator.checkpoint.store import Store


@click.group()
def checkpoints() -> None:
    """Look at the checkpoints of a run."""


@checkpoints.command("list")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def list_(run: str, as_json: bool) -> None:
    """List all checkpoints, newest first.

    \b
    stable       committed and healthy: the newest of these is where the run goes on
    writing      no manifest: a save in progress, or what a killed one left; never loaded
    abandoned    was being written when a newer attempt took over; can never be committed
    quarantined  found damaged by a reader, and marked; never loaded
    damaged      its manifest is not what was written, or a file is missing; never loaded
    unhealthy    intact, but its state is not one to go on from
    expired      its removal has begun
    """
    from orchestrator.checkpoint.catalog import list_checkpoints

    rows = [_summary(info) for info in list_checkpoints(_open_run(run))]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in ({key: key.upper() for key in _COLUMNS}, *rows):
        line = "  ".join(f"{row[key] if row[key] is not None else '-':<{width}}" for key, width in _COLUMNS.items())
        click.echo(f"{line}  {row.get('detail') or ''}".rstrip())


_COLUMNS = {"checkpoint": 18, "state": 11, "step": 9, "workers": 7, "strategy": 8, "size_mb": 9, "created_at": 25}


@checkpoints.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step. Default: the newest stable one.")
@click.option("--json", "as_json", is_flag=True, help="The manifest itself.")
def inspect(run: str, step: int | None, as_json: bool) -> None:
    """Show what a checkpoint consists of.

    Progress, versions, files with their hashes, and every tensor with its fingerprint.
    """
    from orchestrator.checkpoint.selection import select_checkpoint

    manifest = select_checkpoint(_open_run(run), step).manifest
    assert manifest is not None
    if as_json:
        click.echo(manifest.to_bytes().decode(), nl=False)
        return
    for key in ("run_id", "attempt", "reason", "world_size", "strategy", "config_hash", "created_at"):
        click.echo(f"{key:<14} {getattr(manifest, key)}")
    click.echo(f"{'step':<14} {manifest.progress.step} ({manifest.progress.samples_seen} samples)")
    click.echo(f"{'versions':<14} {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    for file in manifest.files:
        click.echo(f"{'file':<14} {file.name}  {file.size_bytes} bytes  {file.hash}")
    for name, tensor in manifest.tensors.items():
        click.echo(f"{tensor.fingerprint}  {tensor.dtype:<4} {'x'.join(map(str, tensor.shape)) or '1':<18} {name}")


@checkpoints.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), help="Only the checkpoint of this step.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def verify(run: str, step: int | None, as_json: bool) -> int:
    """Read every byte and compare hashes.

    Exit code 3 if a checkpoint of RUN is not what was written.

    Nothing is changed: a damaged checkpoint is quarantined by the next start of the run, which then takes an older one.
    """
    from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
    from orchestrator.checkpoint.reader import verify as problems_of
    from orchestrator.checkpoint.selection import select_checkpoint

    store = _open_run(run)
    results, damaged = [], False
    for info in [select_checkpoint(store, step)] if step is not None else list_checkpoints(store):
        committed = info.state not in (CheckpointState.WRITING, CheckpointState.ABANDONED, CheckpointState.EXPIRED)
        problems = problems_of(store, info.ref) if committed else []
        damaged = damaged or bool(problems)
        verdict = "damaged" if problems else "intact" if committed else "not committed"
        results.append({"checkpoint": str(info.ref), "verdict": verdict, "problems": problems})
        if not as_json:
            click.echo("  ".join((str(info.ref), verdict, "; ".join(problems))).rstrip())
    if as_json:
        click.echo(json.dumps(results, indent=2))
    return 3 if damaged else 0


def _open_run(run: str) -> Store:
    """The store of a run, after making sure that there is one."""
    from orchestrator.checkpoint import run_record
    from orchestrator.checkpoint.store import Store

    store = Store.open(run)
    run_record.load(store)
    return store


def _summary(info: CheckpointInfo) -> dict[str, Any]:
    row = dict.fromkeys(_COLUMNS) | {"checkpoint": str(info.ref), "state": str(info.state), "detail": info.detail}
    manifest = info.manifest
    if manifest is None:
        return row
    return row | {
        "step": manifest.progress.step,
        "samples_seen": manifest.progress.samples_seen,
        "attempt": manifest.attempt,
        "workers": manifest.world_size,
        "strategy": manifest.strategy,
        "size_mb": round(sum(file.size_bytes for file in manifest.files) / 1e6, 1),
        "created_at": manifest.created_at,
    }
