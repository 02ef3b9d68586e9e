"""What one EMA update costs, beside the least that could do it and beside the classes that others use.

The bound is one in-place `lerp_` over one flat tensor of as many elements as this rank's rows have; below that lies
only the memory: a copy that moves as many bytes, 12 for each parameter. The peers get the rank's local rows as ordinary
parameters, without any DTensor between, and need gather nothing: the best case for them. Rank 0 measures in CPU time
while the other rank waits, which on one thread is the time of the update without what others take away. Which physical
pages the tensors get is luck that lasts as long as the processes and moves a ratio by some percent, so several launches
are pooled.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from bench.comparison import Comparison
from bench.packages import versions
from bench.workload import EMA_DECAY, LARGE, SMOKE, config, pin
from tests.trainers.distributed import run_ranks
from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.parallel import gather_rows
from trainers.state import TrainState

_GOAL = 1.05
_WARM_UP = 3
_OURS = "unbroken"
_BOUND = "flat lerp_"
_COPY = "copy of as many bytes"


def measure(quick: bool) -> list[Comparison]:
    """Ours beside the bound, then beside each peer. Fails if an update communicates."""
    channels, launches, rounds = (SMOKE, 1, 3) if quick else (LARGE, 5, 12)
    base = config(channels, microbatch_size=1, num_microbatches=2)
    base["ema"] = {"main": {"decay": EMA_DECAY}}
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
        "GB/s": {name: 12e-9 * results[0].numel / float(np.median(times[name])) for name in (_COPY, _BOUND, _OURS)},
        **versions(["ema-pytorch"]),
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
    source = flat.new_zeros(len(flat) * 3 // 2)  # read once and written once: 8 bytes an element
    target = torch.empty_like(source)
    return {
        _BOUND: lambda: flat_average.lerp_(flat, 1 - EMA_DECAY),
        _COPY: lambda: target.copy_(source),
        _OURS: lambda: state.ema.update(3),
        **_peers(local),
    }


def _peers(local: list[torch.nn.Parameter]) -> dict[str, Callable[[], object]]:
    module = torch.nn.ParameterList(local)
    loop, foreach = (EMAModel(local, decay=EMA_DECAY, foreach=foreach) for foreach in (False, True))
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    # What Lightning's EMAWeightAveraging updates in every step.
    one_by_one = AveragedModel(module, avg_fn=get_ema_avg_fn(EMA_DECAY), use_buffers=True)
    averages = [parameter.detach().clone() for parameter in local]
    peers: dict[str, Callable[[], object]] = {
        "torch AveragedModel": lambda: averaged.update_parameters(module),
        "Lightning's AveragedModel": lambda: one_by_one.update_parameters(module),
        "diffusers EMAModel": lambda: loop.step(local),
        "diffusers EMAModel(foreach=True)": lambda: foreach.step(local),
        "Composer's formula": lambda: _composers(averages, local),
    }
    if find_spec("ema_pytorch"):
        from ema_pytorch import EMA  # pyright: ignore[reportMissingImports]

        late = EMA(module, beta=EMA_DECAY, update_after_step=0, update_every=1, include_online_model=False)
        peers["ema-pytorch"] = late.update
    return peers


@torch.no_grad()
def _composers(averages: list[torch.Tensor], local: list[torch.nn.Parameter]) -> None:
    for average, parameter in zip(averages, local, strict=True):
        average.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)


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
