"""`unbroken evaluate`."""

from __future__ import annotations

from typing import Any

import click

from orchestrator.commands.json_output import JSON, print_json
from orchestrator.commands.progress import bar
from orchestrator.commands.weights import GUIDANCE, STEP, WEIGHTS


def _metrics(ctx: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
    from orchestrator.quality import METRICS

    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    if unknown := [name for name in names if name not in METRICS]:
        raise click.UsageError(f"--metrics {unknown[0]} is not known; give some of {','.join(METRICS)}")
    return names


@click.command()
@click.argument("run")
@click.option("--weights", default="ema", metavar=WEIGHTS, help="ema, the default: the first EMA profile.")
@STEP
@click.option("--metrics", default="fid,kid", show_default=True, callback=_metrics, help="Some of fid, kid and clip.")
@click.option(
    "--network",
    default="inception",
    show_default=True,
    metavar="inception|FILE",
    help="Features of FID and KID: the standard Inception v3, or a TorchScript or torch.export (.pt2) file that makes"
    " (N, D) of (N, 3, H, W) uint8.",
)
@click.option("--clip", metavar="FOLDER", help="Model of the CLIP score, in transformers' form.")
@click.option("--num", default=1000, type=click.IntRange(2), show_default=True, help="Number of images.")
@click.option("--reference", default="all", show_default=True, type=click.Choice(["all", "held-out"]))
@GUIDANCE
@click.option("--num-steps", default=50, type=click.IntRange(1), show_default=True, help="Denoising steps.")
@click.option("--seed", default=0, type=click.IntRange(min=0), show_default=True, help="Same seed, same images.")
@JSON
def evaluate(run: str, weights: str, step: int | None, as_json: bool, **request: Any) -> None:
    """Measure how near the images of a checkpoint are to the data.

    Draws as many images as asked for, with the labels or captions of data. Each number is named after the network that
    it was measured with, a file by its name and hash, as it means nothing beside one of another network.
    """
    from orchestrator.quality import Request, measure
    from orchestrator.weights import open_model

    saved = open_model(run, step)
    with bar("drawing", request["num"], "images") as progress:
        found = measure(saved, weights, Request(**request), progress)
    if as_json:
        print_json(found)
        return
    of = "the held out data" if found["reference"] == "held-out" else "the data"
    click.echo(f"{found['weights']}: {found['num_drawn']} images against {found['num_real']} of {of}")
    for name, value in found["metrics"].items():
        click.echo(f"{name}  {value:.6g}")
    for note in found["notes"]:
        click.echo(f"note: {note}")
