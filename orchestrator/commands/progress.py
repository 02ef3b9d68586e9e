"""Progress bars of commands that read or wait for long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(label: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr while the block runs, if that is a terminal; nothing otherwise.

    Args:
        unit: `bytes`, or another one that is shown as it is.

    Yields:
        A function to be told of every amount done.
    """
    amount = DownloadColumn() if unit == "bytes" else TextColumn(f"{{task.completed:.0f}} of {{task.total:.0f}} {unit}")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    still = not console.is_terminal or console.is_dumb_terminal
    with Progress(*columns, console=console, disable=still, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.advance(task, done)
