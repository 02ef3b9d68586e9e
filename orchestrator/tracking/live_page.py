"""What `unbroken status` draws: where a run stands, what it lost, what it keeps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.tracking.overview import Overview, State
from orchestrator.tracking.telling import told

MOST_LINES = 8
"""Of checkpoints, and of events."""
_MOST_WIDTH, _NARROW = 78, 72
_STATES = {State.FINISHED: "green", State.ENDED: "red", State.SILENT: "red", State.RECOVERING: "yellow"}
_BUCKETS = {
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


class Terminal(Console):
    """Leaves it to the command line what becomes of a command whose output nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise


def show(looks: Iterable[Overview], terminal: Terminal) -> None:
    """Draw one look over the other; where that cannot be, write a line whenever something is new."""
    if terminal.is_terminal and not terminal.is_dumb_terminal:
        with Live(console=terminal, auto_refresh=False) as live:
            for seen in looks:
                live.update(_fitting(seen, terminal), refresh=True)
        return
    said = None
    for seen in looks:
        if (line := "  ".join((str(seen.state), *_progress(seen)))) != said:
            terminal.print(line, soft_wrap=True)
        said = line


def page(seen: Overview, width: int, most_lines: int = MOST_LINES) -> RenderableType:
    """Args: most_lines: of checkpoints, and of events."""
    bar = ProgressBar(total=max(1, seen.num_steps), completed=seen.step, width=_bar(width))
    parts: list[RenderableType] = [_heading(seen), Padding(bar, 0)]  # without padding the bar is no line of its own
    parts += [*map(Text, _rows(_progress(seen), width)), *_losses(seen, width), Text(), *_goodput(seen, width)]
    parts += [*_checkpoints(seen, width, most_lines), *_events(seen, width, most_lines)]
    parts += [Text(line, style="bold red") for line in seen.damaged]
    return Group(*parts)


def _fitting(seen: Overview, terminal: Terminal) -> RenderableType:
    """As many checkpoints and events as there is room for."""
    for most_lines in range(MOST_LINES, 0, -1):
        drawn = page(seen, terminal.width, most_lines)
        if len(terminal.render_lines(drawn, pad=False)) < terminal.height:
            return drawn
    return page(seen, terminal.width, 0)


def _bar(width: int) -> int:
    return min(width, _MOST_WIDTH)


def _heading(seen: Overview) -> RenderableType:
    text = Text.assemble((seen.url, "bold"), "  ", (str(seen.state), f"bold {_STATES.get(seen.state, 'cyan')}"))
    if seen.since_s is not None and not seen.state.live:
        ago = _duration(max(0.0, time.time() - seen.since_s))
        text.append(f" since {_clock(seen.since_s)} ({ago})")
    if seen.why:
        text.append(f"\n{seen.why}")
    return text


def _progress(seen: Overview) -> list[str]:
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
    return [*facts, f"restarts {len(goodput.recoveries)}, lost steps {goodput.lost_steps:,}"]


def _rows(facts: Iterable[str], width: int) -> list[str]:
    """The facts in as few lines as they need, none of them broken."""
    rows = [""]
    for fact in facts:
        longer = f"{rows[-1]}  {fact}".lstrip()
        rows[-1:] = [longer] if len(longer) <= width or not rows[-1] else [rows[-1], fact]
    return rows


def _losses(seen: Overview, width: int) -> Iterator[RenderableType]:
    points = seen.losses.points(_bar(width))
    if not points:
        return
    means = [mean for _, mean, _, _ in points]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    yield Text("".join(_BLOCKS[round((mean - low) * scale)] for mean in means), style="cyan")
    first = seen.losses.first_step
    yield Text(f"loss {means[-1]:.4g}, from {high:.4g} to {low:.4g} since step {first:,}")


def _goodput(seen: Overview, width: int) -> Iterator[RenderableType]:
    goodput = seen.goodput
    if goodput.share is None:
        return
    bar, total_s = Text(), 0.0
    legend: list[RenderableType] = []
    for bucket, seconds in goodput.seconds.items():
        if seconds > 0:
            total_s += seconds
            end = round(_bar(width) * min(1.0, total_s / goodput.wall_s))
            bar.append("█" * (end - len(bar)), style=_BUCKETS[bucket])
            legend.append(Text.assemble(("■ ", _BUCKETS[bucket]), f"{bucket} {_duration(seconds)}"))
    yield bar
    yield Text(f"goodput {goodput.share:.1%} of {_duration(goodput.wall_s)}")
    yield Columns(legend, padding=(0, 2, 0, 0))
    if goodput.recoveries:
        last = goodput.recoveries[-1]
        text = f"last restart: {last.cause}, {last.lost_steps} steps lost, training again after {last.seconds:.1f} s"
        yield Text(text)


def _checkpoints(seen: Overview, width: int, most: int) -> Iterator[RenderableType]:
    if not seen.num_checkpoints:
        yield Text("\nno checkpoint yet", style="dim")
        return
    newest = seen.newest_stable
    stable = f"newest stable: step {newest.step:,}" if newest else "none is stable"
    yield Text(f"\ncheckpoints: {seen.num_checkpoints}, {stable}", style="bold")
    if seen.cadence is not None:
        yield Text(f"every_steps: auto: {seen.cadence}", style="dim")
    table = Table(box=None, pad_edge=False)
    names = ("checkpoint", "step", "state", "made")[: 3 if width < _NARROW else 4]
    for name in names:
        # In one line each, and what a state is due to is the first to be cut.
        table.add_column(
            name,
            justify="right" if name == "step" else "left",
            header_style="dim",
            no_wrap=True,
            min_width=None if name == "state" else 18 if name == "checkpoint" else 4,
        )
    for info in seen.checkpoints[:most]:
        step, made = (f"{info.step:,}", info.manifest.created_at) if info.manifest else ("-", "")
        table.add_row(*(str(info.ref), step, f"{info.state} {info.detail}".rstrip(), made)[: len(names)])
    if most:
        yield table


def _events(seen: Overview, width: int, most: int) -> Iterator[RenderableType]:
    lines = list(told(seen.events[-200:], seen.num_steps, seen.global_batch_size))
    if not (lines and most):
        return
    yield Text("\nlast events", style="bold")
    for time_s, line in lines[-most:]:
        clock = _clock(time_s)[11 if width < _NARROW else 0 :]
        yield Text(f"{clock}  {line.splitlines()[0]}", no_wrap=True, overflow="ellipsis")


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
