"""What all of unbroken costs a step: under Ray Train with EMA on, beside a bare torch loop under torchrun.

The bare loop trains the same model on the same number of microbatches, with FSDP2, AdamW and clipping; it has no EMA,
no per-sample randomness, no invariant reduction and nobody who watches it. Both programs live all the time and are let
run in turn for some steps, the other one being stopped with every helper that it has. A step's time is the time between
the ends of two steps.
"""

from __future__ import annotations

from typing import Any

from bench.comparison import Comparison
from bench.programs import both
from bench.turns import medians, take_turns, warm_up
from bench.workload import MIDDLE, SMOKE, config

_GOAL = 1.03
_CASES = ((2, 4), (4, 4))
"""Microbatches a step, and their size: one and two for each of the two ranks."""


def measure(quick: bool) -> list[Comparison]:
    """One comparison for each number of microbatches; a pair is one turn of each side, its times are medians."""
    channels, turns, steps = (SMOKE, 2, 3) if quick else (MIDDLE, 10, 4)
    comparisons = []
    for num_microbatches, size in _CASES[:1] if quick else _CASES:
        times, longest = _take_turns(_run_config(channels, size, num_microbatches), turns, steps)
        comparisons.append(
            Comparison(
                name=f"W=2 M={num_microbatches}, microbatch {size}: Ray Train, EMA",
                reference_name="torchrun, no EMA",
                ours_s=times["ray"],
                reference_s=times["torchrun"],
                goal=_GOAL,
                notes={"steps in a turn": steps, "longest single step (ms)": longest},
            )
        )
    return comparisons


def _run_config(channels: tuple[int, ...], size: int, num_microbatches: int) -> dict[str, Any]:
    return {
        **config(channels, microbatch_size=size, num_microbatches=num_microbatches),
        "run": {"name": "overhead"},
        "workers": 2,
        "optimizer": {"lr": 1e-4},
        "ema": {"main": {"decay": 0.999}},
        "checkpoint": {"every_steps": 1_000_000},
    }


def _take_turns(run: dict[str, Any], turns: int, steps: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The median step of every turn, in seconds, and the longest step, in milliseconds; by arm."""
    with both(run, bare_keeps_state=False) as arms:
        warm_up(arms)
        every = take_turns(arms, turns, steps)
    return medians(every), {name: 1000 * max(map(max, turns_)) for name, turns_ in every.items()}
