"""Training steps: ours beside the bare loop's, and what it costs that ours repeat themselves bitwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.comparison import Comparison
from bench.figure import Figure
from bench.on_gpu.bare import BareLoop
from bench.on_gpu.device import kernels, synchronize
from bench.on_gpu.limits import Limits
from bench.on_gpu.models import Counted
from trainers.state import TrainState
from trainers.step import Task, train_step

_OF_SAME_KERNELS = 1.003
_OF_BARE = round(1 / 0.97, 3)
"""At least 0.97 of the bare loop's throughput, whatever kernels it takes."""
_MFU_GOAL = 35.0
_IMAGES_GOAL = 90.0
"""Samples/s of one H200 that trains the compiled UNet of SD 2 on latents of 512 pixels."""
_WARM_UP = 3
BARE, SAME_KERNELS = "bare torch", "bare torch, kernels as ours"

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A training of ours on this rank."""

    part: str
    state: TrainState
    task: Task

    @property
    def device(self) -> torch.device:
        return self.task.device

    @property
    def compiled(self) -> bool:
        return bool(self.task.config.model.compile)

    def step(self) -> None:
        train_step(self.state, self.task)

    def close(self) -> None:
        """End the threads that read ahead."""
        if self.task.read_ahead is not None:
            self.task.read_ahead.close()


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How long arms take turns."""

    number: int
    steps: int

    def take(self, device: torch.device, arms: Mapping[str, tuple[Step, bool]]) -> dict[str, list[float]]:
        """Seconds of a step, by arm and turn; of an arm: its step, and whether its kernels are deterministic.

        Collective: all ranks. A turn begins and ends with an idle device; in between each may run ahead of it.
        """
        times: dict[str, list[float]] = {name: [] for name in arms}
        for step, deterministic in arms.values():
            with kernels(deterministic):
                _seconds(device, step, _WARM_UP)
        for turn in range(self.number):
            for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
                step, deterministic = arms[name]
                with kernels(deterministic):
                    step()  # what another arm has left in the allocator and in the caches is not this one's
                    times[name].append(_seconds(device, step, self.steps))
        return times


def _seconds(device: torch.device, step: Step, number: int) -> float:
    dist.barrier()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(number):
        step()
    synchronize(device)
    dist.barrier()
    return (time.perf_counter() - began) / number


def beside_bare(
    ours: Ours, bare: BareLoop, turns: Turns, counted: Counted, limits: Limits
) -> Iterator[Comparison | Figure]:
    """Ours beside the bare loop with the fastest kernels; not compiled, also beside it with kernels like ours."""
    arms: dict[str, tuple[Step, bool]] = {"ours": (ours.step, True), BARE: (bare.step, False)}
    if not ours.compiled:  # it would have to be compiled once more
        arms[SAME_KERNELS] = (bare.step, True)
    times = turns.take(ours.device, arms)
    num_samples = ours.task.config.train.global_batch_size
    notes: dict[str, Any] = {
        "million parameters": counted.num_parameters / 1e6,
        "GPUs": dist.get_world_size(),
        "samples in a step": num_samples,
        "TFLOP of a sample, forward and backward": counted.flops / 1e12,
        "samples/s": {name: num_samples / float(np.median(seconds)) for name, seconds in times.items()},
        "steps in a turn": turns.steps,
    }
    for other, goal in ((BARE, _OF_BARE), (SAME_KERNELS, _OF_SAME_KERNELS)):
        if other in times:
            yield Comparison(
                name=f"{ours.part}: a step",
                reference_name=other,
                ours_s=times["ours"],
                reference_s=times[other],
                goal=goal,
                notes=notes if other == BARE else {},
            )
    yield from _of_the_limit(ours, times, counted, limits)


def _of_the_limit(
    ours: Ours, times: Mapping[str, list[float]], counted: Counted, limits: Limits
) -> Iterator[Comparison | Figure]:
    """Samples/s, and the share of the device's arithmetic that they are."""
    num_samples, num_gpus = ours.task.config.train.global_batch_size, dist.get_world_size()
    rates = {name: num_samples / float(np.median(seconds)) / num_gpus for name, seconds in times.items()}
    aimed = ours.compiled and ours.part.startswith("sd2-unet") and "H200" in limits.device
    yield Figure(
        name=f"{ours.part}: samples/s of a GPU",
        value=rates["ours"],
        goal=_IMAGES_GOAL if aimed else None,
        at_least=True,
    )
    share = {name: 100 * counted.flops * rate / limits.matmul_flops for name, rate in rates.items()}
    notes: dict[str, Any] = {"bare torch, of the measured product (%)": share[BARE]}
    if limits.named_flops is not None:
        notes["ours, of the named peak (%)"] = 100 * counted.flops * rates["ours"] / limits.named_flops
    yield Figure(
        name=f"{ours.part}: MFU, of the measured matrix product",
        value=share["ours"],
        unit="%",
        goal=_MFU_GOAL if ours.compiled else None,
        at_least=True,
        notes=notes,
    )


def cost_of_determinism(ours: Ours, turns: Turns) -> Comparison:
    """The same training in turn with kernels that repeat themselves, and with the fastest."""
    times = turns.take(ours.device, {"deterministic": (ours.step, True), "fastest": (ours.step, False)})
    return Comparison(
        name=f"{ours.part}: a step, deterministic kernels",
        reference_name="the fastest kernels",
        ours_s=times["deterministic"],
        reference_s=times["fastest"],
    )
