"""From what was measured to `bench/results/ROW.json`, `ROW.svg` and `bench/README.md`."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.comparison import Comparison
from bench.figure import Figure
from bench.not_measured import NotMeasured
from bench.plot import draw

Result = Comparison | Figure | NotMeasured
_KINDS = {"comparisons": Comparison, "figures": Figure, "not_measured": NotMeasured}
"""Key in a result file -> what is listed there."""

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"

_INTRODUCTION = """\
# Benchmarks

`make bench` measures every row on your machine and writes `bench/results/ROW.json`, a plot of it, and this file;
`python -m bench reduction ema` only these rows. What is compared runs interleaved in one script: `ratio` is the
median of the ratios of pairs, ours to the other, so less is better; behind it its 90 % bootstrap interval. A goal
`holds` only if the upper end of that meets it, and is `open` if the median alone does. The frameworks that are met
here are the extra `bench` (`pip install -e '.[bench]'`); a row says which of them it did without. The row `gpu` needs
a GPU, but neither Ray nor that extra: `python -m bench gpu`, or `torchrun --nproc-per-node W -m bench gpu` for
several.
"""


def conditions(on_gpu: bool = False) -> dict[str, Any]:
    """Where and when a row is measured. Args: on_gpu: which GPU there is, if there is one, is of interest."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        **({"gpu": torch.cuda.get_device_name()} if on_gpu and torch.cuda.is_available() else {}),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "diffusers", "ray")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def store(
    row: str, where: dict[str, Any], results: Sequence[Result], folder: Path = RESULTS, only: str | None = None
) -> None:
    """Write the row's result file, with every single time in it.

    What was measured elsewhere stays, if here nothing could be.

    Args:
        only: the part of the row that was measured; what is stored of other parts is kept. None: the whole row.
    """
    before = load(row, folder)[1] if (folder / f"{row}.json").exists() else []
    if _nothing(results) and not _nothing(before):
        return
    others = [one for one in before if only is not None and one.name.split(":")[0] not in (only, "limits", row)]
    where, results = {**where, "load_at_end": os.getloadavg()[0]}, [*others, *results]
    comparisons = [
        {**asdict(one), "ratio": one.ratio, "interval": one.interval, "verdict": one.verdict}
        for one in results
        if isinstance(one, Comparison)
    ]
    figures = [{**asdict(one), "verdict": one.verdict} for one in results if isinstance(one, Figure)]
    missing = [asdict(one) for one in results if isinstance(one, NotMeasured)]
    listed = {"comparisons": _rounded(comparisons), "figures": _rounded(figures), "not_measured": missing}
    content = {"conditions": where, **listed}
    folder.mkdir(exist_ok=True)
    (folder / f"{row}.json").write_text(json.dumps(content, indent=1))


def load(row: str, folder: Path = RESULTS) -> tuple[dict[str, Any], list[Result]]:
    """What `store` wrote."""
    content = json.loads((folder / f"{row}.json").read_text())
    derived = ("ratio", "interval", "verdict")
    found: list[Result] = []
    for key, kind in _KINDS.items():
        for line in content.get(key, ()):
            found.append(kind(**{name: value for name, value in line.items() if name not in derived}))
    return content["conditions"], found


def write_readme(rows: Sequence[str], readme: Path = README, folder: Path = RESULTS) -> None:
    """Write this folder's README and the plots from the stored results of `rows`; those without any are left out."""
    for row in (row for row in rows if (folder / f"{row}.json").exists()):
        if plot := plotted(load(row, folder)[1]):
            (folder / f"{row}.svg").write_text(plot)
    readme.write_text(compose(rows, folder))


def plotted(results: Sequence[Result]) -> str:
    """The row's plot; empty, if there is nothing in it."""
    measured = [one for one in results if not isinstance(one, NotMeasured)]
    return draw(measured) if measured else ""


def reasons(row: str, results: Sequence[Result]) -> str:
    """Why nothing of a row was measured, in a line; empty, if something was."""
    if not _nothing(results):
        return ""
    return "\n".join(f"{row}: not measured: {one.reason}" for one in results if isinstance(one, NotMeasured))


def broken_requirements(results: Sequence[Result]) -> list[str]:
    """The figures that had to meet their goals, and do not."""
    return [one.name for one in results if isinstance(one, Figure) and one.required and one.verdict == "missed"]


def _nothing(results: Sequence[Result]) -> bool:
    return all(isinstance(one, NotMeasured) for one in results)


def compose(rows: Sequence[str], folder: Path = RESULTS) -> str:
    """The README as it follows from the stored results."""
    found = {row: load(row, folder) for row in rows if (folder / f"{row}.json").exists()}
    parts = [_INTRODUCTION, _overview(found)]
    for row, (where, results) in found.items():
        parts.append(section(row, where, results, "" if _nothing(results) else f"![{row}](results/{row}.svg)"))
    return "\n".join(parts) + "\n"


def section(row: str, where: dict[str, Any], results: Sequence[Result], plot: str = "") -> str:
    """A row's part of the report."""
    described = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in where.items())
    comparisons = [one for one in results if isinstance(one, Comparison)]
    figures = [one for one in results if isinstance(one, Figure)]
    notes = [
        f"- {one.name}: " + "; ".join(f"{key}: {_plain(value)}" for key, value in one.notes.items())
        for one in (*comparisons, *figures)
        if one.notes
    ]
    notes += [f"- {one.name}: not measured: {one.reason}" for one in results if isinstance(one, NotMeasured)]
    parts = [f"## {row}", described, plot, _compared(comparisons), _counted(figures), "\n".join(notes)]
    return "\n" + "\n\n".join(part for part in parts if part)


def _overview(found: dict[str, tuple[dict[str, Any], list[Result]]]) -> str:
    """Every figure that has a goal, and what could not be measured."""
    lines = ["| row | what | figure | goal | | measured on |", "|---|---|---|---|---|---|"]
    for row, (where, results) in found.items():
        place = f"{where.get('gpu', '')} {where['cores']} cores {where['cpu']}, {where['time']}".lstrip()
        for one in results:
            if isinstance(one, NotMeasured):
                lines.append(f"| [{row}](#{row}) | {one.name} | not measured: {one.reason} | | | {place} |")
                continue
            if one.goal is None:
                continue
            what = f"{one.name} / {one.reference_name}" if isinstance(one, Comparison) else one.name
            lines.append(f"| [{row}](#{row}) | {what} | {_figure(one)} | {_goal(one)} | {one.verdict} | {place} |")
    return "\n".join(lines)


def _figure(one: Comparison | Figure) -> str:
    if isinstance(one, Comparison):
        low, high = one.interval
        return f"{one.ratio:.3f} ({low:.3f} .. {high:.3f})"
    return f"{one.value:.4g} {one.unit}".strip()


def _goal(one: Comparison | Figure) -> str:
    if one.goal is None:
        return ""
    if isinstance(one, Figure):
        return f"{'>=' if one.at_least else '<='} {one.goal:g}"
    longest = "" if one.max_s is None else f", <= {1000 * one.max_s:.0f} ms"
    return f"<= {one.goal:g}{longest}"


def _compared(comparisons: Sequence[Comparison]) -> str:
    """Medians with the 10 % and 90 % quantiles, the ratio with its interval, and the verdict."""
    lines = [
        "| ours | ms (p10 .. p90) | beside | ms (p10 .. p90) | pairs | ratio (90 % interval) | goal | |",
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
