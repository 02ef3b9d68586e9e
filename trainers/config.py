"""The whole configuration of a training process, section by section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trainers.data.sources import DataConfig
from trainers.divergence import DivergenceConfig
from trainers.ema import EMAConfig
from trainers.errors import ConfigError
from trainers.models import ModelConfig
from trainers.objectives import ObjectiveConfig
from trainers.parallel import ParallelConfig
from trainers.schedules import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) and gradient clipping."""

    lr: float = 1e-4
    """Peak learning rate, > 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment, 0 <= beta < 1."""
    eps: float = 1e-8
    """Added to the root of the second moment, > 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, >= 0."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm, > 0; null: never."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which batches, in which precision."""

    num_steps: int
    """Optimizer steps of the whole run, >= 1."""
    global_batch_size: int
    """Samples of one step, a multiple of microbatch_size."""
    microbatch_size: int
    """Samples of one forward pass, >= 1; part of the numbers, so not changed by the number of workers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward and backward in bfloat16, master weights, reduction, optimizer and EMA in float32."""

    def __post_init__(self) -> None:
        for key in ("num_steps", "global_batch_size", "microbatch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least 1")
        if self.global_batch_size % self.microbatch_size:
            down = self.global_batch_size // self.microbatch_size * self.microbatch_size
            near = down or self.microbatch_size
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not a multiple of"
                f" microbatch_size={self.microbatch_size}; use global_batch_size={near}"
            )

    @property
    def num_microbatches(self) -> int:
        """M, the microbatches of one step: the most workers that a step can keep busy."""
        return self.global_batch_size // self.microbatch_size


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Everything that `trainers` needs to know; decides the numbers of a run."""

    model: ModelConfig
    train: TrainConfig
    seed: int = 0
    """Everything random follows from it, 0 <= seed < 2**63."""
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: dict[str, EMAConfig] = field(default_factory=dict)
    """EMA profiles by name; the first one is the default for sampling and export."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
