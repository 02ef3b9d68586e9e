"""What one EMA update costs, beside the least that could do it and beside the classes that others use.

The bound is one in-place `lerp_` over one flat tensor of as many elements as this rank's rows have. The peers get the
rank's local rows as ordinary parameters, without any DTensor between: the best case for them. Rank 0 measures in CPU
time while the other rank waits, which on one thread is the time of the update without what others take away. Which
physical pages the tensors get is luck that lasts as long as the processes and moves a ratio by some percent, so several
launches are pooled.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.comparison import Comparison
from bench.workload import LARGE, SMOKE, config, pin
from tests.trainers.distributed import run_ranks
from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.parallel import gather_rows
from trainers.state import TrainState

_GOAL = 1.05
_DECAY = 0.999
_WARM_UP = 3
_OURS = "unbroken"
_BOUND = "flat lerp_"


def measure(quick: bool) -> list[Comparison]:
    """Ours beside the bound, then beside each peer. Fails if an update communicates."""
    channels, launches, rounds = (SMOKE, 1, 3) if quick else (LARGE, 5, 12)
    base = config(channels, microbatch_size=1, num_microbatches=2)
    base["ema"] = {"main": {"decay": _DECAY}}
    results = [result for _ in range(launches) for result in run_ranks(2, _update_in_turn, base, rounds)]
    times: dict[str, list[float]] = {}
    for result in results:
        for name, values in result.times.items():
            times.setdefault(name, []).extend(values)
    collectives, gathering = ({getattr(result, key) for result in results} for key in ("collectives", "gathering"))
    assert collectives == {0}, f"{collectives} collectives in an EMA update; there must be none"
    assert 0 not in gathering, "the counter of collectives does not count"
    notes = {
        "million parameters on the measured rank": results[0].numel / 1e6,
        "launches": launches,
        "collectives in an update": collectives.pop(),
        "counted by the same counter if every parameter is gathered": gathering.pop(),
        "ratio of the best times": min(times[_OURS]) / min(times[_BOUND]),
    }
    return [
        Comparison(
            name="EMA update" if name == _BOUND else "same",
            reference_name=name,
            ours_s=times[_OURS],
            reference_s=times[name],
            goal=_GOAL if name == _BOUND else None,
            notes=notes if name == _BOUND else {},
        )
        for name in times
        if name != _OURS
    ]


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What one rank found."""

    times: dict[str, list[float]]
    """CPU seconds by arm, on rank 0."""
    numel: int
    """Local parameters."""
    collectives: int
    """In one EMA update."""
    gathering: int
    """Collectives in a gather of all parameters."""


def _update_in_turn(base: dict[str, Any], rounds: int) -> _Measured:
    """Collective: all ranks."""
    pin(dist.get_rank())
    state, _ = build(decode(TrainerConfig, base), torch.device("cpu"))
    state.ema.update(1)  # begins
    collectives = _collectives(lambda: state.ema.update(2))
    gathering = _collectives(lambda: _gather_all(state))
    times = _time_arms(_arms(state), rounds) if dist.get_rank() == 0 else {}
    dist.barrier()
    numel = sum(parameter.local.numel() for parameter in state.parameters)
    return _Measured(times=times, numel=numel, collectives=collectives, gathering=gathering)


def _collectives(function: Callable[[], object]) -> int:
    with CommDebugMode() as mode:
        function()
    return mode.get_total_counts()


def _gather_all(state: TrainState) -> None:
    for parameter in state.parameters:
        gather_rows(parameter.local, parameter, state.topology)


def _arms(state: TrainState) -> dict[str, Callable[[], object]]:
    local = [torch.nn.Parameter(parameter.local) for parameter in state.parameters if parameter.local.numel()]
    flat = torch.cat([parameter.detach().view(-1) for parameter in local])
    flat_average = flat.clone()
    loop = EMAModel(local, decay=_DECAY)
    foreach = EMAModel(local, decay=_DECAY, foreach=True)
    module = torch.nn.ParameterList(local)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    return {
        _BOUND: lambda: flat_average.lerp_(flat, 1 - _DECAY),
        _OURS: lambda: state.ema.update(3),
        "torch AveragedModel": lambda: averaged.update_parameters(module),
        "diffusers EMAModel": lambda: loop.step(local),
        "diffusers EMAModel(foreach=True)": lambda: foreach.step(local),
    }


def _time_arms(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(_WARM_UP + rounds):
        # What ran before leaves its traces in the caches, so nobody always follows the same one.
        for name in order.sample(list(arms), len(arms)):
            began = time.process_time()
            arms[name]()
            times[name].append(time.process_time() - began)
    return {name: values[_WARM_UP:] for name, values in times.items()}
