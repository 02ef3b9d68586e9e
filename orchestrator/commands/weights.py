"""`unbroken sample`, `unbroken export` and `unbroken unpack`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from orchestrator.weights import SavedModel
    from trainers.export import ExportWeights

WEIGHTS = "ema|raw|PROFILE|sigma_rel=X"
STEP = click.option(
    "--step", type=click.IntRange(min=0), help="Weights of the checkpoint of this step. Default: the newest stable one."
)
GUIDANCE = click.option(
    "--guidance", type=click.FloatRange(min=0), help="Default: 1.5 where labels were dropped in training; 1 is none."
)


@click.command()
@click.argument("run")
@click.argument("out", metavar="OUT.png", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--weights", default="ema", metavar=WEIGHTS, help="ema, the default: the first EMA profile.")
@STEP
@click.option("--num", default=100, type=click.IntRange(1, 10_000), show_default=True, help="Number of images.")
@GUIDANCE
@click.option("--seed", default=0, type=click.IntRange(min=0), show_default=True, help="Same seed, same images.")
@click.option("--prompt", "prompts", multiple=True, help="For models of text; give it again for a further column.")
def sample(run: str, out: Path, weights: str, step: int | None, **options: Any) -> None:
    """Draw images into one PNG grid.

    Each class or prompt has a column. Image i starts from the same noise whatever the weights, so that grids can be
    compared.
    """
    if out.suffix != ".png":
        raise click.UsageError(f"{out} does not end in .png")
    from orchestrator.weights import open_model
    from trainers.sampling import save_grid

    saved = open_model(run, step)
    images, columns = _draw(saved, weights, **options)
    _make_folder(out.parent)
    save_grid(images, out, columns=columns)
    click.echo(f"{out}: {len(images)} images from the {saved.describe(weights)}")


def _draw(
    saved: SavedModel, weights: str, *, num: int, guidance: float | None, seed: int, prompts: tuple[str, ...]
) -> tuple[torch.Tensor, int]:
    """The images, and in how many columns to show them."""
    from trainers.conditioning import takes_text
    from trainers.models import learns_null_label, null_label
    from trainers.sampling import draw, usual_guidance

    config, model = saved.config, saved.load(weights)
    text, null = takes_text(model), null_label(model)
    if text and not prompts:
        raise click.UsageError("this model draws what a text says; give --prompt TEXT, once or more")
    if prompts and not text:
        raise click.UsageError("--prompt has no effect on a model without text; leave it out")
    label_drop = config.objective.label_drop
    columns = len(prompts) if text else 10 if null is None else null + 1 - learns_null_label(model, label_drop)
    if guidance is None:
        guidance = usual_guidance(model, label_drop)
    wanted = [prompts[i % columns] if text else i % columns for i in range(num)]  # every class in turn
    return draw(model, config, wanted, seed=seed, guidance=guidance), min(num, columns)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None


@click.command()
@click.argument("run")
@click.argument("out", metavar="OUT_DIR|OUT.safetensors", type=click.Path(path_type=Path))
@click.option("--weights", metavar=f"both|{WEIGHTS}", help="Default: both for a folder, ema for a single file.")
@click.option(
    "--fp16", is_flag=True, help='Folder: also the default weights in float16, as variant="fp16". File: float16.'
)
@click.option("--max-shard-size", metavar="SIZE", help="Cut larger weights of a folder into files of this size. [10GB]")
@STEP
def export(run: str, out: Path, weights: str | None, fp16: bool, max_shard_size: str | None, step: int | None) -> None:
    """Write the model in a form that other tools load, with the pipeline that it was trained in, if there was one.

    \b
      unbroken export RUN OUT_DIR             diffusers' form
      unbroken export RUN OUT.safetensors     the original layout, for ComfyUI and others: SD 1.5, 2, XL, 3 and Flux

    `DiffusionPipeline.from_pretrained(OUT_DIR)` loads the EMA weights (the first profile): take these to draw images.
    With `both`, the raw weights lie beside them as variant="non_ema": take these to train on. The README.md in OUT_DIR
    shows how to load either, and how to draw images of a class.

    A single file has the EMA weights alone, or those of --weights; with `both` the raw ones, and the EMA beside them as
    `model_ema`. Its metadata says which weights these are, of which run and step, and their hash.
    """
    from orchestrator.weights import open_model

    saved = open_model(run, step)
    if out.suffix == ".safetensors":
        if max_shard_size is not None:
            raise click.UsageError(f"--max-shard-size has no effect on a single file, {out}; leave it out")
        return _export_file(saved, out, weights or "ema", fp16)
    _export_folder(saved, out, weights or "both", fp16, max_shard_size or "10GB")


def _export_folder(saved: SavedModel, out_dir: Path, weights: str, fp16: bool, max_shard_size: str) -> None:
    from trainers.export import export_pipeline

    _make_folder(out_dir)
    chosen = {"both": [("ema", None), ("raw", "non_ema")]}.get(weights, [(weights, None)])
    found = [replace(_of_run(saved, which), variant=variant) for which, variant in chosen]
    if fp16:
        found.append(replace(found[0], description=f"{found[0].description}, float16", variant="fp16", half=True))
    export_pipeline(out_dir, saved.config, found, origin=_origin(saved), max_shard_size=max_shard_size)
    click.echo(f"{out_dir}: {' and '.join(saved.describe(which) for which, _ in chosen)}")


def _export_file(saved: SavedModel, file: Path, weights: str, fp16: bool) -> None:
    from trainers.single_file import export_single_file

    both = weights == "both"
    main = replace(_of_run(saved, "raw" if both else weights), half=fp16)
    average = _of_run(saved, "ema") if both else None
    _make_folder(file.parent)
    export_single_file(file, saved.config, main, origin=_origin(saved), average=average)
    click.echo(f"{file}: {main.description}{f', {average.description} as model_ema' if average else ''}")


def _of_run(saved: SavedModel, which: str) -> ExportWeights:
    from trainers.export import ExportWeights

    return ExportWeights(tensors=saved.tensors(which), description=saved.describe(which))


def _origin(saved: SavedModel) -> str:
    return f"run {saved.config.run.name} ({saved.manifest.run_id}), {saved.manifest.progress.samples_seen} samples"


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--like", required=True, metavar="FOLDER|NAME", help="A pipeline of the same kind, for its settings.")
def unpack(file: Path, out_dir: Path, like: str) -> None:
    """Make a folder for model.pretrained out of a single FILE of the original layout.

    \b
      unbroken unpack v1-5-pruned.safetensors sd15 --like stable-diffusion-v1-5/stable-diffusion-v1-5
      unbroken train configs/sd15-finetune.yaml model.pretrained=sd15

    Of a full file these are the weights under `model.diffusion_model`, the raw ones: right for training on.
    """
    from trainers.single_file import unpack_single_file

    _make_folder(out_dir)
    unpack_single_file(file, like, out_dir)
    click.echo(f"{out_dir}: the pipeline of {file}")
