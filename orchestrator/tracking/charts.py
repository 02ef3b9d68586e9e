"""Drawings of a report: SVG for shapes, HTML for words.

Shapes stretch to the width of the page and words keep their size, so that both are readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from orchestrator.tracking.goodput import Bucket, Goodput, Span

_WIDTH, _HEIGHT = 1000, 300
_COLUMNS = 600
"""Of a timeline: more cannot be told apart."""
_MOST_MARKS = 300


def line_chart(points: Sequence[tuple[int, float, float, float]], redone: Sequence[tuple[int, int, str]]) -> str:
    """A metric over steps: its mean as a line, its range as a band.

    Args:
        points: step, mean, least and greatest value, by step.
        redone: for each restart where it went on from, how far training had come before, and a text.
    """
    first, last = points[0][0], points[-1][0]
    axis = _Axis(min(low for *_, low, _ in points), max(high for *_, high in points))

    def x(step: int) -> float:
        return _WIDTH * (step - first) / max(1, last - first)

    def y(value: float) -> float:
        return _HEIGHT * (1 - axis.share(value))

    upper = [f"{x(step):.1f},{y(high):.1f}" for step, _, _, high in points]
    lower = [f"{x(step):.1f},{y(low):.1f}" for step, _, low, _ in reversed(points)]
    mean = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value, _, _ in points)
    if len(points) == 1:  # a line of one point is not seen
        mean += f" {_WIDTH},{y(points[0][1]):.1f}"
    shapes = [f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>' for tick in axis.ticks]
    for begin, end, text in redone[-_MOST_MARKS:]:
        left, right = (x(min(last, max(first, step))) for step in (begin, end))
        shapes.append(
            f'<rect class="redone" x="{left:.1f}" width="{right - left:.1f}" height="{_HEIGHT}"/>'
            f'<path class="restarted" d="M{right:.1f} 0V{_HEIGHT}"><title>{escape(text)}</title></path>'
        )
    shapes += [f'<polygon class="band" points="{" ".join(upper + lower)}"/>', f'<polyline points="{mean}"/>']
    labels = "".join(f'<span style="top:{100 * (1 - axis.share(tick)):.2f}%">{tick:.3g}</span>' for tick in axis.ticks)
    parts = min(4, last - first)  # of a few steps none is named twice
    names = (first + round(part * (last - first) / max(1, parts)) for part in range(parts + 1))
    below = "".join(f"<span>{name:,}</span>" for name in names)
    kind = " (logarithmic)" if axis.logarithmic else ""
    return (
        f'<figure class="chart"><div class="ticks">{labels}</div>{_svg("".join(shapes), _HEIGHT)}'
        f'<div class="steps">{below}</div></figure><p class="note">over steps{kind}</p>'
    )


class _Axis:
    """Where a value lies between the least and the greatest; logarithmic if they are far apart."""

    def __init__(self, low: float, high: float) -> None:
        self.logarithmic = low > 0 and high / low > 10
        if not self.logarithmic:
            margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
            low, high = low - margin, high + margin
        self._low, self._high = self._scaled(low), self._scaled(high)
        spread = self._high - self._low or 1.0
        positions = [self._low + spread * part / 4 for part in range(5)]
        self.ticks = [10**position for position in positions] if self.logarithmic else positions

    def share(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        return (self._scaled(value) - self._low) / (self._high - self._low or 1.0)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def timeline(goodput: Goodput, attempts: Sequence[Span], saves: Sequence[float], restarts: Sequence[float]) -> str:
    """What the wall time went into, with attempts, saves and restarts below each other.

    Args:
        attempts: from the claim of each to the end of its time.
        saves, restarts: Unix times.
    """
    begin, wall, column = goodput.begin_s, goodput.wall_s, _WIDTH / _COLUMNS

    def x(time_s: float) -> float:
        return _WIDTH * min(1.0, max(0.0, (time_s - begin) / wall))

    bars = [
        f'<rect class="{bucket}" x="{first * column:.2f}" width="{count * column:.2f}" height="40"/>'
        for bucket, first, count in _columns(goodput)
    ]
    stripes = [
        f'<rect class="attempt{index % 2}" x="{x(span.begin_s):.2f}" y="0" height="30"'
        f' width="{max(1.0, x(span.end_s) - x(span.begin_s)):.2f}"><title>attempt {index + 1}</title></rect>'
        for index, span in enumerate(attempts)
    ]
    rows = (
        ("time", "".join(bars), 40),
        (f"{len(attempts)} attempts", "".join(stripes[-_MOST_MARKS:]), 30),
        (f"{len(saves)} saves", _strokes("save", [x(time_s) for time_s in saves]), 20),
        (f"{len(restarts)} restarts", _strokes("mark", [x(time_s) for time_s in restarts]), 20),
    )
    return '<div class="timeline">' + "".join(f"<span>{name}</span>{_svg(s, h)}" for name, s, h in rows) + "</div>"


def _columns(goodput: Goodput) -> list[tuple[Bucket, int, int]]:
    """The bucket that has most of each column of the timeline, as runs: bucket, first column, number of columns."""
    booked: list[dict[Bucket, float]] = [{} for _ in range(_COLUMNS)]
    each = goodput.wall_s / _COLUMNS
    for span in goodput.spans:
        begin, end = (span.begin_s - goodput.begin_s) / each, (span.end_s - goodput.begin_s) / each
        for column in range(int(begin), min(_COLUMNS, math.ceil(end))):
            part = min(end, column + 1) - max(begin, column)
            booked[column][span.bucket] = booked[column].get(span.bucket, 0.0) + part
    runs: list[tuple[Bucket, int, int]] = []
    for column, parts in enumerate(booked):
        bucket = max(parts, key=lambda bucket: (parts[bucket], bucket)) if parts else Bucket.DOWN
        if runs and runs[-1][0] is bucket:
            runs[-1] = (bucket, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((bucket, column, 1))
    return runs


def _strokes(name: str, positions: Sequence[float]) -> str:
    places = sorted(
        {round(position * _COLUMNS / _WIDTH) for position in positions}
    )  # what falls together is drawn once
    return "".join(f'<path class="{name}" d="M{_WIDTH * place / _COLUMNS:.1f} 0V20"/>' for place in places)


def shares(goodput: Goodput) -> str:
    """The buckets as one bar."""
    bars, at = [], 0.0
    for bucket, seconds in goodput.seconds.items():
        width = _WIDTH * seconds / goodput.wall_s
        bars.append(f'<rect class="{bucket}" x="{at:.2f}" width="{width:.2f}" height="40"/>')
        at += width
    return f'<div class="shares">{_svg("".join(bars), 40)}</div>'


def _svg(shapes: str, height: int) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" preserveAspectRatio="none" role="img">{shapes}</svg>'
