"""`unbroken config show | validate | explain`."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from orchestrator.commands.json_output import JSON, print_json
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.config import RunConfig


@click.group()
def config() -> None:
    """Look at a config before it runs."""


@config.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@JSON
@click.option("--trainers-only", is_flag=True, help="Only what `python -m trainers` reads, as JSON.")
@click.option("--memory", is_flag=True, help="Instead, the memory that each worker will take, estimated.")
def show(config: str, overrides: tuple[str, ...], as_json: bool, trainers_only: bool, memory: bool) -> None:
    """Print a config in full.

    Overrides are applied, defaults filled in and ${...} resolved.
    """
    from orchestrator.config import load_config, to_dict, to_yaml, trainer_dict

    loaded = load_config(config, overrides)
    if memory:
        return _show_memory(loaded, as_json)
    if as_json or trainers_only:
        print_json(trainer_dict(loaded) if trainers_only else to_dict(loaded))
    else:
        click.echo(to_yaml(loaded), nl=False)


def _show_memory(loaded: RunConfig, as_json: bool) -> None:
    from orchestrator.data.files import data_files
    from trainers.data.sources import open_source
    from trainers.memory import rank_memory

    source = open_source(loaded.data, data_files)
    found = {}
    for workers in sorted({loaded.min_workers, loaded.max_workers}):
        memory = rank_memory(loaded, source, workers)
        found[str(workers)] = {**asdict(memory), "total": memory.total}
    if as_json:
        print_json(found)
        return
    for workers, sizes in found.items():
        click.echo(f"each of {workers} workers, MiB")
        for name, size in sizes.items():
            click.echo(f"  {name:<12} {'unknown' if size is None else f'{size / 2**20:,.1f}':>12}")
    click.echo("activations: what autograd keeps of one microbatch; workspaces and fragmentation come on top")


@config.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@JSON
def validate(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a config without starting anything.

    Keys, values, the model's arguments, and whether the model fits the data. Exit code 2 and one line if it cannot run.
    """
    from orchestrator.checkpoint.store import Store
    from orchestrator.config import load_config, run_url
    from orchestrator.preflight import check_trainable
    from orchestrator.run_identity import config_hash

    loaded = load_config(config, overrides)
    check_trainable(loaded)
    Store.open(run_url(loaded))  # whether there is such a protocol; nobody is asked
    facts = {
        "run": run_url(loaded),
        "workers": [loaded.min_workers, loaded.max_workers],
        "num_microbatches": loaded.train.num_microbatches,
        "num_steps": loaded.train.num_steps,
        "config_hash": config_hash(loaded),
    }
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name:<17} {value}")


@config.command()
@click.argument("key", default="")
@JSON
def explain(key: str, as_json: bool) -> None:
    """Explain what can be in a config: every key, or KEY and what is below it.

    \b
      unbroken config explain checkpoint
      unbroken config explain ema.slow.decay
    """
    from orchestrator.config_reference import explain as explained

    found = explained(key)
    if not found:
        near = difflib.get_close_matches(key, [one.name for one in explained()], n=1)
        raise ConfigError(f"{key} is not a known key{f'; did you mean {near[0]}?' if near else ''}")
    if as_json:
        return print_json([asdict(one) for one in found])
    for one in found:
        default = "required" if one.default is None else f"default {one.default}"
        click.echo(f"{click.style(one.name, bold=True)}  ({one.kind}; {default})")
        click.echo(click.wrap_text(one.text, 100, "    ", "    "))
