"""From the SIGKILL of a trainer to its next completed step: ours under Ray Train, beside the restarts of others.

These are torchrun's, with a file of safetensors a rank, and plain Ray Train's, with torch's distributed checkpoint. All
train the digits config and keep model, moments and EMA; all go on from a checkpoint, ours with hashes and fingerprints
checked. The kills alternate between the programs, and between the ranks; they fall at a random moment of a step. The
programs that are not measured are stopped meanwhile, with every helper that they have.

Ray Train with torchft is another bargain: replicas, of which those that are left go on without the killed one. It is
met twice: with the first step of the survivor, and with the first one in which the killed replica takes part again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from bench.arm import Arm
from bench.comparison import Comparison
from bench.packages import versions
from bench.programs import both, plain_ray, torchft
from orchestrator.config import load_config, to_dict

_MAX_S = 1.0
_GOAL = 1.0
_EVERY_STEPS = 10
_STEPS_BETWEEN = 12
"""Steps from a recovery to the next kill: more than from one checkpoint to the next, as in a run that gets on."""
_LIGHTHOUSES = {
    "torchft": {},
    "torchft, tuned": {"heartbeat_timeout_ms": 1000, "quorum_tick_ms": 50, "join_timeout_ms": 1000},
}
"""Arms with torchft, and the settings that differ from its defaults."""
_REPLICAS = 2
_BARGAIN = (
    "two DDP replicas under Ray Train. Until the killed one is back, the batch is half as large; what it missed is not"
    " made up for, so the bits are not those of an undisturbed run. The state is in the replicas' memory alone"
)

Kills = Mapping[str, Sequence[Mapping[str, float]]]
"""By arm, and for each kill: the seconds of every part."""


def measure(quick: bool) -> list[Comparison]:
    """Ours beside each of the others; a pair is one kill on each side."""
    num_kills, num_replica_kills = (2, 1) if quick else (10, 4)
    overrides = ["train.num_steps=1000000", f"checkpoint.every_steps={_EVERY_STEPS}", "run.name=recovery"]
    overrides += ["validation.num_samples=null", "validation.every_steps=null", "samples.every_steps=null"]
    moments = random.Random(0)
    config = to_dict(load_config("configs/digits.yaml", overrides))
    with contextlib.ExitStack() as running:
        sides: list[_Side] = []
        # One after the other: together they would take the cores from each other for a minute.
        sides += _ready([_Side(arm) for arm in running.enter_context(both(config, bare_keeps_state=True))])
        sides += _ready([_Side(running.enter_context(plain_ray(config, _EVERY_STEPS)))])
        for name, lighthouse in _LIGHTHOUSES.items() if find_spec("torchft") else ():
            sides += _ready([_Replicas(running.enter_context(torchft(name, config, lighthouse)))])
        kills: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        steps: dict[str, list[float]] = {side.name: [] for side in sides}
        for index in range(num_kills):
            for side in sides:
                if isinstance(side, _Replicas) and index >= num_replica_kills:
                    continue
                side.arm.thaw()
                ends = side.settle()
                steps[side.name] += np.diff(ends[1:]).tolist()  # the first may have ended before the stop
                time.sleep(moments.uniform(0, 0.5))
                kills[side.name].append(side.kill(rank=index % 2))
                side.arm.freeze()
    return compare(kills, steps)


def compare(kills: Kills, steps: Mapping[str, Sequence[float]]) -> list[Comparison]:
    """What may be said of the kills. Args: steps: seconds of ordinary steps, by arm."""
    totals = {name: [sum(parts.values()) for parts in every] for name, every in kills.items()}
    notes = {
        **{f"longest (ms), {name}": 1000 * max(times) for name, times in totals.items()},
        "an ordinary step (ms)": {name: 1000 * float(np.median(times)) for name, times in steps.items()},
        **{f"medians of the parts (ms), {name}": _medians(every) for name, every in kills.items()},
    }
    if not kills.keys() & _LIGHTHOUSES.keys():
        notes |= versions(["torchft-nightly"])
    return [
        Comparison(
            name="SIGKILL to next step: Ray Train",
            reference_name=title,
            ours_s=totals["ray"],
            reference_s=totals[name],
            goal=_GOAL,
            max_s=_MAX_S,
            notes=notes if name == "torchrun" else {},
        )
        for name, title in (("torchrun", "torchrun"), ("plain ray", "plain Ray Train, torch DCP"))
    ] + [comparison for name in _LIGHTHOUSES if name in kills for comparison in _beside_replicas(name, kills)]


def _beside_replicas(name: str, kills: Kills) -> list[Comparison]:
    """With ours all ranks train again in the same step; with replicas these are two moments."""
    alone = [parts[_ALONE] for parts in kills[name]]
    whole = [sum(parts.values()) for parts in kills[name]]
    ours = [sum(parts.values()) for parts in kills["ray"][: len(alone)]]
    settings = ", ".join(f"{key}={value}" for key, value in _LIGHTHOUSES[name].items())
    notes = {**versions(["torchft-nightly"]), "settings": settings or "defaults", "what it is": _BARGAIN}
    return [
        Comparison(
            name="SIGKILL to next step: Ray Train",
            reference_name=f"{name}: the survivor",
            ours_s=ours,
            reference_s=alone,
            goal=_GOAL,
            notes=notes,
        ),
        Comparison(
            name="SIGKILL to next step of all: Ray Train",
            reference_name=f"{name}: the killed one is back",
            ours_s=ours,
            reference_s=whole,
            goal=_GOAL,
        ),
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
_ALONE, _BACK = "the survivor's next step", "the killed one is back"
"""The parts of a recovery of replicas."""


class _Side:
    """One of the programs, with the process ids of its trainers."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.name = arm.name
        self._pids: dict[int, int] = {}

    def ready(self) -> None:
        """Wait until it has something to go on from."""
        self._hear("saved")

    def settle(self) -> list[float]:
        """Wait until it has made some steps again; when they ended."""
        return [self._hear("step")[-1]["time_s"] for _ in range(_STEPS_BETWEEN)]

    def kill(self, rank: int) -> dict[str, float]:
        """Seconds of every part, from the signal to the end of the next step."""
        began, parts = self._send_kill(rank), _PARTS[self.name]
        # The other rank may still end its step; what counts is the first one after the restore.
        lines = self._hear(parts["restore"], after_s=began)
        assert lines[-1]["step"] > 0, f"started from the beginning: {lines}"
        lines += self._hear("step")
        return _split(began, parts, [line for line in lines if line["time_s"] > began])

    def _send_kill(self, rank: int) -> float:
        began = time.time()
        os.kill(self._pids[rank], signal.SIGKILL)
        return began

    def _hear(self, kind: str, after_s: float = 0.0) -> list[dict[str, Any]]:
        """The lines up to the first of this kind that was written after the given time."""
        return self._until(
            lambda line: line["kind"] == kind and line.get("rank", 0) == 0 and line["time_s"] > after_s,
        )

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        lines = self.arm.wait_for(wanted, timeout_s=300)
        self._pids |= {line["rank"]: line["pid"] for line in lines if {"rank", "pid"} <= line.keys()}
        return lines


class _Replicas(_Side):
    """A program whose ranks outlive each other. Each says its steps, and how many took part in them."""

    def ready(self) -> None:
        self.settle()

    def settle(self) -> list[float]:
        ends: list[float] = []
        while len(ends) < _STEPS_BETWEEN:
            line = self._hear("step")[-1]
            # While it was stopped nobody was heard of, so one may be left out of the first steps.
            ends = [*ends, line["time_s"]] if line["replicas"] == _REPLICAS else []
        return ends

    def kill(self, rank: int) -> dict[str, float]:
        began = self._send_kill(rank)
        alone = self._step(began, lambda line: line["rank"] != rank and line["replicas"] < _REPLICAS)
        whole = self._step(began, lambda line: line["rank"] == rank and line["replicas"] == _REPLICAS)
        return {_ALONE: alone - began, _BACK: whole - alone}

    def _step(self, after_s: float, wanted: Callable[[dict[str, Any]], bool]) -> float:
        """When the first such step after this time ended."""
        lines = self._until(lambda line: line["kind"] == "step" and line["time_s"] > after_s and wanted(line))
        return lines[-1]["time_s"]


def _ready(sides: Sequence[_Side]) -> Sequence[_Side]:
    """The sides, which are ready, and stopped."""
    for side in sides:
        side.ready()
    for side in sides:
        side.arm.freeze()
    return sides


def _split(began: float, parts: Mapping[str, str], lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    seconds = {}
    for part, kind in parts.items():
        end = max(line["time_s"] for line in lines if line.get("stage", line["kind"]) == kind)
        seconds[part], began = end - began, end
    return seconds


def _medians(kills: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: 1000 * float(np.median([parts[part] for parts in kills])) for part in kills[0]}
