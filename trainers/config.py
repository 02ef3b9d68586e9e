"""The whole configuration of a training process, section by section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trainers.conditioning import ConditioningConfig
from trainers.data.config import DataConfig
from trainers.divergence import DivergenceConfig
from trainers.ema import EMAConfig
from trainers.errors import ConfigError
from trainers.evaluation.config import SamplesConfig, ValidationConfig
from trainers.integrity import IntegrityConfig
from trainers.models import ModelConfig
from trainers.objectives import ObjectiveConfig
from trainers.optimizers import OptimizerConfig
from trainers.parallel import ParallelConfig
from trainers.schedules import ScheduleConfig


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
    ema_health_every: int | None = 100
    """Steps between two measurements of EMA health, >= 1: two more metrics for each profile; null: never."""

    def __post_init__(self) -> None:
        for key in ("num_steps", "global_batch_size", "microbatch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least 1")
        if self.ema_health_every is not None and self.ema_health_every < 1:
            raise ConfigError(f"ema_health_every={self.ema_health_every} must be at least 1, or null for never")
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
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: dict[str, EMAConfig] = field(default_factory=dict)
    """EMA profiles by name; the first one is the default for sampling and export."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    integrity: IntegrityConfig = field(default_factory=IntegrityConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)

    def __post_init__(self) -> None:
        self.samples.check_weights(list(self.ema))
        self.optimizer.check_strategy(self.parallel)
        if self.model.compile and self.data.buckets is not None:
            raise ConfigError(
                "model.compile=true would compile again in the middle of the run, for every shape of data.buckets; set"
                " it to false, or remove data.buckets"
            )
        if self.integrity.recompute_every is not None and self.parallel.reduction != "invariant":
            raise ConfigError(
                f"integrity.recompute_every={self.integrity.recompute_every} needs parallel.reduction=invariant;"
                f" {self.parallel.reduction} hands over no gradient of a single microbatch; set the first to null"
            )
        if self.objective.contrastive and self.train.microbatch_size < 2:
            raise ConfigError(
                f"objective.contrastive={self.objective.contrastive} pairs the samples of a microbatch, and"
                f" train.microbatch_size={self.train.microbatch_size}; use at least 2"
            )
