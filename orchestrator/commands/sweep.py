"""`unbroken sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from orchestrator.commands.json_output import JSON, print_json

if TYPE_CHECKING:
    from orchestrator.config import RunConfig
    from orchestrator.search.trials import Result, Trial


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--param", "params", multiple=True, required=True, metavar="KEY=VALUES", help="What to search; see above."
)
@click.option("--samples", default=1, type=click.IntRange(1), show_default=True, help="Draws of the drawn parameters.")
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True, help="Of the draws.")
@click.option("--concurrent", type=click.IntRange(1), help="Trials at a time. Default: what the cluster has room for.")
@click.option(
    "--metric",
    default="loss",
    show_default=True,
    help="What is compared: loss or grad_norm, by the mean over the last tenth of the steps; or the last"
    " validation/loss, validation/loss/ema/NAME, validation/kid/NETWORK, ...",
)
@click.option("--mode", default="min", type=click.Choice(["min", "max"]), show_default=True, help="Which is better.")
@JSON
def sweep(
    config: str, overrides: tuple[str, ...], params: tuple[str, ...], samples: int, seed: int, **options: object
) -> int:
    """Train a config with many values of some of its keys, and compare.

    \b
      unbroken sweep CONFIG --param 'optimizer.lr=[1e-4, 1e-3]' --param 'optimizer.weight_decay=[0, 0.01]'
      unbroken sweep CONFIG --param 'optimizer.lr=loguniform(1e-5, 1e-2)' --samples 20
    \b
    VALUES   [a, b]                 a grid: every combination
             choice(a, b)           one of them a sample
             uniform(low, high)     a number a sample; also loguniform, and randint for integers

    Every trial is a run of its own, <run.name>-<hash of its values>, in the same storage: `status`, `sample`, `prove`
    and all else work on it. It restarts like every run. The same command again goes on with the search: finished
    trials are not trained again. A Ray of its own on this machine, or with RAY_ADDRESS that cluster.

    Losses of different objectives mean different things: to search among these, compare distances of drawn images
    (validation.metrics). The exit code is 3 if a trial did not finish.
    """
    return _sweep(config, overrides, (params, samples, seed), **options)  # pyright: ignore[reportArgumentType]


def _sweep(
    path: str,
    overrides: Sequence[str],
    space: tuple[Sequence[str], int, int],
    *,
    concurrent: int | None,
    metric: str,
    mode: str,
    as_json: bool,
) -> int:
    from orchestrator.config import load_config
    from orchestrator.preflight import check_trainable
    from orchestrator.search.trials import check_metric, make_trials, parse_parameter, ranked
    from trainers.errors import ConfigError

    base = load_config(path, overrides)
    check_metric(metric, base.validation.holds_out)
    params, samples, seed = space
    trials = make_trials(base.run.name, [parse_parameter(text) for text in params], samples, seed)
    keys = {key for trial in trials for key in trial.values}
    if twice := next((text for text in overrides if text.partition("=")[0] in keys), None):
        raise ConfigError(f"{twice} has no effect, as --param searches that key; leave one of them out")
    given = [text for text in overrides if not text.startswith("run.name=")]
    configs = [load_config(path, [*given, *trial.overrides]) for trial in trials]
    open_trials = [one for one in configs if not _finished(one)]
    said: dict[str, str] = {}
    if open_trials:
        for one in open_trials:
            check_trainable(one)
        from orchestrator.interrupts import leave
        from orchestrator.search.sweep import run_trials  # imports ray: only if there is something to train

        try:
            said = run_trials(open_trials, concurrent, lambda line: click.echo(line, err=as_json))
        except SystemExit as error:
            leave(error.code if isinstance(error.code, int) else 1)
    results = [_result(trial, one, metric, said) for trial, one in zip(trials, configs, strict=True)]
    _show(ranked(results, mode), metric, as_json)
    return 0 if all(result.state == "finished" for result in results) else 3


def _finished(config: RunConfig) -> bool:
    """Raises RunMismatchError if the trial is one of an earlier search, whose other keys were others."""
    from orchestrator.checkpoint import run_record
    from orchestrator.checkpoint.store import Store
    from orchestrator.config import run_url
    from orchestrator.errors import RunNotFoundError
    from orchestrator.run_identity import check_same_run

    store = Store.reach(run_url(config))
    with suppress(RunNotFoundError):  # it has not begun
        check_same_run(store, run_record.load(store), config)
    return _step(config) >= config.train.num_steps


def _step(config: RunConfig) -> int:
    """Of the newest stable checkpoint."""
    from orchestrator.checkpoint.catalog import newest_stable
    from orchestrator.checkpoint.store import Store
    from orchestrator.config import run_url

    newest = newest_stable(Store.reach(run_url(config)))
    return newest.manifest.progress.step if newest and newest.manifest else 0


def _result(trial: Trial, config: RunConfig, metric: str, said: dict[str, str]) -> Result:
    from orchestrator.checkpoint.store import Store
    from orchestrator.config import run_url
    from orchestrator.search.trials import VALIDATION, Result, last_mean, last_validation
    from orchestrator.tracking.record import read_events
    from orchestrator.tracking.streaming import items_by_step

    step, store = _step(config), Store.open(run_url(config))
    if metric.startswith(VALIDATION):
        value = last_validation(read_events(store), metric.removeprefix(VALIDATION))
    else:
        value = last_mean(found for *_, found in items_by_step(store, lambda row: (row.get(metric),))[1])
    return Result(
        name=trial.name,
        url=run_url(config),
        values=trial.values,
        state="finished" if step >= config.train.num_steps else said.get(trial.name) or "not finished",
        step=step,
        metric=value,
    )


def _show(results: Sequence[Result], metric: str, as_json: bool) -> None:
    if as_json:
        print_json([asdict(result) for result in results])
        return
    keys = list(results[0].values)
    rows = [("TRIAL", *keys, metric.upper(), "STEP", "STATE")]
    for result in results:
        values = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in result.values.values()]
        measured = "-" if result.metric is None else f"{result.metric:.6g}"
        rows.append((result.name, *values, measured, str(result.step), result.state))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
