"""From what was measured to `bench/results/ROW.json`, `ROW.svg` and `bench/README.md`."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.comparison import Comparison
from bench.figure import Figure
from bench.plot import draw

Result = Comparison | Figure

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"

_INTRODUCTION = """\
# Benchmarks

`make bench` measures every row on your machine and writes `bench/results/ROW.json`, a plot of it, and this file;
`python -m bench reduction ema` only these rows. What is compared runs interleaved in one script: `ratio` is the median
of the ratios of pairs, ours to the other, so less is better; behind it the upper end of its 95 % bootstrap interval. A
goal `holds` only if that bound meets it, and is `open` if the median alone does. The frameworks that are met here are
the extra `bench` (`pip install -e '.[bench]'`); a row says which of them it did without.
"""


def conditions() -> dict[str, Any]:
    """Where and when a row is measured."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "ray")},
    }


def store(row: str, where: dict[str, Any], results: Sequence[Result], folder: Path = RESULTS) -> None:
    """Write the row's result file, with every single time in it."""
    where = {**where, "load_at_end": os.getloadavg()[0]}
    comparisons = [
        {**asdict(one), "ratio": one.ratio, "upper_bound": one.upper_bound, "verdict": one.verdict}
        for one in results
        if isinstance(one, Comparison)
    ]
    figures = [{**asdict(one), "verdict": one.verdict} for one in results if isinstance(one, Figure)]
    content = {"conditions": where, "comparisons": _rounded(comparisons), "figures": _rounded(figures)}
    folder.mkdir(exist_ok=True)
    (folder / f"{row}.json").write_text(json.dumps(content, indent=1))


def load(row: str, folder: Path = RESULTS) -> tuple[dict[str, Any], list[Result]]:
    """What `store` wrote."""
    content = json.loads((folder / f"{row}.json").read_text())
    derived = ("ratio", "upper_bound", "verdict")
    found: list[Result] = []
    for kind, key in ((Comparison, "comparisons"), (Figure, "figures")):
        for line in content.get(key, ()):
            found.append(kind(**{name: value for name, value in line.items() if name not in derived}))
    return content["conditions"], found


def write_readme(rows: Sequence[str], readme: Path = README, folder: Path = RESULTS) -> None:
    """Write this folder's README and the plots from the stored results of `rows`; those without any are left out."""
    for row in (row for row in rows if (folder / f"{row}.json").exists()):
        (folder / f"{row}.svg").write_text(draw(load(row, folder)[1]))
    readme.write_text(compose(rows, folder))


def compose(rows: Sequence[str], folder: Path = RESULTS) -> str:
    """The README as it follows from the stored results."""
    found = {row: load(row, folder) for row in rows if (folder / f"{row}.json").exists()}
    parts = [_INTRODUCTION, _overview(found)]
    parts += [section(row, where, results, f"![{row}](results/{row}.svg)") for row, (where, results) in found.items()]
    return "\n".join(parts) + "\n"


def section(row: str, where: dict[str, Any], results: Sequence[Result], plot: str = "") -> str:
    """A row's part of the report."""
    described = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in where.items())
    comparisons = [one for one in results if isinstance(one, Comparison)]
    figures = [one for one in results if isinstance(one, Figure)]
    notes = [
        f"- {one.name}: " + "; ".join(f"{key}: {_plain(value)}" for key, value in one.notes.items())
        for one in results
        if one.notes
    ]
    parts = [f"## {row}", described, plot, _compared(comparisons), _counted(figures), "\n".join(notes)]
    return "\n" + "\n\n".join(part for part in parts if part)


def _overview(found: dict[str, tuple[dict[str, Any], list[Result]]]) -> str:
    """Every figure that has a goal."""
    lines = ["| row | what | figure | goal | | measured on |", "|---|---|---|---|---|---|"]
    for row, (where, results) in found.items():
        place = f"{where['cores']} cores {where['cpu']}, {where['time']}"
        for one in (one for one in results if one.goal is not None):
            what = f"{one.name} / {one.reference_name}" if isinstance(one, Comparison) else one.name
            lines.append(f"| [{row}](#{row}) | {what} | {_figure(one)} | {_goal(one)} | {one.verdict} | {place} |")
    return "\n".join(lines)


def _figure(one: Result) -> str:
    if isinstance(one, Comparison):
        return f"{one.ratio:.3f} ({one.upper_bound:.3f})"
    return f"{one.value:.4g} {one.unit}".strip()


def _goal(one: Result) -> str:
    if one.goal is None:
        return ""
    if isinstance(one, Figure):
        return f"{'>=' if one.at_least else '<='} {one.goal:g}"
    longest = "" if one.max_s is None else f", <= {1000 * one.max_s:.0f} ms"
    return f"<= {one.goal:g}{longest}"


def _compared(comparisons: Sequence[Comparison]) -> str:
    """Medians with the 10 % and 90 % quantiles, the ratio with its bound, and the verdict."""
    lines = [
        "| ours | ms (p10 .. p90) | beside | ms (p10 .. p90) | pairs | ratio (95 % bound) | goal | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {_spread(one.ours_s)} | {one.reference_name} | {_spread(one.reference_s)}"
        f" | {len(one.ours_s)} | {_figure(one)} | {_goal(one)} | {one.verdict} |"
        for one in comparisons
    ]
    return "\n".join(lines) if comparisons else ""


def _counted(figures: Sequence[Figure]) -> str:
    lines = ["| what | figure | goal | |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {_figure(one)} | {_goal(one)} | {one.verdict} |" for one in figures]
    return "\n".join(lines) if figures else ""


def _spread(times_s: Sequence[float]) -> str:
    low, middle, high = 1000 * np.quantile(times_s, (0.1, 0.5, 0.9))
    digits = 0 if middle >= 100 else 1
    return f"{middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rounded(value: Any) -> Any:
    """Six digits are more than a clock gives, and keep the files small."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
