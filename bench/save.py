"""What a save and a restore cost on local disk, beside the least that could do it and beside what others use.

First, in a group of real agents and trainers without Ray, whose trainers let ways to save and restore take turns on
their state (`bench.save_turns`): the copy into shared memory for which training stands still, the whole save, and the
restore. torch.save, accelerate and torch_checkpointing do not wait for the disk; all others do. `accelerate save_state`
has, as in the training scripts of diffusers, the whole state on every rank, and writes it from one. Those with a
background process or kept buffers have a first turn before ours, so that they have made them.

What bounds these figures is measured beside them. No save that is on disk when it ends is faster than the disk takes
the bytes (`memcpy, xxh3, write`). Hashes are no less of a save's CPU time than one pass of the fastest there is (`one
pass of xxh3`), which has to fetch every byte from memory.

Then under Ray Train: how much longer the steps are in which a snapshot is taken, hashed, written, read back and
committed. A pair is the steps from a save on, and those after them; a save every 50 steps is counted from there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.arm import Arm
from bench.comparison import Comparison
from bench.figure import Figure
from bench.memory_watch import MemoryWatch
from bench.not_measured import NotMeasured
from bench.packages import versions
from bench.room import missing_room
from bench.save_group import run_group
from bench.workload import LARGE, SMOKE, config
from orchestrator.checkpoint.policy import RetentionConfig, Verify
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.watchdog import WatchdogConfig
from orchestrator.run_spec import RunSpec
from orchestrator.sections import CheckpointConfig

_RANKS = 2
_FOLDER = "UNBROKEN_BENCH_FOLDER"
_MANAGER = "torch_checkpointing"
_EARLIER = "its call returns after (ms); from then on forward and backward may run beside the copy, the optimizer not"
_COPY, _BARE, _BARE_LOAD = "memcpy", "memcpy, xxh3, write", "read, xxh3"
_PACKAGES = {
    "torch DCP save": "torch",
    "torch DCP async_save, thread": "torch",
    "torch DCP async_save, process": "torch",
    _MANAGER: "torch_checkpointing",
    "torch.save of every rank": "torch",
    "accelerate save_state": "accelerate",
    "Lightning Fabric.save": "lightning",
}
_SAVES = tuple(name for name, package in _PACKAGES.items() if find_spec(package))
_EXTRAS = ("accelerate", "lightning", "torch-checkpointing")
_ASYNC = tuple(name for name in _SAVES if "async_save" in name or name == _MANAGER)
_LOADS = tuple(f"load {name}" for name in _SAVES if "async_save" not in name)
_STALL_GOAL, _STEP_GOAL, _RUN_GOAL, _CPU_GOAL, _FIRST_GOAL, _DCP_GOAL = 1.15, 0.02, 1.01, 1.3, 1.5, 0.2
_HASH_GOAL, _MEMORY_GOAL = 2.0, 1.05
_EVERY, _OF = 4, 50
"""Steps between two saves of the measured run, and of the one that is spoken of."""
_MOST_DISK_BYTES, _MOST_MEMORY_BYTES = 12 << 30, 14 * 10**9
"""By arithmetic: what all ways keep of the state, on both ranks and at the same time."""

Line = Mapping[str, Any]


def measure(quick: bool) -> list[Comparison | Figure | NotMeasured]:
    """Stalls, whole saves, restores; then the cost of a run."""
    reason = None if quick else missing_room(disk_bytes=_MOST_DISK_BYTES, memory_bytes=_MOST_MEMORY_BYTES)
    if reason is not None:
        return [NotMeasured(name="save", reason=reason)]
    channels, launches, rounds = (SMOKE, 1, 1) if quick else (LARGE, 2, 2)
    return [*_in_turns(channels, launches, rounds), *_of_a_run(channels, num_saves=3 if quick else 12)]


def _in_turns(channels: tuple[int, ...], launches: int, rounds: int) -> Iterator[Comparison | Figure]:
    saves, unverified, loads, memory = [], [], [], []
    saving = ["hashing", "xxh3", *_ASYNC, *_rounds(rounds, ("save", _COPY), (_BARE, *_SAVES))]
    # The first turn of a load makes what the others read.
    loading = [*_LOADS, *_rounds(rounds, ("restore",), (_BARE_LOAD, *_LOADS))]
    for _ in range(launches):
        with tempfile.TemporaryDirectory(prefix="ub-", dir="/tmp", ignore_cleanup_errors=True) as name:
            lines, watch = _launch(Path(name), channels, saving)
            saves.append(lines)
            memory.append(watch.extra([(line["began_s"], line["ended_s"]) for line in lines if line["name"] == "save"]))
            loads.append(_launch(Path(name), channels, loading, after=saving)[0])
            plan = _rounds(2 * rounds, ("save",), (_SAVES[0], _BARE))
            unverified.append(_launch(Path(name), channels, plan, verify="size")[0])
    yield from _stalls(saves)
    yield from _whole_saves(saves, max(memory))
    yield from _beside_dcp(unverified)
    for other in (_BARE_LOAD, *_LOADS):
        yield _compare(loads, "restore", other, "total_s", name="restore, checked")


def _rounds(number: int, ours: Sequence[str], others: Sequence[str]) -> list[str]:
    """Ours before each of the others, whose order is turned round in every second round."""
    return [
        name
        for index in range(number)
        for other in (others if index % 2 == 0 else others[::-1])
        for name in (*ours, other)
    ]


def _launch(
    folder: Path,
    channels: tuple[int, ...],
    plan: list[str],
    after: Sequence[str] = (),
    verify: Verify = "full",
) -> tuple[list[Line], MemoryWatch]:
    """What every turn took, on the slower rank. Args: after: the plan of the launch that this one goes on from."""
    (folder / "turns.json").write_text(json.dumps(plan))
    os.environ[_FOLDER] = str(folder)
    num_steps = 1 + [*after, *plan].count("save")  # the run has to end with the last turn
    with MemoryWatch(folder, _RANKS) as watch:
        run_group(_spec(folder / verify, channels, num_steps, verify), _RANKS)
    files = [folder / f"{rank}.jsonl" for rank in range(_RANKS)]
    ranks = [[json.loads(text) for text in file.read_text().splitlines()] for file in files]
    for file in files:
        file.unlink()
    return [_slower(lines) for lines in zip(*ranks, strict=True)], watch


def _slower(lines: Sequence[Line]) -> Line:
    """Of what the ranks say of one turn: the longest times, and CPU seconds and bytes of both together."""
    longest = {key: max(line[key] for line in lines) for key in ("returned_s", "held_s", "total_s", "ended_s")}
    together = {key: sum(line[key] for line in lines) for key in ("cpu_s", "size_bytes")}
    return {**lines[0], **longest, **together}


def _spec(run: Path, channels: tuple[int, ...], num_steps: int, verify: Verify) -> RunSpec:
    trainer = _trainer(channels, microbatch_size=1)
    trainer["train"]["num_steps"] = num_steps
    return RunSpec(
        run_id=open_or_create(Store.open(str(run)), trainer).run_id,
        run_url=str(run),
        session="bench",
        config=trainer,
        config_hash="bench",
        strategy="fsdp",
        checkpoint=CheckpointConfig(every_steps=1, verify=verify, keep=RetentionConfig(last=1, grace_s=0.0)),
        num_steps=num_steps,
        versions={},
        preload=("torch", "diffusers:UNet2DModel", "trainers.build", "bench.save_turns"),
        watchdog=WatchdogConfig(timeout_s=3600.0, start_timeout_s=3600.0),
    )


def _trainer(channels: tuple[int, ...], microbatch_size: int) -> dict[str, Any]:
    trainer = config(channels, microbatch_size=microbatch_size, num_microbatches=_RANKS)
    return {**trainer, "optimizer": {"lr": 1e-4}, "ema": {"main": {"decay": 0.999}}, "parallel": {"strategy": "fsdp"}}


def _stalls(launches: Sequence[Sequence[Line]]) -> Iterator[Comparison]:
    """How long training stands still."""
    firsts, later = [], []
    for lines in launches:
        first, *others = [line["held_s"] for line in lines if line["name"] == "save"]
        firsts.append(first)
        later.append(float(np.median(others)))
    warm = [_without_first_save(lines) for lines in launches]
    size = launches[0][0]["size_bytes"] / _RANKS / 1e6
    yield _compare(warm, "save", _COPY, "held_s", name=f"stall of a save, {size:.0f} MB a rank", goal=_STALL_GOAL)
    for other in _ASYNC:
        returned = [line["returned_s"] for lines in warm for line in lines if line["name"] == other]
        notes = {_EARLIER: 1000 * float(np.median(returned))} if other == _MANAGER else {}
        yield _compare(warm, "save", other, "held_s", name="stall of a save", notes=notes)
    yield Comparison(
        name="stall of a trainer's first save",
        reference_name="that of later ones",
        ours_s=firsts,
        reference_s=later,
        goal=_FIRST_GOAL,
    )


def _whole_saves(launches: Sequence[Sequence[Line]], memory: float) -> Iterator[Comparison | Figure]:
    """Until it is committed, and until it is on disk."""
    name = "save, read back and committed"
    for other in (*_SAVES, _BARE):
        goal, notes = (_DCP_GOAL, {"versions": versions(_EXTRAS)}) if other == _SAVES[0] else (None, {})
        yield _compare(launches, "save", other, "total_s", name=name, goal=goal, notes=notes)
    yield _compare(launches, "save", _BARE, "cpu_s", name=f"CPU time of a {name}", goal=_CPU_GOAL)
    hashing, one_pass = (
        np.median([line["cpu_s"] for lines in launches for line in lines if line["name"] == kind])
        for kind in ("hashing", "xxh3")
    )
    saves = [line for lines in launches for line in lines if line["name"] == "save"]
    used, size_bytes = np.median([line["cpu_s"] for line in saves]), saves[0]["size_bytes"]
    yield Figure(name="CPU of a save", value=float(used / size_bytes * 1e9), unit="s/GB")
    yield Figure(name="hashes and fingerprints in it", value=float(100 * hashing / used), unit="%", goal=_HASH_GOAL)
    yield Figure(name="one pass of xxh3 beside it", value=float(100 * one_pass / used), unit="%")
    yield Figure(name="extra memory while saving", value=memory, unit="x the state of a rank", goal=_MEMORY_GOAL)


def _beside_dcp(launches: Sequence[Sequence[Line]]) -> Iterator[Comparison]:
    """Without reading back, which torch DCP does not do either; and how much of its time the disk alone takes."""
    dcp, bound = _SAVES[0], "memcpy, xxh3, write, the least"
    yield _compare(launches, "save", dcp, "total_s", name="save, committed (verify: size)", goal=_DCP_GOAL)
    yield _compare(launches, "save", _BARE, "total_s", name="save, committed (verify: size)")
    yield _compare(launches, _BARE, dcp, "total_s", name=bound)


def _without_first_save(lines: Sequence[Line]) -> list[Line]:
    first = next(index for index, line in enumerate(lines) if line["name"] == "save")
    return [line for index, line in enumerate(lines) if index > first + 1]


def _compare(launches: Sequence[Sequence[Line]], ours: str, other: str, key: str, **more: Any) -> Comparison:
    """Each turn of the other one with the turn of ours that came before it."""
    pairs = []
    for lines in launches:
        before = None
        for line in lines:
            if line["name"] == ours:
                before = line[key]
            elif line["name"] == other and before is not None:
                pairs.append((before, line[key]))
    return Comparison(
        reference_name=other.removeprefix("load "),
        ours_s=[pair[0] for pair in pairs],
        reference_s=[pair[1] for pair in pairs],
        **more,
    )


def _of_a_run(channels: tuple[int, ...], num_saves: int) -> Iterator[Comparison]:
    """Under Ray Train: the steps after a save beside those after them, and the stall beside a step."""
    with tempfile.TemporaryDirectory(prefix="ub-", dir="/tmp", ignore_cleanup_errors=True) as name:
        run = {
            **_trainer(channels, microbatch_size=8),
            "run": {"name": "save"},
            "workers": _RANKS,
            "checkpoint": {"every_steps": _EVERY, "keep": {"last": 5, "grace_s": 0.0}},
            "storage": str(Path(name) / "runs"),
        }
        file = Path(name) / "config.json"
        file.write_text(json.dumps(run))
        environment = {"RAY_TMPDIR": name, "RAY_AUTH_MODE": "disabled"}
        with Arm("save", ["-m", "bench.under_ray", str(file)], environment) as arm:
            last = _EVERY * (num_saves + 2)  # the first save is of another kind, and the last one may not be over
            lines = arm.wait_for(lambda line: line["kind"] == "step" and line["step"] >= last, timeout_s=900)
    ends = {line["step"]: line["time_s"] for line in lines if line["kind"] == "step"}
    stalls = {line["step"]: line["stall_s"] for line in lines if line["kind"] == "snapshot"}
    saved = {line["step"]: line["time_s"] for line in lines if line["kind"] == "saved"}
    steps = range(2 * _EVERY, last, _EVERY)
    half = _EVERY // 2
    after = [ends[step + half] - ends[step] for step in steps]
    plain = [ends[step + _EVERY] - ends[step + half] for step in steps]
    yield Comparison(
        name=f"{_OF} steps under Ray Train, one save",
        reference_name="no save",
        ours_s=[_OF / half * without + (with_one - without) for with_one, without in zip(after, plain, strict=True)],
        reference_s=[_OF / half * without for without in plain],
        goal=_RUN_GOAL,
        notes={
            "seconds from the end of a step to its commit": float(np.median([saved[s] - ends[s] for s in steps])),
            "saves that took longer than the steps counted for them": sum(saved[s] > ends[s + half] for s in steps),
        },
    )
    yield Comparison(
        name="stall of a save under Ray Train",
        reference_name="a step",
        ours_s=[stalls[step] for step in steps],
        reference_s=[without / half for without in plain],
        goal=_STEP_GOAL,
        notes={"stall of the first save (ms)": 1000 * stalls[_EVERY]},
    )
