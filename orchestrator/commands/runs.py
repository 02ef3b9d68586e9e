"""`unbroken runs list`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import click

from orchestrator.commands.json_output import JSON, print_json


@click.group()
def runs() -> None:
    """Look at all runs of a storage."""


@runs.command("list")
@click.argument("storage", default="runs")
@JSON
def list_(storage: str, as_json: bool) -> None:
    """List the runs in STORAGE: a folder (default: runs) or a URL.

    \b
      unbroken runs list
      unbroken runs list s3://bucket/runs --json

    STABLE is the step that a run would go on from, LAST SIGN the time of the newest event in its record. All of a run:
    `unbroken status RUN`.
    """
    from orchestrator.checkpoint.keys import RUN_RECORD
    from orchestrator.checkpoint.store import Store
    from orchestrator.tracking.glance import glance_at_runs

    found = list(glance_at_runs(storage))
    if as_json:
        print_json([asdict(one) for one in found])
        return
    store = Store.open(storage)
    if not found:
        is_run = store.exists(RUN_RECORD)
        click.echo(f"{store.url} is a run itself: unbroken status {storage}" if is_run else f"no run in {store.url}")
        return
    rows = [("RUN", "STATE", "STEP", "STABLE", "LAST SIGN", "")]
    for one in found:
        sign = datetime.fromtimestamp(one.since_s, UTC).isoformat(timespec="seconds") if one.since_s else "-"
        stable = "-" if one.newest_stable_step is None else str(one.newest_stable_step)
        name = one.url.rpartition("/")[2]
        rows.append((name, one.state, f"{one.step} of {one.num_steps}", stable, sign, one.why))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        click.echo("  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5])).rstrip())
