"""On a GPU: a step of two large networks beside a bare loop, and what is done beside the steps at the device's limits.

The UNet of Stable Diffusion 2 on latents of 512 pixels and DiT-XL/2 on latents of 256, both at full size with random
weights, in bfloat16 on random latents. Each part of the row is one of them, compiled or not:
`python -m bench gpu --only sd2-unet` measures that part alone and keeps what is stored of the others;
`torchrun --nproc-per-node W -m bench gpu` takes W GPUs. Ray is not needed.

Our trainings and the bare loop live in one process and take turns. Ours repeat themselves bitwise by default, the bare
loop takes the fastest kernels; how much of the difference that is, is measured too. The limits (a matrix product, a
copy within the device, copies to and from the host) are measured in the same run. A part that fails says so in its
line, and the others go on.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bench.comparison import Comparison
from bench.figure import Figure
from bench.not_measured import NotMeasured
from bench.on_gpu import upkeep
from bench.on_gpu.bare import BareLoop
from bench.on_gpu.device import free_bytes, here, joined, tidy
from bench.on_gpu.limits import Limits, measure_limits
from bench.on_gpu.models import SMALL, SUBJECTS, Counted, Subject, count
from bench.on_gpu.resume import NAME, resume
from bench.on_gpu.snapshots import Snapshots
from bench.on_gpu.steps import BARE, Ours, Turns, beside_bare, cost_of_determinism
from trainers.build import build
from trainers.config import TrainerConfig

Result = Comparison | Figure | NotMeasured

COMPILED = "-compiled"
PARTS = tuple(f"{name}{suffix}" for name in SUBJECTS for suffix in ("", COMPILED))
_TURNS, _QUICK_TURNS = Turns(number=8, steps=5), Turns(number=2, steps=1)


def measure(quick: bool, only: str | None = None) -> Iterator[Result]:
    """Collective: all ranks. Args: only: one of `PARTS`; None: all."""
    device = here()
    if device.type != "cuda" and not quick:
        yield NotMeasured(name="gpu", reason="no GPU here")
        return
    with joined(device), tempfile.TemporaryDirectory(prefix="ub-") as name:
        limits = measure_limits(device, quick)
        yield from limits.figures()
        for part in PARTS if only is None else (only,):
            yield from told(part, _Part(part, device, limits, Path(_agreed(name)), quick).measure)
            tidy(device)


def told(name: str, results: Callable[[], Iterable[Result]]) -> Iterator[Result]:
    """The results; and if they end in an error, that, in one line."""
    try:
        yield from results()
    except Exception as error:  # whatever it is, what is measured after it is not to be lost
        traceback.print_exc()
        reason = " ".join(str(error).split("\n", 1)[0].split())
        yield NotMeasured(name=name, reason=f"{type(error).__name__}: {reason}")


class _Part:
    """One network, compiled or not."""

    def __init__(self, part: str, device: torch.device, limits: Limits, folder: Path, quick: bool) -> None:
        """Args: folder: the same on all ranks."""
        self._part, self._device, self._limits, self._quick = part, device, limits, quick
        self._name = part.removesuffix(COMPILED)
        self._subject: Subject = (SMALL if quick else SUBJECTS)[self._name]
        self._folder = folder / self._name
        self._turns, self._rounds = (_QUICK_TURNS, 2) if quick else (_TURNS, 12)
        self._step_s: float | None = None

    def measure(self) -> Iterator[Result]:
        config = self._config()
        counted = count(config, self._subject.num_tokens)
        if (free := free_bytes(self._device)) < counted.two_states_bytes:
            needed = counted.two_states_bytes / 1e9
            reason = f"two states take {needed:.1f} GB, and the device has {free / 1e9:.1f} GB left"
            yield NotMeasured(name=self._part, reason=reason)
            return
        state, task = build(config, self._device)
        ours = Ours(part=self._part, state=state, task=task)
        try:
            yield from told(f"{self._part}: a step", lambda: self._beside_bare(ours, counted))
            tidy(self._device)
            if self._part == self._name:  # compiling changes nothing in these
                yield from self._upkeep(ours)
            yield from self._snapshots(ours)
            # Last, as the compiled blocks are compiled anew for it.
            what = f"{self._part}: a step, deterministic kernels"
            yield from told(what, lambda: [cost_of_determinism(ours, self._turns)])
        finally:
            ours.close()

    def _config(self) -> TrainerConfig:
        if dist.get_rank() == 0 and not self._folder.exists():
            self._subject.write(self._folder)
        dist.barrier()
        return self._subject.config(self._folder, dist.get_world_size(), compiled=self._part != self._name)

    def _beside_bare(self, ours: Ours, counted: Counted) -> Iterator[Result]:
        bare = BareLoop(ours.task.config, self._subject.latents(), self._device)
        for one in beside_bare(ours, bare, self._turns, counted, self._limits):
            if isinstance(one, Comparison) and one.reference_name == BARE:
                self._step_s = float(np.median(one.ours_s))
            yield one

    def _upkeep(self, ours: Ours) -> Iterator[Result]:
        what = f"{self._part}: EMA update"
        yield from told(what, lambda: upkeep.ema(ours, self._limits, self._step_s, self._rounds))
        what = f"{self._part}: hashes of the state"
        yield from told(what, lambda: upkeep.hashes(ours, self._step_s, self._rounds))

    def _snapshots(self, ours: Ours) -> Iterator[Result]:
        whole = self._part == self._name
        if (reason := upkeep.room_for_snapshots(ours)) is not None:
            yield NotMeasured(name=f"{self._part}: saves and restores", reason=reason)
            return
        snapshots = Snapshots(ours.state)
        try:
            if whole:
                what, rounds = f"{self._part}: stall of a save", self._rounds // 2
                yield from told(what, lambda: upkeep.staging(ours, snapshots, self._step_s, rounds))
            yield from told(f"{self._part}: {NAME}", lambda: [resume(ours, snapshots, self._turns.steps)])
        finally:
            snapshots.close()


def _agreed(name: str) -> str:
    """Rank 0's. Collective: all ranks."""
    names: list[str] = [name]
    dist.broadcast_object_list(names)
    return names[0]
