"""`unbroken tracking sync`."""

from __future__ import annotations

import click

from orchestrator.commands.json_output import JSON, print_json


@click.group()
def tracking() -> None:
    """What a run told W&B."""


@tracking.command()
@click.argument("run")
@click.option("--dir", "folder", help="tracking.dir of the run, if it was set after its first start.")
@JSON
def sync(run: str, folder: str | None, as_json: bool) -> None:
    """Upload to W&B what it does not have yet of RUN.

    For a run that was tracked without network or key, or whose machine died in the middle. It has to run on the machine
    of the driver, where the journal is. Steps that W&B has are left alone, so it does no harm to do it twice.
    """
    from pathlib import Path

    from orchestrator.checkpoint import run_record
    from orchestrator.checkpoint.store import Store
    from orchestrator.run_identity import config_of
    from orchestrator.tracking.config import local_folder
    from orchestrator.tracking.credentials import has_wandb_key
    from orchestrator.tracking.journal import NAME
    from trainers.errors import ConfigError

    store = Store.reach(run)
    record = run_record.load(store)
    where = Path(folder) if folder else local_folder(config_of(store).tracking, store.url, record.run_id)
    if not (where / NAME).exists():
        raise ConfigError(f"{where / NAME} does not exist; give --dir, on the machine where the driver ran")
    if not has_wandb_key():
        raise ConfigError("W&B needs a key; set WANDB_API_KEY or run `wandb login`")

    from orchestrator.tracking.wandb_sync import sync as upload

    url, steps = upload(where, lambda line: click.echo(line, err=as_json))
    if as_json:
        return print_json({"url": url, "num_steps": steps})
    click.echo(f"{steps} steps uploaded: {url}")
