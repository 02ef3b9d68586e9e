"""Learning rates as pure functions of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over the run."""

    kind: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    """Shape after the warm-up. cosine_with_restarts: num_cycles cosines, each from the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, >= 0."""
    end_factor: float = 0.0
    """Share of the peak that is reached when the last step is completed, 0 <= f <= 1; not used by constant."""
    power: float = 1.0
    """Exponent of polynomial, > 0; not used by the others."""
    num_cycles: int = 1
    """Cosines of cosine_with_restarts, >= 1; not used by the others."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps={self.warmup_steps} must be at least 0; 0 means no warm-up")
        if not 0 <= self.end_factor <= 1:
            raise ConfigError(f"end_factor={self.end_factor} must be between 0 and 1; 0.1 ends at a tenth of the peak")
        if not self.power > 0:
            raise ConfigError(f"power={self.power} must be above 0; 1 is linear")
        if self.num_cycles < 1:
            raise ConfigError(f"num_cycles={self.num_cycles} must be at least 1; 1 never restarts")
        if self.kind != "cosine_with_restarts" and self.num_cycles != 1:
            raise ConfigError(
                f"num_cycles={self.num_cycles} has no effect on kind={self.kind}; use cosine_with_restarts"
            )
        if self.kind == "constant" and self.end_factor:
            raise ConfigError(f"end_factor={self.end_factor} has no effect on kind=constant; remove one of them")
        if self.kind != "polynomial" and self.power != 1:
            raise ConfigError(f"power={self.power} has no effect on kind={self.kind}; use kind=polynomial")


def depends_on_num_steps(config: ScheduleConfig) -> bool:
    """Whether a longer run would have had other learning rates from the start."""
    return config.kind != "constant"


def learning_rate(config: ScheduleConfig, peak_lr: float, num_steps: int, step: int) -> float:
    """The learning rate of the step that follows `step` completed ones, as diffusers' schedulers give it.

    Linear warm-up gives the very first step a rate of 0; the decay spans the steps after the warm-up.
    """
    if step < config.warmup_steps:
        return peak_lr * step / config.warmup_steps
    if config.kind == "constant":
        return peak_lr
    done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    if config.kind == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    elif config.kind == "cosine_with_restarts":
        # Loshchilov and Hutter, "SGDR", 2017, eq. 5, with cycles of equal length; the end of the run is no restart.
        left = 0.5 * (1.0 + math.cos(math.pi * (config.num_cycles * done % 1.0))) if done < 1 else 0.0
    elif config.kind == "linear":
        left = 1.0 - done
    else:
        left = (1.0 - done) ** config.power
    return peak_lr * (config.end_factor + (1.0 - config.end_factor) * left)
