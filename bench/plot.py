"""The plot of a row, as SVG: ratios with their spread, or curves over a quantity that grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from bench.comparison import Comparison
from bench.figure import Figure

_WIDTH, _LEFT, _LINE, _HEIGHT = 900, 430, 26, 360
_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


def draw(results: Sequence[Comparison | Figure]) -> str:
    """Comparisons as ratios; figures that have points as curves, the others as bars."""
    comparisons = [one for one in results if isinstance(one, Comparison)]
    figures = [one for one in results if isinstance(one, Figure)]
    curves = [one for one in figures if one.points]
    if comparisons:
        return _ratios(comparisons)
    return _curves(curves) if curves else _bars(figures)


def _ratios(comparisons: Sequence[Comparison]) -> str:
    """A line for each: 10 % to 90 % of the pairs' ratios, the median as a dot, the goal as a stroke."""
    spreads = [np.quantile(one.ratios, (0.1, 0.5, 0.9)) for one in comparisons]
    goals = [one.goal for one in comparisons if one.goal is not None]
    scale = _Scale([*(float(value) for spread in spreads for value in spread), *goals, 1.0], _LEFT, _WIDTH - 20)
    shapes = [f'<path d="M{scale.x(1.0):.1f} 10V{_LINE * len(spreads) + 10}" stroke="#999" stroke-dasharray="3 3"/>']
    for index, (one, (low, middle, high)) in enumerate(zip(comparisons, spreads, strict=True)):
        y = _LINE * index + _LINE
        colour = "#dc2626" if one.verdict == "missed" else _COLOURS[0]
        shapes.append(_text(_LEFT - 15, y + 4, f"{one.name} / {one.reference_name}", "end"))
        shapes.append(f'<path d="M{scale.x(low):.1f} {y}H{scale.x(high):.1f}" stroke="{colour}" stroke-width="3"/>')
        shapes.append(f'<circle cx="{scale.x(middle):.1f}" cy="{y}" r="5" fill="{colour}"/>')
        if one.goal is not None:
            shapes.append(f'<path d="M{scale.x(one.goal):.1f} {y - 9}v18" stroke="#111" stroke-width="2"/>')
    bottom = _LINE * (len(spreads) + 1) + 12
    shapes += [_text(scale.x(tick), bottom, f"{tick:.3g}", "middle") for tick in scale.ticks]
    shapes.append(_text(_LEFT - 15, bottom, "ours / other: ratio of times, median and 80 % of pairs", "end"))
    return _svg(shapes, bottom + 10)


def _curves(figures: Sequence[Figure]) -> str:
    """Logarithmic on both axes."""
    across = _Scale([x for one in figures for x, _ in one.points], 60, _LEFT + 150, logarithmic=True)
    up = _Scale([y for one in figures for _, y in one.points], _HEIGHT - 40, 15, logarithmic=True)
    shapes = [f'<path d="M60 {up.x(tick):.1f}H{_LEFT + 150}" stroke="#ddd"/>' for tick in up.ticks]
    shapes += [_text(54, up.x(tick) + 4, f"{tick:.3g}", "end") for tick in up.ticks]
    shapes += [_text(across.x(tick), _HEIGHT - 18, f"{tick:,.0f}", "middle") for tick in across.ticks]
    for index, one in enumerate(figures):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{across.x(x):.1f},{up.x(y):.1f}" for x, y in one.points)
        dash = "" if index < len(_COLOURS) else ' stroke-dasharray="5 3"'
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        shapes.append(f'<path d="M{_LEFT + 160} {21 * index + 16}h18" stroke="{colour}" stroke-width="2"{dash}/>')
        shapes.append(_text(_LEFT + 184, 21 * index + 20, one.name, "start"))
    return _svg(shapes, _HEIGHT)


def _bars(figures: Sequence[Figure]) -> str:
    most = max([one.value for one in figures] + [one.goal for one in figures if one.goal is not None], default=1.0)
    shapes = []
    for index, one in enumerate(figures):
        y, width = _LINE * index + _LINE, (_WIDTH - _LEFT - 90) / (most or 1.0)
        shapes.append(_text(_LEFT - 15, y + 4, one.name, "end"))
        shapes.append(f'<rect x="{_LEFT}" y="{y - 8}" width="{width * one.value:.1f}" height="16" fill="#2563eb"/>')
        shapes.append(_text(_LEFT + width * one.value + 6, y + 4, f"{one.value:.4g} {one.unit}", "start"))
        if one.goal is not None:
            shapes.append(f'<path d="M{_LEFT + width * one.goal:.1f} {y - 11}v22" stroke="#111" stroke-width="2"/>')
    return _svg(shapes, _LINE * (len(figures) + 1))


class _Scale:
    """From values to places."""

    def __init__(self, values: Sequence[float], begin: float, end: float, logarithmic: bool = False) -> None:
        self._log = logarithmic
        scaled = [self._scaled(value) for value in values]
        margin = (max(scaled) - min(scaled)) * 0.05 or 0.1
        self._low, self._high = min(scaled) - margin, max(scaled) + margin
        self._begin, self._end = begin, end
        positions = np.linspace(min(scaled), max(scaled), 5).tolist()
        self.ticks = [10**position for position in positions] if logarithmic else positions

    def x(self, value: float) -> float:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._begin + share * (self._end - self._begin)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(shapes: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif"'
        f' font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )
