"""`unbroken train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orchestrator.config import RunConfig


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Train a run, or go on with it.

    CONFIG is a YAML file. The run lives in <storage>/<run.name>. If it exists, it continues from its newest stable
    checkpoint; if it is finished, nothing happens; if it was made with a config that decides other numbers, it is
    refused, and the keys are named. So the same command is right after every interruption.

    It uses a Ray of its own on this machine, or with RAY_ADDRESS that cluster. As a job of a cluster:
    `unbroken submit`, or `ray job submit --working-dir . -- unbroken train CONFIG ...`.

    KEY=VALUE replaces one value of the file, in YAML's syntax:

    \b
      unbroken train configs/digits.yaml train.num_steps=500 workers=2
      unbroken train configs/digits.yaml parallel.strategy=ddp 'ema.slow={decay: 0.999}'

    What decides no number may change from attempt to attempt: workers, parallel.strategy, parallel.shard_size,
    resources, checkpoint, failures, data.quarantine, and train.num_steps under a constant learning rate.
    """
    from orchestrator.config import load_config
    from orchestrator.preflight import check_trainable

    loaded = load_config(config, overrides)
    _warn_of_silence(loaded)
    check_trainable(loaded, patient=True)

    train_here(loaded)


def _warn_of_silence(config: RunConfig) -> None:
    """Say early what is waited for: whoever starts a training may be there, or may be a machine, which is patient."""
    from orchestrator.checkpoint.store import Store
    from orchestrator.config import run_url
    from orchestrator.errors import StorageError

    for url in (run_url(config), config.data.path or ""):
        if url.startswith(("s3://", "s3a://")):
            try:
                Store.reach(url)
            except StorageError as error:
                click.echo(f"warning: {error}; waiting for it", err=True)


def train_here(config: RunConfig) -> None:
    """Train in this process, and tell the terminal.

    Raises:
        ConfigError: this process is a job, and must not be for this config.
    """
    from orchestrator.jobs.inside_job import check_job

    for note in check_job(os.environ, Path.cwd(), config):
        click.echo(note, err=True)

    from orchestrator import driver  # imports ray: only for a config that can run
    from orchestrator.interrupts import leave
    from orchestrator.screen import Screen, stdout_writer

    try:
        driver.run(config, Screen(config.train.num_steps, config.train.global_batch_size, stdout_writer).show)
    except SystemExit as error:
        leave(error.code if isinstance(error.code, int) else 1)
