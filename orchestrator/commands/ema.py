"""`unbroken ema synthesize | advise`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.json_output import JSON, print_json

if TYPE_CHECKING:
    from trainers.ema_advice import Advice

_POOR_RESIDUAL = 0.1


@click.group()
def ema() -> None:
    """Averages of the weights: choose them before a run, make others after it."""


@ema.command()
@click.argument("run")
@click.option(
    "--sigma-rel", required=True, type=float, help="Width of the average, as a share of the run: 0.05 to 0.2."
)
@click.option("--at", "step", type=click.IntRange(min=0), help="At the checkpoint of this step. Default: the newest.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the result, model.safetensors. Default: ema-SIGMA_REL-STEP.",
)
@JSON
def synthesize(run: str, sigma_rel: float, step: int | None, out: Path | None, as_json: bool) -> None:
    """Make an average of another width, without training again.

    It is put together from the EMA profiles of `kind: power` in the checkpoints that the run has kept, so keep enough
    of them: checkpoint.keep.every_steps. The residual says how far the result is from the average asked for; for 0
    to a few percent take it, otherwise keep more checkpoints. Tensors are read one group at a time; no model is built.

    `unbroken sample` and `unbroken export` make the same average with --weights sigma_rel=X.
    """
    from orchestrator.commands.progress import bar
    from orchestrator.ema_synthesis import open_synthesis

    synthesis = open_synthesis(run, sigma_rel, step)
    at = synthesis.manifest.progress.step
    path = (out or Path(f"ema-{sigma_rel:g}-{at}")) / "model.safetensors"
    if path.exists():
        raise click.UsageError(f"{path} exists; remove it, or name another folder with --out")
    with bar("combining", synthesis.num_bytes, "bytes") as advance:
        synthesis.write(path, advance)
    steps = {snapshot.manifest.progress.step for snapshot in synthesis.snapshots}
    residual = synthesis.reconstruction.residual
    if as_json:
        facts = {"num_averages": len(synthesis.snapshots), "checkpoint_steps": sorted(steps), "residual": residual}
        print_json({"out": str(path), "sigma_rel": sigma_rel, "step": at, **facts})
    else:
        click.echo(
            f"{path}: EMA of sigma_rel {sigma_rel:g} at step {at}, from {len(synthesis.snapshots)} averages of"
            f" {len(steps)} checkpoints; residual {100 * residual:.2g} %"
        )
    if residual > _POOR_RESIDUAL:
        click.echo("warning: that is far from the average asked for; more kept checkpoints would help", err=True)


@ema.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@JSON
def advise(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Explain the EMA profiles of a config, at the end of its run.

    Decay, half-life and N of each, what the weights at its start still count, from which start_step it would be as
    good and cheaper, and what it costs. Try others: ema.NAME.half_life_samples=100000 adds one.
    """
    from orchestrator.config import load_config
    from orchestrator.doctor import state_size
    from trainers.ema_advice import advise as explain
    from trainers.ema_advice import measure_update_s

    run = load_config(config, overrides)
    shards = run.parallel.shards(run.max_workers)
    per_worker = -(-state_size(run).parameters // 4 // shards)
    cost = {
        "memory_bytes_per_worker": 4 * per_worker,
        "update_s": measure_update_s(per_worker),
    }
    advice = {
        name: explain(profile, run.train.global_batch_size, run.train.num_steps) for name, profile in run.ema.items()
    }
    if as_json:
        profiles = {name: asdict(entry) for name, entry in advice.items()}
        print_json({**cost, "profiles": profiles})
        return
    click.echo(
        f"each profile: {cost['memory_bytes_per_worker'] / 1e6:.1f} MB a worker, and {1000 * cost['update_s']:.2f} ms"
        " an update on this machine, both only from its start_step on"
    )
    for name, entry in advice.items():
        click.echo(f"{name} ({run.ema[name].kind}): {_sentence(entry, run.train.num_steps)}")
    if not advice:
        click.echo("no profile; for averages of any width after training add ema.a={kind: power, sigma_rel: 0.05}")


def _sentence(advice: Advice, num_steps: int) -> str:
    if advice.decay is None:
        return f"never updated in {num_steps} steps; lower start_step or every"
    half_life = (
        ""
        if advice.half_life_steps is None
        else f" = half-life {advice.half_life_steps:.6g} steps ({advice.half_life_samples:.6g} samples)"
    )
    if advice.equivalent_num_steps is None:
        return "never moves: its decay is so near 1 that it is rounded to that; make it shorter"
    text = (
        f"decay {advice.decay:.8g} a step{half_life} = N {advice.equivalent_num_steps:.6g} at step {num_steps};"
        f" {advice.num_updates} updates; its first copy still weighs {100 * advice.share_of_start:.3g} %"
    )
    if advice.latest_start_step is not None:
        text += f"; start_step={advice.latest_start_step} would do as well (1 %) and cost nothing before"
    return text
