"""Letting programs run in turn, some steps at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from bench.arm import Arm

_WARM_UP_STEPS = 5
_SETTLE_S = 2.0
"""After an arm is let go on: its daemons make up for the time in which they were stopped."""


def warm_up(arms: Sequence[Arm], timeout_s: float = 300) -> None:
    """Wait until every arm steps, one after the other, and stop them all."""
    for arm in arms:
        arm.thaw()
        arm.wait_for(lambda line: line["kind"] == "step" and line["step"] >= _WARM_UP_STEPS, timeout_s)
        arm.freeze()


def take_turns(arms: Sequence[Arm], turns: int, steps: int) -> dict[str, list[list[float]]]:
    """Seconds of every step of every turn, by arm. The order alternates; whoever is not measured is stopped."""
    every: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    for turn in range(turns):
        for arm in arms if turn % 2 == 0 else arms[::-1]:
            every[arm.name].append(_one_turn(arm, steps))
    return every


def medians(every: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """The median step of every turn."""
    return {name: [float(np.median(times)) for times in turns] for name, turns in every.items()}


def _one_turn(arm: Arm, steps: int) -> list[float]:
    """Let the arm run until it has done some whole steps; the seconds of each."""
    arm.thaw()
    # A line may have been on its way when the arm was stopped: what counts is when the step ended.
    began, ends = time.time(), []
    while len(ends) < steps + 1:  # the first end only begins the next step
        line = arm.wait_for(lambda line: line["kind"] == "step" and line.get("rank", 0) == 0)[-1]
        if line["time_s"] > began + _SETTLE_S:
            ends.append(line["time_s"])
    arm.freeze()
    return np.diff(ends).tolist()
