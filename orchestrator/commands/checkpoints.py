"""`unbroken checkpoints list | inspect | verify | prune | pin | unpin`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands.finite import FiniteRange
from orchestrator.commands.json_output import JSON, print_json

if TYPE_CHECKING:
    from orchestrator.checkpoint.catalog import CheckpointInfo
    from orchestrator.checkpoint.keys import CheckpointRef
    from orchestrator.checkpoint.policy import Verdict
    from orchestrator.checkpoint.retention import Pruner, Removal
    from orchestrator.checkpoint.store import Store

_STEP = click.argument("step", type=click.IntRange(min=0))


@click.group()
def checkpoints() -> None:
    """Look at the checkpoints of a run, keep some, remove others."""


@checkpoints.command("list")
@click.argument("run")
@JSON
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

    KEPT says by which rule of checkpoint.keep, or that and why the next `prune` removes it.
    """
    from orchestrator.checkpoint.catalog import list_checkpoints
    from orchestrator.checkpoint.policy import judge
    from orchestrator.checkpoint.retention import Claimed

    store = _open_run(run)
    claimed = Claimed.of(store)
    verdicts = judge(list_checkpoints(store), claimed.config, claimed.attempt, claimed.undo_steps)
    rows = [_summary(verdict) for verdict in verdicts]
    if as_json:
        print_json(rows)
        return
    for row in ({key: key.upper() for key in _COLUMNS}, *rows):
        line = "  ".join(f"{row[key] if row[key] is not None else '-':<{width}}" for key, width in _COLUMNS.items())
        click.echo(f"{line}  {row.get('detail') or ''}".rstrip())


_COLUMNS = {
    "checkpoint": 18,
    "state": 11,
    "step": 9,
    "workers": 7,
    "strategy": 8,
    "size_mb": 9,
    "created_at": 25,
    "kept": 13,
}


@checkpoints.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step. Default: the newest stable one.")
@JSON
def inspect(run: str, step: int | None, as_json: bool) -> None:
    """Show what a checkpoint consists of.

    Progress, versions, files with their hashes, and every tensor with its fingerprint.
    """
    from orchestrator.checkpoint.selection import select_checkpoint

    info = select_checkpoint(_open_run(run), step)
    manifest = info.manifest
    assert manifest is not None
    if as_json:
        click.echo(manifest.to_bytes().decode(), nl=False)
        return
    for key in ("run_id", "attempt", "reason", "world_size", "strategy", "config_hash", "created_at"):
        click.echo(f"{key:<14} {getattr(manifest, key)}")
    click.echo(f"{'step':<14} {manifest.progress.step} ({manifest.progress.samples_seen} samples)")
    click.echo(f"{'pinned':<14} {'no' if info.pinned is None else info.pinned}")
    click.echo(f"{'versions':<14} {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    for file in manifest.files:
        click.echo(f"{'file':<14} {file.name}  {file.size_bytes} bytes  {file.hash}")
    for name, tensor in manifest.tensors.items():
        click.echo(f"{tensor.fingerprint}  {tensor.dtype:<4} {'x'.join(map(str, tensor.shape)) or '1':<18} {name}")


@checkpoints.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), help="Only the checkpoint of this step.")
@JSON
def verify(run: str, step: int | None, as_json: bool) -> int:
    """Read every byte and compare hashes.

    Exit code 3 if a checkpoint of RUN is not what was written.

    Nothing is changed: a damaged checkpoint is quarantined by the next start of the run, which then takes an older one.
    """
    from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
    from orchestrator.checkpoint.reader import verify as problems_of
    from orchestrator.checkpoint.selection import select_checkpoint
    from orchestrator.commands.progress import bar
    from orchestrator.errors import MissingObjectError

    store = _open_run(run)
    unreadable = (CheckpointState.WRITING, CheckpointState.ABANDONED, CheckpointState.EXPIRED)
    infos = [select_checkpoint(store, step)] if step is not None else list_checkpoints(store)
    results = []
    with bar("reading", sum(map(_size_bytes, infos)), "bytes") as advance:
        for info in infos:
            problems: list[str] = []
            if info.state in unreadable:
                verdict = "not committed"
            elif info.expired:
                verdict = "being removed"  # nobody may begin to read it
            else:
                try:
                    problems = problems_of(store, info.ref, advance)
                    verdict = "damaged" if problems else "intact"
                except MissingObjectError:
                    verdict = "removed meanwhile"
            results.append({"checkpoint": str(info.ref), "verdict": verdict, "problems": problems})
            if not as_json:
                click.echo("  ".join((str(info.ref), verdict, "; ".join(problems))).rstrip())
    if as_json:
        print_json(results)
    return 3 if any(result["problems"] for result in results) else 0


@checkpoints.command()
@click.argument("run")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed, and why.")
@click.option(
    "--last", type=click.IntRange(min=1), help="Keep this many, instead of checkpoint.keep.last; none for a rollback."
)
@click.option(
    "--grace-s",
    type=FiniteRange(0, 86400),
    default=60.0,
    show_default=True,
    help="Seconds that commands which are reading now have left. 0 if nobody reads.",
)
@JSON
def prune(run: str, dry_run: bool, last: int | None, grace_s: float, as_json: bool) -> None:
    """Remove the checkpoints that checkpoint.keep does not keep.

    A run does that by itself after each save. This is for a run that has ended, or to keep fewer than it does. The
    newest stable checkpoint, pinned ones and a save in progress always stay; and, without --last, the newest one that a
    rollback could go back to.
    """
    from dataclasses import replace

    from orchestrator.checkpoint.catalog import list_checkpoints
    from orchestrator.checkpoint.policy import judge
    from orchestrator.checkpoint.retention import Claimed, Pruner, Removal

    store = _open_run(run)
    claimed = Claimed.of(store)
    attempt, config = claimed.attempt, replace(claimed.config, grace_s=grace_s)
    undo_steps = claimed.undo_steps if last is None else 0
    config = config if last is None else replace(config, last=last)
    if dry_run:
        found = [v for v in judge(list_checkpoints(store), config, attempt, undo_steps) if not v.keep]
        removals = [Removal(ref=verdict.info.ref, reason=verdict.reason) for verdict in found]
    else:
        removals = []
        pruner = Pruner(store, config, undo_steps=undo_steps)
        _prune(pruner, attempt, removals, grace_s)
    if as_json:
        rows = [{"checkpoint": str(removal.ref), "reason": removal.reason} for removal in removals]
        print_json({"dry_run": dry_run, "removed": rows})
        return
    for removal in removals:
        click.echo(f"{removal.ref}  {'would be removed' if dry_run else 'removed'}: {removal.reason}")
    if not removals:
        click.echo("nothing to remove")


def _prune(pruner: Pruner, attempt: int, removals: list[Removal], grace_s: float) -> None:
    """Pass after pass, until every checkpoint that is superfluous is gone."""
    from orchestrator.commands.progress import bar

    while True:
        began_s = time.monotonic()
        wait_s = pruner.prune(attempt, removals.append)
        # Not for uploads that somebody has left unfinished: these have a day. Marks may have been set during the pass.
        if not wait_s or wait_s > grace_s + time.monotonic() - began_s:
            return
        with bar("waiting for readers", wait_s, "s") as advance:
            while wait_s > 0:
                time.sleep(nap := min(wait_s, 1.0))
                wait_s -= nap
                advance(nap)


@checkpoints.command()
@click.argument("run")
@_STEP
@click.option("--reason", default="by hand", show_default=True, help="Shown by `list`.")
@JSON
def pin(run: str, step: int, reason: str, as_json: bool) -> None:
    """Keep the checkpoint of STEP whatever checkpoint.keep says."""
    from orchestrator.checkpoint import retention
    from orchestrator.checkpoint.selection import select_checkpoint

    store = _open_run(run)
    info = select_checkpoint(store, step)
    changed = retention.pin(store, info.ref, reason)
    _say_pins([info.ref], "is pinned" if changed else f"was pinned already: {info.pinned}", changed, as_json)


@checkpoints.command()
@click.argument("run")
@_STEP
@JSON
def unpin(run: str, step: int, as_json: bool) -> None:
    """Leave the checkpoint of STEP to checkpoint.keep again."""
    from contextlib import suppress

    from orchestrator.checkpoint import retention
    from orchestrator.checkpoint.catalog import list_checkpoints, load_manifest
    from orchestrator.errors import UnbrokenError

    store = _open_run(run)
    infos = list_checkpoints(store)
    # By the samples that intact ones of this step have seen, so that a damaged one is found too.
    seen = {info.ref.samples_seen for info in infos if info.manifest is not None and info.step == step}
    for info in infos:
        with suppress(UnbrokenError):
            if info.pinned and info.manifest is None and load_manifest(store, info.ref).progress.step == step:
                seen.add(info.ref.samples_seen)
    pinned = [info.ref for info in infos if info.ref.samples_seen in seen and info.pinned]
    for ref in pinned:
        retention.unpin(store, ref)
    _say_pins(pinned, "is no longer pinned", bool(pinned), as_json)
    if not pinned and not as_json:
        click.echo(f"no checkpoint of step {step} was pinned")


def _say_pins(refs: list[CheckpointRef], text: str, changed: bool, as_json: bool) -> None:
    if as_json:
        print_json({"checkpoints": [str(ref) for ref in refs], "changed": changed})
        return
    for ref in refs:
        click.echo(f"{ref} {text}")


def _open_run(run: str) -> Store:
    """The store of a run, after making sure that there is one."""
    from orchestrator.checkpoint import run_record
    from orchestrator.checkpoint.store import Store

    store = Store.reach(run)
    run_record.load(store)
    return store


def _size_bytes(info: CheckpointInfo) -> int:
    return sum(file.size_bytes for file in info.manifest.files) if info.manifest else 0


def _summary(verdict: Verdict) -> dict[str, Any]:
    info = verdict.info
    row = dict.fromkeys(_COLUMNS) | {
        "checkpoint": str(info.ref),
        "state": str(info.state),
        "detail": info.detail,
        "kept": verdict.reason if verdict.keep else f"no: {verdict.reason}",
        "keep": verdict.keep,
        "pinned": info.pinned,
        "expired": info.expired,
    }
    manifest = info.manifest
    if manifest is None:
        return row
    return row | {
        "step": manifest.progress.step,
        "samples_seen": manifest.progress.samples_seen,
        "attempt": manifest.attempt,
        "workers": manifest.world_size,
        "strategy": manifest.strategy,
        "size_mb": round(_size_bytes(info) / 1e6, 1),
        "created_at": manifest.created_at,
    }
