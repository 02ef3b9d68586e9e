"""What an EMA profile means in a run of given length: horizons, what is left of its start, what it costs."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from trainers.ema import EMAConfig, decay_of_update

_NEGLIGIBLE = 0.01
_MEASURED_NUMEL = 1 << 22  # 16 MiB a tensor: more than a cache holds


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Facts about one profile at the end of a run."""

    decay: float | None
    """Weight of the old average in one step, at the end; None if there is no update."""
    half_life_steps: float | None
    """Steps after which a weight's influence has halved, at that decay; None: it is gone at once, or stays."""
    half_life_samples: float | None
    equivalent_num_steps: float | None
    """N of alpha = 2 / (N + 1); None: so many that the decay is rounded to 1, and the average never moves."""
    num_updates: int
    share_of_start: float
    """What the copy at start_step still weighs, 0 to 1."""
    latest_start_step: int | None
    """The latest start of kind constant whose copy weighs at most 1 % at the end; None: the run is too short."""


def advise(config: EMAConfig, samples_per_step: int, num_steps: int) -> Advice:
    """The profile `config` at the end of a run of `num_steps`."""
    num_updates = config.expected_updates(num_steps)
    decays = [decay_of_update(config, n, samples_per_step) for n in range(num_updates)]
    share, latest = math.prod(decays), None
    if config.kind == "constant":  # a later start would change the width of the others
        needed = _updates_to_forget(decay_of_update(config, 0, samples_per_step)) * config.every
        latest = int(num_steps - needed) if num_steps - needed > config.start_step else None
    per_step = decays[-1] ** (1 / config.every) if decays else None
    half_life = math.log(0.5) / math.log(per_step) if per_step and per_step < 1 else None
    return Advice(
        decay=per_step,
        half_life_steps=half_life,
        half_life_samples=None if half_life is None else half_life * samples_per_step,
        equivalent_num_steps=None if per_step in (None, 1) else 2 / (1 - per_step) - 1,
        num_updates=num_updates,
        share_of_start=share,
        latest_start_step=latest,
    )


def _updates_to_forget(decay: float) -> float:
    """After so many updates a copy weighs next to nothing; infinitely many if the decay is rounded to 1."""
    if decay == 0:
        return 1
    return math.ceil(math.log(_NEGLIGIBLE) / math.log(decay)) if decay < 1 else math.inf


def measure_update_s(num_parameters: int) -> float:
    """Seconds that one update of so many float32 parameters takes here, on one CPU thread or the GPU. Local."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numel = min(num_parameters, _MEASURED_NUMEL)
    average, weights = torch.zeros(2, numel, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            torch._foreach_lerp_([average], [weights], 0.001)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return min(times) * num_parameters / numel
