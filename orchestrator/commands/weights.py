"""`unbroken sample` and `unbroken export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

_WEIGHTS = "ema|raw|PROFILE|sigma_rel=X"
_STEP = click.option(
    "--step", type=click.IntRange(min=0), help="Weights of the checkpoint of this step. Default: the newest stable one."
)


@click.command()
@click.argument("run")
@click.argument("out", metavar="OUT.png", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--weights", default="ema", metavar=_WEIGHTS, help="ema, the default: the first EMA profile.")
@_STEP
@click.option("--num", default=100, type=click.IntRange(1, 10_000), show_default=True, help="Number of images.")
@click.option(
    "--guidance", type=click.FloatRange(min=0), help="Default: 1.5 where labels were dropped in training; 1 is none."
)
@click.option("--seed", default=0, type=click.IntRange(min=0), show_default=True, help="Same seed, same images.")
def sample(run: str, out: Path, weights: str, step: int | None, num: int, guidance: float | None, seed: int) -> None:
    """Draw images into one PNG grid.

    Each class has a column. Image i starts from the same noise whatever the weights, so that grids can be compared.
    """
    if out.suffix != ".png":
        raise click.UsageError(f"{out} does not end in .png")
    import torch

    from orchestrator.weights import open_model
    from trainers.models import learns_null_label, null_label
    from trainers.objectives import Objective
    from trainers.sampling import sample_images, save_grid

    saved = open_model(run, step)
    config, model = saved.config, saved.load(weights)
    null, guided = null_label(model), learns_null_label(model, config.objective.label_drop)
    labels = None if null is None else torch.arange(num) % (null if guided else null + 1)  # every class in turn
    channels: int = cast(Any, model).config["in_channels"]
    shape = (num, channels, config.data.image_size, config.data.image_size)
    if guidance is None:
        guidance = 1.5 if guided else 1.0
    images = sample_images(model, Objective(config.objective), shape, labels, seed=seed, guidance=guidance)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, out, columns=min(num, 10) if labels is None else int(labels.max()) + 1)
    click.echo(f"{out}: {num} images from the {saved.describe(weights)}")


@click.command()
@click.argument("run")
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--weights", default="both", metavar=f"both|{_WEIGHTS}", show_default=True)
@_STEP
def export(run: str, out_dir: Path, weights: str, step: int | None) -> None:
    """Write the model in diffusers form.

    `DiffusionPipeline.from_pretrained(OUT_DIR)` loads the EMA weights (the first profile): take these to draw images.
    With `both`, the raw weights lie beside them as variant="non_ema": take these to train on. The README.md in OUT_DIR
    shows how to load either, and how to draw images of a class.
    """
    from orchestrator.weights import open_model
    from trainers.export import ExportWeights, export_pipeline

    saved = open_model(run, step)
    chosen = {"both": [("ema", None), ("raw", "non_ema")]}.get(weights, [(weights, None)])
    progress = saved.manifest.progress
    export_pipeline(
        out_dir,
        saved.config.model,
        saved.config.objective,
        [
            ExportWeights(tensors=saved.tensors(which), description=saved.describe(which), variant=variant)
            for which, variant in chosen
        ],
        image_size=saved.config.data.image_size,
        origin=f"run {saved.config.run.name} ({saved.manifest.run_id}), {progress.samples_seen} samples",
    )
    click.echo(f"{out_dir}: {' and '.join(saved.describe(which) for which, _ in chosen)}")
