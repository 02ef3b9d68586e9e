"""`unbroken train`."""

from __future__ import annotations

import click


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: str, overrides: tuple[str, ...]) -> None:
    """Train a run, or go on with it.

    CONFIG is a YAML file. The run lives in <storage>/<run.name>. If it exists, it continues from its newest stable
    checkpoint; if it is finished, nothing happens; if it was made with a config that decides other numbers, it is
    refused, and the keys are named. So the same command is right after every interruption.

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
    check_trainable(loaded)

    from orchestrator import driver  # imports ray: only for a config that can run
    from orchestrator.screen import Screen, stdout_writer

    driver.run(loaded, Screen(loaded.train.num_steps, loaded.train.global_batch_size, stdout_writer).show)
