"""`unbroken config show | validate`."""

from __future__ import annotations

import json

import click


@click.group()
def config() -> None:
    """Look at a config before it runs."""


@config.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of YAML.")
@click.option("--trainers-only", is_flag=True, help="Only what `python -m trainers` reads, as JSON.")
def show(config: str, overrides: tuple[str, ...], as_json: bool, trainers_only: bool) -> None:
    """Print a config in full.

    Overrides are applied, defaults filled in and ${...} resolved.
    """
    from orchestrator.config import load_config, to_dict, to_yaml, trainer_dict

    loaded = load_config(config, overrides)
    if as_json or trainers_only:
        click.echo(json.dumps(trainer_dict(loaded) if trainers_only else to_dict(loaded), indent=2))
    else:
        click.echo(to_yaml(loaded), nl=False)


@config.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Facts as JSON.")
def validate(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a config without starting anything.

    Keys, values, the model's arguments, and whether the model fits the data. Exit code 2 and one line if it cannot run.
    """
    from orchestrator.config import load_config, run_url
    from orchestrator.preflight import check_trainable
    from orchestrator.run_identity import config_hash

    loaded = load_config(config, overrides)
    check_trainable(loaded)
    facts = {
        "run": run_url(loaded),
        "workers": [loaded.min_workers, loaded.max_workers],
        "num_microbatches": loaded.train.num_microbatches,
        "num_steps": loaded.train.num_steps,
        "config_hash": config_hash(loaded),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        click.echo(f"{name:<17} {value}")
