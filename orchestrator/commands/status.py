"""`unbroken status` and `unbroken report`."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.tracking.overview import Overview

_ENOUGH_ROWS = 20_000
"""Steps that the loss curve of `status` needs at most; a long run has more, and they need not be read."""
_MOST_CHECKPOINTS = 8
_MOST_EVENTS = 8
_COLORS = {
    "productive": "green",
    "stall": "yellow",
    "evaluate": "cyan",
    "lost": "red",
    "detect": "magenta",
    "restart": "bright_magenta",
    "start": "blue",
    "down": "bright_black",
}
_BLOCKS = "▁▂▃▄▅▆▇█"


@click.command()
@click.argument("run")
@click.option("--watch", is_flag=True, help="Look again and again, until the run has ended or Ctrl-C.")
@click.option("--every", default=2.0, type=click.FloatRange(0.2, 3600), show_default=True, help="Seconds, for --watch.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --watch one a line.")
def status(run: str, watch: bool, every: float, as_json: bool) -> None:
    """Show what a run does: now, or what it did.

    State, progress, loss, checkpoints, what failures cost and where the time went. It is read from the run's storage
    alone, so it works from any machine that can read it, while the run runs and afterwards. The record is written every
    5 seconds; after 90 seconds without a sign of life that is what is shown.
    """
    from rich.console import Console
    from rich.live import Live

    from orchestrator.tracking import overview

    view = overview.RunView(run, _ENOUGH_ROWS, _MOST_CHECKPOINTS)
    if as_json:
        while True:
            seen = view.look()
            click.echo(json.dumps(overview.as_json(seen), indent=None if watch else 2))
            if not (watch and _goes_on(seen)):
                return
            time.sleep(every)
    console = Console()
    if not watch:
        console.print(_page(view.look(), console.width))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            seen = view.look()
            live.update(_page(seen, console.width), refresh=True)
            if not _goes_on(seen):
                return
            time.sleep(every)


@click.command()
@click.argument("run")
@click.argument("out", metavar="OUT.html", type=click.Path(dir_okay=False, path_type=Path))
def report(run: str, out: Path) -> None:
    """Write one page about a run, to keep or to send.

    One HTML file with everything in it: it needs no network and no script. Loss with the restarts marked, what happened
    when, where the time went, checkpoints, samples, config and environment.
    """
    if out.suffix not in (".html", ".htm"):
        raise click.UsageError(f"{out} does not end in .html")
    from orchestrator.tracking.overview import RunView
    from orchestrator.tracking.report import MOST_CHECKPOINTS, page

    view = RunView(run, None, MOST_CHECKPOINTS)
    text = page(view.look(), view.store)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"cannot write {out}: {error.strerror}; choose another OUT.html") from None
    click.echo(f"{out}: {len(text.encode()) / 1e6:.1f} MB")


def _goes_on(seen: Overview) -> bool:
    from orchestrator.tracking.overview import State

    return seen.state.live or seen.state in (State.SILENT, State.NOT_STARTED)


def _page(seen: Overview, width: int) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    bar = ProgressBar(total=max(1, seen.num_steps), completed=seen.step, width=min(width, 78))
    parts: list[RenderableType] = [
        _heading(seen),
        Padding(bar, 0),
        Text(_progress(seen)),
        *_losses(seen, min(width, 78)),
    ]
    parts += [Text(), *_goodput(seen, min(width, 78)), Text(), _checkpoints(seen), *_events(seen)]
    parts += [Text(line, style="bold red") for line in seen.damaged]
    return Group(*parts)


def _heading(seen: Overview) -> RenderableType:
    from rich.text import Text

    from orchestrator.tracking.overview import State

    color = {State.FINISHED: "green", State.ENDED: "red", State.SILENT: "red", State.RECOVERING: "yellow"}
    text = Text.assemble((seen.url, "bold"), "  ", (str(seen.state), f"bold {color.get(seen.state, 'cyan')}"))
    if seen.since_s is not None and not seen.state.live:
        ago = _duration(max(0.0, time.time() - seen.since_s))
        text.append(f" since {_clock(seen.since_s)} ({ago})")
    if seen.why:
        text.append(f"\n{seen.why}")
    return text


def _progress(seen: Overview) -> str:
    goodput, rate, eta_s = seen.goodput, seen.steps_per_s, seen.eta_s
    share = f" ({seen.step / seen.num_steps:.0%})" if seen.num_steps else ""
    facts = [f"step {seen.step:,} of {seen.num_steps:,}{share}"]
    if rate:
        facts.append(f"{rate * seen.global_batch_size:,.0f} samples/s")
    if eta_s is not None:
        facts.append(f"ETA {_duration(eta_s)}")
    if seen.world_size:
        facts.append(f"{seen.world_size} worker{'s' * (seen.world_size > 1)}")
    facts.append(f"attempt {goodput.attempts}")
    facts.append(f"restarts {len(goodput.recoveries)}, lost steps {goodput.lost_steps:,}")
    return "  ".join(facts)


def _losses(seen: Overview, width: int) -> list[RenderableType]:
    from rich.text import Text

    from orchestrator.tracking.overview import thin

    points = thin(seen.metrics, "loss", width)
    if not points:
        return []
    means = [mean for _, mean, _, _ in points]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    line = "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)
    first = seen.metrics[0]["step"]
    return [Text(line, style="cyan"), Text(f"loss {means[-1]:.4g}, from {high:.4g} to {low:.4g} since step {first:,}")]


def _goodput(seen: Overview, width: int) -> list[RenderableType]:
    from rich.text import Text

    goodput = seen.goodput
    if goodput.share is None:
        return []
    bar, legend = Text(), Text(f"goodput {goodput.share:.1%} of {_duration(goodput.wall_s)}:")
    for bucket, seconds in goodput.seconds.items():
        if seconds > 0:
            bar.append("█" * round(width * seconds / goodput.wall_s), style=_COLORS[bucket])
            legend.append("  ■ ", style=_COLORS[bucket]).append(f"{bucket} {_duration(seconds)}")
    lines: list[RenderableType] = [bar, legend]
    if goodput.recoveries:
        last = goodput.recoveries[-1]
        text = f"last restart: {last.cause}, {last.lost_steps} steps lost, training again after {last.seconds:.1f} s"
        lines.append(Text(text))
    return lines


def _checkpoints(seen: Overview) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not seen.num_checkpoints:
        return Text("no checkpoint yet", style="dim")
    newest = seen.newest_stable
    stable = f"newest stable: step {newest.step:,}" if newest else "none is stable"
    table = Table(
        title=f"checkpoints: {seen.num_checkpoints}, {stable}", box=None, title_justify="left", title_style="bold"
    )
    for name in ("checkpoint", "step", "state", "made"):
        table.add_column(name, justify="right" if name == "step" else "left", header_style="dim")
    for info in seen.checkpoints:
        step, made = (f"{info.step:,}", info.manifest.created_at) if info.manifest else ("-", "")
        table.add_row(str(info.ref), step, f"{info.state} {info.detail}".rstrip(), made)
    if seen.cadence is not None:
        table.caption, table.caption_justify = f"every_steps: auto: {seen.cadence}", "left"
    return table


def _events(seen: Overview) -> list[RenderableType]:
    from rich.text import Text

    from orchestrator.tracking.overview import told

    lines = list(told(seen.events[-200:], seen.num_steps, seen.global_batch_size))[-_MOST_EVENTS:]
    found: list[RenderableType] = [Text("\nlast events", style="bold")] if lines else []
    for time_s, line in lines:
        found.append(Text(f"{_clock(time_s)}  {line.splitlines()[0]}", no_wrap=True, overflow="ellipsis"))
    return found


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
