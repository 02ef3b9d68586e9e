"""Useful time under failures: the same kills for ours under Ray Train, and for torchrun with torch's checkpoints.

The schedule is drawn once from a seed: exponential waits, a rank each. A killer sends SIGKILL to the very process that
trains this rank, or as soon as there is one again. Goodput is the steps that are done in the end, each counted as the
median step, by wall time once it trains. Two schedules differ more than two systems, so ours is held against
the best fixed interval on the very same kills: replayed with the costs of a save and a recovery that were measured.
A save costs the pause, and that steps are slower beside its storing, which needs the same cores: all the time that is
neither a median step nor a recovery.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.arm import Arm
from bench.figure import Figure
from bench.programs import under_ray, under_torchrun, workplace, write_config
from bench.simulation import DAY_S, Costs, Loss, simulate
from orchestrator.config import load_config, to_dict
from orchestrator.sections import CheckpointConfig

_GOAL = 0.95
_EVERY = 14
"""What `checkpoint.every_steps: auto` would choose if it knew the mean wait and that a save costs half a step."""
_EVERY_DCP = 30
"""By the same rule: its save costs two steps."""
_SEED = 9
"""Draws 3 kills in 200 s, of 3.3 that are to be expected."""
_WARM_UP_STEPS = 5
_TRIED = (1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160)
"""Steps between two saves, of which the best is taken afterwards."""


@dataclass(frozen=True)
class Kill:
    at_s: float
    """After the first steps."""
    rank: int


@dataclass
class Run:
    """What one program did while it was being killed."""

    wall_s: float
    step_s: float = 0.0
    """Median, from end to end."""
    useful_steps: int = 0
    steps: int = 0
    """All of them, those that were done again too."""
    stalls_s: list[float] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    """From each kill to the next step, or to the end if there was none."""

    @property
    def goodput(self) -> float:
        return self.useful_steps * self.step_s / self.wall_s

    @property
    def save_s(self) -> float:
        """How much later training gets on for a save."""
        stepping_s = (self.steps - len(self.recoveries_s)) * self.step_s  # a recovery ends with a step
        left_s = self.wall_s - stepping_s - sum(self.recoveries_s)
        return max(_median(self.stalls_s), left_s / max(1, len(self.stalls_s)))

    @property
    def costs(self) -> Costs:
        back_s = _median(self.recoveries_s)
        return Costs(
            step_s=self.step_s, stall_s=self.save_s, peer_s=0.0, storage_s=0.0, in_place_s=back_s, replace_s=back_s
        )


def draw(mean_s: float, wall_s: float, seed: int = _SEED) -> list[Kill]:
    """The schedule."""
    dice, kills, at_s = random.Random(seed), [], 0.0
    while (at_s := at_s + dice.expovariate(1 / mean_s)) < wall_s:
        kills.append(Kill(at_s, dice.randrange(2)))
    return kills


def measure(quick: bool) -> list[Figure]:
    """Ours, then the other, each alone on the machine and for the same time."""
    mean_s, wall_s = (15.0, 25.0) if quick else (60.0, 200.0)
    kills = draw(mean_s, wall_s)
    overrides = ["train.num_steps=1000000", f"checkpoint.every_steps={_EVERY}", "run.name=goodput"]
    overrides += ["validation.num_samples=null", "validation.every_steps=null", "samples.every_steps=null"]
    config = to_dict(load_config("configs/digits.yaml", overrides))
    with workplace() as folder:
        file = write_config(folder, config)
        with under_ray(folder, file) as arm:
            ours = endure(arm, kills, wall_s)
        (folder / "dcp").mkdir()
        arguments = [str(file), str(folder / "dcp"), str(_EVERY_DCP)]
        with under_torchrun("dcp", "bench.peers.dcp_loop", arguments) as arm:
            dcp = endure(arm, kills, wall_s)
    best, every = best_interval(ours, kills)
    best_dcp, every_dcp = best_interval(dcp, kills)
    schedule = {"seed": _SEED, "kills": len(kills), "mean wait (s)": mean_s, "measured for (s)": wall_s}
    return [
        Figure(
            name="ours by the best fixed interval on the same kills",
            value=ours.goodput / best,
            goal=_GOAL,
            at_least=True,
            notes={**schedule, "best interval (steps)": every, "its goodput": best},
        ),
        Figure(name="goodput of ours under Ray Train", value=ours.goodput, notes=_notes(ours, _EVERY)),
        Figure(
            name="goodput of torchrun with torch DCP",
            value=dcp.goodput,
            notes={**_notes(dcp, _EVERY_DCP), "of its best interval": {"steps": every_dcp, "goodput": best_dcp}},
        ),
        Figure(
            name="useful steps, ours by torchrun with torch DCP",
            value=ours.useful_steps / max(1, dcp.useful_steps),
            goal=1.0,
            at_least=True,
        ),
    ]


def endure(arm: Arm, kills: Sequence[Kill], wall_s: float) -> Run:
    """Let the arm train for so long, and kill it as scheduled."""
    lines = arm.wait_for(lambda line: _is_step(line) and line["step"] >= _WARM_UP_STEPS, timeout_s=300)
    began_s, pids, killed_s = lines[-1]["time_s"], _pids(lines), []

    def hear(fresh: list[dict[str, Any]]) -> None:
        lines.extend(fresh)
        pids.update(_pids(fresh))

    for kill in kills:
        time.sleep(max(0.0, began_s + kill.at_s - time.time()))
        hear(arm.so_far())
        while not _send(pids.pop(kill.rank, None)):  # it is being restarted: as soon as there is something to kill
            hear(arm.wait_for(lambda line, rank=kill.rank: _names(line) and line["rank"] == rank))
        killed_s.append(time.time())
        pids.clear()  # all of them are started anew
    time.sleep(max(0.0, began_s + wall_s - time.time()))
    hear(arm.so_far())
    return read(lines, killed_s, began_s, wall_s)


def read(lines: Sequence[dict[str, Any]], killed_s: Sequence[float], began_s: float, wall_s: float) -> Run:
    """What the lines of a run say; times are Unix times."""
    run = Run(wall_s)
    within = [line for line in lines if began_s <= line["time_s"] <= began_s + wall_s]
    steps = [line for line in within if _is_step(line)]
    pairs = itertools.pairwise(line for line in lines if _is_step(line))
    run.step_s = statistics.median(b["time_s"] - a["time_s"] for a, b in pairs if b["step"] == a["step"] + 1)
    run.useful_steps, run.steps = steps[-1]["step"] - steps[0]["step"], len(steps) - 1
    for line in within:
        if line["kind"] == "snapshot":
            run.stalls_s.append(line["stall_s"])
        elif line["kind"] == "saved" and "seconds" in line and line["rank"] == 0:
            run.stalls_s.append(line["seconds"])
    for at_s in killed_s:
        # The step under way may still end; what counts is the first one after the restore.
        back_s = next((line["time_s"] for line in within if _is_back(line) and line["time_s"] > at_s), began_s + wall_s)
        again_s = next((line["time_s"] for line in steps if line["time_s"] > back_s), began_s + wall_s)
        run.recoveries_s.append(again_s - at_s)
    return run


def best_interval(run: Run, kills: Sequence[Kill]) -> tuple[float, int]:
    """The goodput of the best fixed interval on these kills, and its steps."""
    losses = [Loss(at_s=kill.at_s, node=kill.rank, whole_node=False) for kill in kills]
    return max(
        (simulate(losses, run.wall_s / DAY_S, run.costs, CheckpointConfig(every_steps=every)).goodput, every)
        for every in _TRIED
    )


def _notes(run: Run, every: int) -> dict[str, Any]:
    return {
        "useful steps": run.useful_steps,
        "saved every (steps)": every,
        "step (ms)": 1000 * run.step_s,
        "a save (ms)": {"pause": 1000 * _median(run.stalls_s), "all that it costs": 1000 * run.save_s},
        "recoveries (s)": ", ".join(f"{seconds:.2f}" for seconds in run.recoveries_s),
    }


def _median(times: Sequence[float]) -> float:
    return statistics.median(times) if times else 0.0


def _is_step(line: dict[str, Any]) -> bool:
    return line["kind"] == "step" and line.get("rank", 0) == 0


def _is_back(line: dict[str, Any]) -> bool:
    """The state is restored: an event of ours, or a line of the other's rank 0."""
    return line["kind"] == "training" or (line["kind"] == "restored" and line.get("rank") == 0)


def _names(line: dict[str, Any]) -> bool:
    """Whether it says which process trains a rank."""
    return line["kind"] in ("trainer", "imported")


def _pids(lines: Sequence[dict[str, Any]]) -> dict[int, int]:
    return {line["rank"]: line["pid"] for line in lines if _names(line)}


def _send(pid: int | None) -> bool:
    try:
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return pid is not None
