"""What the invariant reduction costs: a whole training step with it, beside the same step with torch's own.

Both states live in the same processes and process group and step in turn, so that whatever else the machine does hits
both. The order within a pair alternates. A step ends when all ranks have ended it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from bench.comparison import Comparison
from bench.workload import MIDDLE, SMOKE, config, pin
from tests.trainers.distributed import run_ranks
from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.step import train_step

_GOAL = 1.05
_WARM_UP = 2

# strategy, world size, microbatches, microbatch size, goal
_CASES = (
    ("fsdp", 2, 2, 4, _GOAL),
    ("fsdp", 2, 4, 4, _GOAL),
    ("fsdp", 1, 2, 4, None),
    ("fsdp", 3, 3, 4, None),
    ("fsdp", 4, 4, 4, None),
    ("ddp", 2, 2, 4, None),
    ("hsdp", 4, 4, 4, None),
)


def measure(quick: bool) -> list[Comparison]:
    """One comparison for each strategy and world size."""
    channels, cases = (SMOKE, _CASES[:1]) if quick else (MIDDLE, _CASES)
    comparisons = []
    for strategy, world_size, num_microbatches, size, goal in cases:
        base = config(channels, microbatch_size=size, num_microbatches=num_microbatches)
        base["parallel"] = {"strategy": strategy, "shard_size": 2}
        num_pairs = 2 if quick else 16 if goal else 8
        times, numel = run_ranks(world_size, _step_in_turn, base, num_pairs)[0]
        comparisons.append(
            Comparison(
                name=f"{strategy} W={world_size} M={num_microbatches}, microbatch {size}: invariant",
                reference_name="fast",
                ours_s=times["invariant"],
                reference_s=times["fast"],
                goal=goal,
                notes={
                    "million parameters": numel / 1e6,
                    "MB that a rank sends to reduce a step's gradients, either way": _sent(strategy, world_size, numel),
                },
            )
        )
    return comparisons


def _step_in_turn(base: dict[str, Any], num_pairs: int) -> tuple[dict[str, list[float]], int]:
    """Collective: all ranks. Returns seconds a step by reduction, and the number of parameters."""
    pin(dist.get_rank())
    arms = {
        reduction: build(
            decode(TrainerConfig, {**base, "parallel": {**base["parallel"], "reduction": reduction}}),
            torch.device("cpu"),
        )
        for reduction in ("invariant", "fast")
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for pair in range(_WARM_UP + num_pairs):
        for name in _order(list(arms), pair):
            dist.barrier()
            began = time.perf_counter()
            train_step(*arms[name])
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    numel = sum(parameter.parameter.numel() for parameter in arms["fast"][0].parameters)
    return {name: values[_WARM_UP:] for name, values in times.items()}, numel


def _order(names: Sequence[str], pair: int) -> Sequence[str]:
    return names if pair % 2 == 0 else names[::-1]


def _sent(strategy: str, world_size: int, numel: int) -> float:
    """MB by arithmetic: padding left out, `fast` counted as rings send it.

    In a group of n ranks an all-to-all of N bytes sends (n - 1) / n N, and so does a ring's reduce-scatter or
    all-gather. The microbatches of a rank, and those of a replica, make one node of the tree here.
    """
    shards = {"ddp": 1, "fsdp": world_size, "hsdp": 2}[strategy]
    replicas = world_size // shards
    total = 4e-6 * numel
    within, across = (shards - 1) / shards * total, (replicas - 1) / replicas * total / shards
    return within + 2 * across
