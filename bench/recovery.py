"""From the SIGKILL of a trainer to its next completed step: ours under Ray Train, beside the restarts of others.

These are torchrun's, with a file of safetensors a rank, and plain Ray Train's, with torch's distributed checkpoint. All
train the digits config and keep model, moments and EMA; all go on from a checkpoint, ours with hashes and fingerprints
checked. The kills alternate between the programs, and between the ranks; they fall at a random moment of a step. The
programs that are not measured are stopped meanwhile, with every helper that they have.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.arm import Arm
from bench.comparison import Comparison
from bench.programs import both, plain_ray
from orchestrator.config import load_config, to_dict

_MAX_S = 1.0
_GOAL = 1.0
_EVERY_STEPS = 10
_STEPS_BETWEEN = 12
"""Steps from a recovery to the next kill: more than from one checkpoint to the next, as in a run that gets on."""


def measure(quick: bool) -> list[Comparison]:
    """Ours beside each of the others; a pair is one kill on each side."""
    num_kills = 2 if quick else 10
    overrides = ["train.num_steps=1000000", f"checkpoint.every_steps={_EVERY_STEPS}", "run.name=recovery"]
    overrides += ["validation.num_samples=null", "validation.every_steps=null", "samples.every_steps=null"]
    moments = random.Random(0)
    config = to_dict(load_config("configs/digits.yaml", overrides))
    with both(config, bare_keeps_state=True) as two, plain_ray(config, _EVERY_STEPS) as third:
        arms = (*two, third)
        sides = [_Side(arm) for arm in arms]
        for side in sides:
            side.hear("saved")
        for arm in arms:
            arm.freeze()
        kills: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
        steps: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for index in range(num_kills):
            for arm, side in zip(arms, sides, strict=True):
                arm.thaw()
                ends = [side.hear("step")[-1]["time_s"] for _ in range(_STEPS_BETWEEN)]
                steps[arm.name] += np.diff(ends[1:]).tolist()  # the first may have ended before the stop
                time.sleep(moments.uniform(0, 0.5))
                kills[arm.name].append(side.kill(rank=index % 2))
                arm.freeze()
    totals = {name: [sum(parts.values()) for parts in every] for name, every in kills.items()}
    notes = {
        **{f"longest (ms), {name}": 1000 * max(times) for name, times in totals.items()},
        "an ordinary step (ms)": {name: 1000 * float(np.median(times)) for name, times in steps.items()},
        **{f"medians of the parts (ms), {name}": _medians(every) for name, every in kills.items()},
    }
    return [
        Comparison(
            name="SIGKILL to next step: Ray Train",
            reference_name=name,
            ours_s=totals["ray"],
            reference_s=totals[arm.name],
            goal=_GOAL,
            max_s=_MAX_S,
            notes=notes if arm is arms[1] else {},
        )
        for arm, name in ((arms[1], "torchrun"), (arms[2], "plain Ray Train, torch DCP"))
    ]


_OTHERS = {
    "detect, all down, start, import": "imported",
    "process group": "process group",
    "build": "built",
    "restore": "restored",
    "first step": "step",
}
_PARTS = {
    "ray": {
        "detect": "down",
        "all down": "failure",
        "claim and list": "attempt",
        "fork": "trainer",
        "process group": "process group",
        "build": "built",
        "restore": "training",
        "first step": "step",
    },
    "torchrun": _OTHERS,
    "plain ray": _OTHERS,
}
"""The parts of a recovery, in order, and what ends each on the last rank."""


class _Side:
    """One of the programs, with the process ids of its trainers."""

    def __init__(self, arm: Arm) -> None:
        self._arm = arm
        self._parts = _PARTS[arm.name]
        self._pids: dict[int, int] = {}

    def hear(self, kind: str, after_s: float = 0.0) -> list[dict[str, Any]]:
        """The lines up to the first of this kind that was written after the given time."""
        lines = self._arm.wait_for(
            lambda line: line["kind"] == kind and line.get("rank", 0) == 0 and line["time_s"] > after_s, timeout_s=300
        )
        self._pids |= {line["rank"]: line["pid"] for line in lines if {"rank", "pid"} <= line.keys()}
        return lines

    def kill(self, rank: int) -> dict[str, float]:
        """Seconds of every part, from the signal to the end of the next step."""
        began = time.time()
        os.kill(self._pids[rank], signal.SIGKILL)
        # The other rank may still end its step; what counts is the first one after the restore.
        lines = self.hear(self._parts["restore"], after_s=began)
        assert lines[-1]["step"] > 0, f"started from the beginning: {lines}"
        lines += self.hear("step")
        return self._split(began, [line for line in lines if line["time_s"] > began])

    def _split(self, began: float, lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        seconds = {}
        for part, kind in self._parts.items():
            end = max(line["time_s"] for line in lines if line.get("stage", line["kind"]) == kind)
            seconds[part], began = end - began, end
        return seconds


def _medians(kills: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: 1000 * float(np.median([parts[part] for parts in kills])) for part in kills[0]}
