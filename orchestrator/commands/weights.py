"""`unbroken sample`, `unbroken export` and `unbroken unpack`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands.finite import FiniteRange
from orchestrator.commands.json_output import JSON, print_json

if TYPE_CHECKING:
    import torch

    from orchestrator.weights import SavedModel
    from trainers.export import ExportWeights

WEIGHTS = "ema|raw|PROFILE|sigma_rel=X"
STEP = click.option(
    "--step", type=click.IntRange(min=0), help="Weights of the checkpoint of this step. Default: the newest stable one."
)
GUIDANCE = click.option(
    "--guidance",
    type=FiniteRange(min=0),
    help="1 is none. Default: what diffusers' pipeline takes, 1.5 for a network alone; 1 if it learnt none.",
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
@JSON
def sample(run: str, out: Path, weights: str, step: int | None, as_json: bool, **options: Any) -> None:
    """Draw images into one PNG grid.

    Each class or prompt has a column. Image i starts from the same noise whatever the weights, so that grids can be
    compared.
    """
    if out.suffix != ".png":
        raise click.UsageError(f"{out} does not end in .png")
    from orchestrator.weights import open_model
    from trainers.sampling import save_grid

    saved = open_model(run, step)
    _make_folder(out.parent)  # before the work
    images, columns = _draw(saved, weights, **options)
    save_grid(images, out, columns=columns)
    if as_json:
        return print_json(_made(saved, out, [weights]) | {"num_images": len(images)})
    click.echo(f"{out}: {len(images)} images from the {saved.describe(weights)}")


def _draw(
    saved: SavedModel, weights: str, *, num: int, guidance: float | None, seed: int, prompts: tuple[str, ...]
) -> tuple[torch.Tensor, int]:
    """The images, and in how many columns to show them."""
    from trainers.conditioning import takes_text
    from trainers.models import null_label, num_classes_of
    from trainers.sampling import draw, usual_guidance

    config, model = saved.config, saved.load(weights)
    text, null = takes_text(model), null_label(model)
    if text and not prompts:
        raise click.UsageError("this model draws what a text says; give --prompt TEXT, once or more")
    if prompts and not text:
        raise click.UsageError("--prompt has no effect on a model without text; leave it out")
    columns = len(prompts) if text else 10 if null is None else num_classes_of(model, config.objective.label_drop)
    if guidance is None:
        guidance = usual_guidance(model, config)
    wanted = [prompts[i % columns] if text else i % columns for i in range(num)]  # every class in turn
    return draw(model, config, wanted, seed=seed, guidance=guidance), min(num, columns)


def _made(saved: SavedModel, out: Path, weights: Sequence[str]) -> dict[str, Any]:
    """What a script wants to know of `out`, made of these weights."""
    step = saved.manifest.progress.step
    return {"out": str(out), "run": saved.store.url, "step": step, "weights": [saved.describe(one) for one in weights]}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None


def _size(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"\d+[KMGT]B", value):
        raise click.BadParameter(f"{value!r} is no size; write 500MB or 10GB")
    return value


@click.command()
@click.argument("run")
@click.argument("out", metavar="OUT_DIR|OUT.safetensors", type=click.Path(path_type=Path))
@click.option("--weights", metavar=f"both|{WEIGHTS}", help="Default: both for a folder, ema for a single file.")
@click.option(
    "--fp16", is_flag=True, help='Folder: also the default weights in float16, as variant="fp16". File: float16.'
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    callback=_size,
    help="Cut larger weights of a folder into files of this size. [10GB]",
)
@STEP
@JSON
def export(run: str, out: Path, step: int | None, as_json: bool, **options: Any) -> None:
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
    used = (_export_file if out.suffix == ".safetensors" else _export_folder)(saved, out, **options)
    made = _made(saved, out, used)
    if as_json:
        return print_json(made)
    click.echo(f"{out}: {' and '.join(made['weights'])}")


def _export_folder(
    saved: SavedModel, out_dir: Path, *, weights: str | None, fp16: bool, max_shard_size: str | None
) -> Sequence[str]:
    """Which weights are there now, the default ones first."""
    from trainers.export import export_pipeline

    _make_folder(out_dir)
    used = ("ema", "raw") if weights in (None, "both") else (weights,)
    found = [
        replace(_of_run(saved, which), variant=variant) for which, variant in zip(used, (None, "non_ema"), strict=False)
    ]
    if fp16:
        found.append(replace(found[0], description=f"{found[0].description}, float16", variant="fp16", half=True))
    export_pipeline(out_dir, saved.config, found, origin=_origin(saved), max_shard_size=max_shard_size or "10GB")
    return used


def _export_file(
    saved: SavedModel, file: Path, *, weights: str | None, fp16: bool, max_shard_size: str | None
) -> Sequence[str]:
    """As `_export_folder`."""
    from trainers.single_file import export_single_file

    if max_shard_size is not None:
        raise click.UsageError(f"--max-shard-size has no effect on a single file, {file}; leave it out")
    used = ("raw", "ema") if weights == "both" else (weights or "ema",)  # the second one as `model_ema`
    main = replace(_of_run(saved, used[0]), half=fp16)
    average = _of_run(saved, "ema") if len(used) > 1 else None
    _make_folder(file.parent)
    export_single_file(file, saved.config, main, origin=_origin(saved), average=average)
    return used


def _of_run(saved: SavedModel, which: str) -> ExportWeights:
    from trainers.export import ExportWeights

    return ExportWeights(tensors=saved.tensors(which), description=saved.describe(which))


def _origin(saved: SavedModel) -> str:
    return f"run {saved.config.run.name} ({saved.manifest.run_id}), {saved.manifest.progress.samples_seen} samples"


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--like", required=True, metavar="FOLDER|NAME", help="A pipeline of the same kind, for its settings.")
@JSON
def unpack(file: Path, out_dir: Path, like: str, as_json: bool) -> None:
    """Make a folder for model.pretrained out of a single FILE of the original layout.

    \b
      unbroken unpack v1-5-pruned.safetensors sd15 --like stable-diffusion-v1-5/stable-diffusion-v1-5
      unbroken train configs/sd15-finetune.yaml model.pretrained=sd15

    Of a full file these are the weights under `model.diffusion_model`, the raw ones: right for training on.
    """
    from trainers.single_file import unpack_single_file

    _make_folder(out_dir)
    unpack_single_file(file, like, out_dir)
    if as_json:
        return print_json({"out": str(out_dir), "file": str(file)})
    click.echo(f"{out_dir}: the pipeline of {file}")
