"""Two ways of doing one thing, timed in pairs; what may be said of them."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Times of `ours` and of `reference`, pair by pair: entry i of both was measured at about the same moment."""

    name: str
    reference_name: str
    ours_s: Sequence[float]
    reference_s: Sequence[float]
    goal: float | None = None
    """The ratio must be at most this; None: shown for information."""
    max_s: float | None = None
    """The median of `ours` must be at most this, too."""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median of the ratios of the pairs."""
        return float(np.median(self._ratios()))

    @property
    def upper_bound(self) -> float:
        """95 % of bootstrap resamples of the pairs have a median ratio of at most this."""
        ratios = self._ratios()
        draws = np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios)))
        return float(np.quantile(np.median(draws, axis=1), 0.95))

    @property
    def verdict(self) -> str:
        """Whether the goal is met: `holds` if so even at the upper bound, `open` if only at the median."""
        if self.goal is None:
            return ""
        if self.ratio > self.goal or (self.max_s is not None and np.median(self.ours_s) > self.max_s):
            return "missed"
        return "holds" if self.upper_bound <= self.goal else "open"

    def _ratios(self) -> np.ndarray:
        assert len(self.ours_s) == len(self.reference_s) > 0, (len(self.ours_s), len(self.reference_s))
        return np.asarray(self.ours_s) / np.asarray(self.reference_s)


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


def store(row: str, where: dict[str, Any], comparisons: Sequence[Comparison], folder: Path = RESULTS) -> None:
    """Write the row's result file, with every single time in it."""
    where = {**where, "load_at_end": os.getloadavg()[0]}
    lines = [
        {**asdict(one), "ratio": one.ratio, "upper_bound": one.upper_bound, "verdict": one.verdict}
        for one in comparisons
    ]
    folder.mkdir(exist_ok=True)
    (folder / f"{row}.json").write_text(json.dumps({"conditions": where, "comparisons": _rounded(lines)}, indent=1))


def load(row: str, folder: Path = RESULTS) -> tuple[dict[str, Any], list[Comparison]]:
    """What `store` wrote."""
    result = json.loads((folder / f"{row}.json").read_text())
    derived = ("ratio", "upper_bound", "verdict")
    lines = [{key: value for key, value in line.items() if key not in derived} for line in result["comparisons"]]
    return result["conditions"], [Comparison(**line) for line in lines]


def table(comparisons: Sequence[Comparison]) -> str:
    """Markdown: medians with the 10 % and 90 % quantiles, the ratio with its bound, and the verdict."""
    lines = [
        "| ours | ms (p10 .. p90) | beside | ms (p10 .. p90) | pairs | ratio (95 % bound) | goal | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        goal = "" if one.goal is None else f"<= {one.goal:g}"
        if one.max_s is not None:
            goal += f", <= {1000 * one.max_s:.0f} ms"
        lines.append(
            f"| {one.name} | {_spread(one.ours_s)} | {one.reference_name} | {_spread(one.reference_s)}"
            f" | {len(one.ours_s)} | {one.ratio:.3f} ({one.upper_bound:.3f}) | {goal} | {one.verdict} |"
        )
    notes = [f"- {one.name}: {key}: {_plain(value)}" for one in comparisons for key, value in one.notes.items()]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def section(row: str, where: dict[str, Any], comparisons: Sequence[Comparison]) -> str:
    """A row's part of the report."""
    described = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in where.items())
    return f"\n## {row}\n\n{described}\n\n{table(comparisons)}"


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
