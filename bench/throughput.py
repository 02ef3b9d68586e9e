"""How fast a training gets on: ours under torchrun and under Ray Train, beside the frameworks that one would use.

All train the same UNet on the same digits: two ranks with one thread each, one microbatch a rank, float32, torch's
fused AdamW, clipping, and an EMA of the weights after every step. What differs is theirs: how they draw noise, reduce
and average. Accelerate shards nothing on CPU, and Lightning averages no sharded model, so they are met under DDP.

Every program lives all the time. They are let run in turn for some steps, each as a whole stopped while another one is
measured. A step's time is the time between the ends of two steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.arm import Arm
from bench.comparison import Comparison
from bench.packages import versions
from bench.programs import under_ray, under_torchrun, workplace, write_config
from bench.turns import medians, take_turns, warm_up
from bench.workload import EMA_DECAY, MIDDLE, SMOKE, config

_OF_BARE = round(1 / 0.97, 3)
"""At least 0.97 of the bare loop's throughput."""
_OF_PEERS = 1.0
_MICROBATCH = 2
_COMPOSER = "not measured: mosaicml 0.32.1 requires torch < 2.7.1; beside torch 2.13 pip finds only 0.3.1"

_BARE, _ACCELERATE, _LIGHTNING = "bare torch", "accelerate", "lightning"
_TORCHRUN, _RAY = "torchrun", "ray"
_ARMS = {"fsdp": (_BARE, _TORCHRUN, _RAY), "ddp": (_BARE, _ACCELERATE, _LIGHTNING, _TORCHRUN, _RAY)}
"""In the order in which they are started."""


def measure(quick: bool) -> list[Comparison]:
    """Ours in both forms beside every peer; a pair is one turn of each, its times are medians."""
    channels, turns, steps = (SMOKE, 2, 2) if quick else (MIDDLE, 8, 5)
    comparisons = []
    for strategy, names in _ARMS.items():
        present = [name for name in names if name != _LIGHTNING or find_spec("lightning")]
        every = _measure_arms(_run_config(channels, strategy), present, turns, steps)
        comparisons += _compare(strategy, medians(every), {"steps in a turn": steps} | _longest(every))
    comparisons[0].notes["versions"] = versions(("accelerate", "lightning"))
    comparisons[0].notes["Composer"] = _COMPOSER
    return comparisons


def _run_config(channels: Sequence[int], strategy: str) -> dict[str, Any]:
    return {
        **config(channels, microbatch_size=_MICROBATCH, num_microbatches=2),
        "run": {"name": "throughput"},
        "workers": 2,
        "optimizer": {"lr": 1e-4},
        "parallel": {"strategy": strategy},
        "ema": {"main": {"decay": EMA_DECAY}},
        "checkpoint": {"every_steps": 1_000_000},
    }


def _measure_arms(run: dict[str, Any], names: Sequence[str], turns: int, steps: int) -> dict[str, list[list[float]]]:
    with workplace() as folder, contextlib.ExitStack() as running:
        file, arms = write_config(folder, run), []
        for name in names:  # one after the other: together they would take the cores from each other for minutes
            arms.append(running.enter_context(_STARTERS[name](folder, file)))
            warm_up(arms[-1:])
        return take_turns(arms, turns, steps)


_STARTERS: dict[str, Callable[[Path, Path], Arm]] = {
    _BARE: lambda _, file: under_torchrun(_BARE, "bench.bare_loop", [str(file), "--ema"]),
    _ACCELERATE: lambda _, file: under_torchrun(_ACCELERATE, "bench.peers.accelerate_loop", [str(file)]),
    _LIGHTNING: lambda _, file: under_torchrun(_LIGHTNING, "bench.peers.lightning_loop", [str(file)]),
    _TORCHRUN: lambda _, file: under_torchrun(_TORCHRUN, "bench.under_torchrun", [str(file)]),
    _RAY: under_ray,
}


def _compare(strategy: str, times: dict[str, list[float]], notes: dict[str, Any]) -> list[Comparison]:
    rates = {name: 2 * _MICROBATCH / float(np.median(turns)) for name, turns in times.items()}
    titles = {_TORCHRUN: f"{strategy}: torchrun", _RAY: f"{strategy}: Ray Train"}
    return [
        Comparison(
            name=title,
            reference_name={_ACCELERATE: "accelerate, diffusers EMAModel", _LIGHTNING: "Lightning"}.get(peer, peer),
            ours_s=times[ours],
            reference_s=times[peer],
            goal=_OF_BARE if peer == _BARE else _OF_PEERS,
            notes={"samples/s": rates} | notes if (ours, peer) == (_TORCHRUN, _BARE) else {},
        )
        for ours, title in titles.items()
        for peer in times
        if peer not in titles
    ]


def _longest(every: dict[str, list[list[float]]]) -> dict[str, Any]:
    return {"longest single step (ms)": {name: 1000 * max(map(max, turns)) for name, turns in every.items()}}
