"""`unbroken doctor`."""

from __future__ import annotations

from dataclasses import asdict

import click

from orchestrator.commands.json_output import JSON, print_json


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@JSON
def doctor(config: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Check whether a config can run here.

    Builds the model in shape only, and tries the storage: writing and reading back, create-if-absent, the clock, the
    bandwidth and so the time that a save takes; free disk and memory against what the state needs. Nothing is left
    behind. Exit code 2 if the config cannot run, 5 if a check fails.
    """
    from orchestrator.config import load_config
    from orchestrator.doctor import Verdict, examine

    checks = []
    for check in examine(load_config(config, overrides)):
        checks.append(check)
        if not as_json:  # each as soon as it is known
            click.echo(f"{check.verdict.value:<5} {check.name:<19} {check.detail}")
    if as_json:
        print_json([asdict(check) for check in checks])
    return 5 if any(check.verdict is Verdict.FAIL for check in checks) else 0
