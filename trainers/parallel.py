"""Strategies: how parameters are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and its gradients are spread over the workers."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    """ddp: every worker holds all; fsdp: every worker holds a shard; hsdp: shards inside groups of shard_size."""
    shard_size: int = 2
    """Workers in one shard group of hsdp, >= 1; the world size must be a multiple of it."""
    reduction: Literal["invariant", "fast"] = "invariant"
    """invariant: bitwise the same numbers at every world size; fast: torch's own, the same at equal world size only."""
    cpu_threads: int = 1
    """torch threads a worker on CPU, >= 1. CPU kernels split sums by thread, so this decides numbers."""

    def __post_init__(self) -> None:
        for key in ("shard_size", "cpu_threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least 1")
