"""`unbroken status` and `unbroken report`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.finite import FiniteRange
from orchestrator.commands.json_output import JSON, print_json

if TYPE_CHECKING:
    from orchestrator.tracking.overview import Overview, RunView


@click.command()
@click.argument("run")
@click.option("--watch", is_flag=True, help="Look again and again, until the run has ended or Ctrl-C.")
@click.option("--every", default=2.0, type=FiniteRange(0.2, 3600), show_default=True, help="Seconds, for --watch.")
@JSON
def status(run: str, watch: bool, every: float, as_json: bool) -> int:
    """Show what a run does: now, or what it did.

    State, progress, loss, checkpoints, what failures cost and where the time went. It is read from the run's storage
    alone, so it works from any machine that can read it, while the run runs and afterwards. The record is written every
    5 seconds; after 90 seconds without a sign of life that is what is shown.
    """
    from orchestrator.tracking import live_page, overview

    view = overview.RunView(run, overview.ENOUGH_ROWS, live_page.MOST_LINES)
    terminal = live_page.Terminal()
    try:
        if as_json:
            for seen in _looks(view, every) if watch else (view.look(),):
                print_json(overview.as_json(seen), indent=None if watch else 2)
        elif watch:
            live_page.show(_looks(view, every), terminal)
        else:
            terminal.print(live_page.page(view.look(), terminal.width))
    except KeyboardInterrupt:
        if not watch:
            raise
        return 130  # and no word of an error: that is how watching ends
    return 0


@click.command()
@click.argument("run")
@click.argument("out", metavar="OUT.html", type=click.Path(dir_okay=False, path_type=Path))
@JSON
def report(run: str, out: Path, as_json: bool) -> None:
    """Write one page about a run, to keep or to send.

    One HTML file with everything in it: it needs no network and no script. Loss with the restarts marked, what happened
    when, where the time went, checkpoints, samples, config and environment.
    """
    if out.suffix not in (".html", ".htm"):
        raise click.UsageError(f"{out} does not end in .html")
    from orchestrator.tracking.overview import RunView
    from orchestrator.tracking.report import MOST_CHECKPOINTS, page

    view = RunView(run, None, MOST_CHECKPOINTS)
    seen = view.look()
    text = page(seen, view.store)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"cannot write {out}: {error.strerror}; choose another OUT.html") from None
    if as_json:
        return print_json(
            {"out": str(out), "size_bytes": len(text.encode()), "run": seen.url, "state": str(seen.state)}
        )
    click.echo(f"{out}: {len(text.encode()) / 1e3:,.0f} kB")


def _looks(view: RunView, every: float) -> Iterator[Overview]:
    """The run, again and again, as long as it goes on."""
    while True:
        yield (seen := view.look())
        if not _goes_on(seen):
            return
        time.sleep(every)


def _goes_on(seen: Overview) -> bool:
    from orchestrator.tracking.overview import State

    return seen.state.live or seen.state in (State.SILENT, State.NOT_STARTED)
