"""Low-rank adapters: small matrices that are trained in place of the pretrained weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import xxhash
from torch import nn

from trainers.errors import ConfigError
from trainers.rng import Stream, derive_seed


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters W + (alpha / rank) B A, of which only A and B are trained.

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021, section 4.1.
    """

    rank: int = 16
    """Rows of A and columns of B, >= 1."""
    alpha: float | None = None
    """Strength of the adapters times rank, > 0; null: rank, so that B A is added as it is."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that get an adapter, by the end of their name; the default is attention."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are dropped in training, 0 <= p < 1."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank={self.rank} must be at least 1; 4 to 64 is usual")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha} must be above 0; null stands for rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not self.target_modules:
            raise ConfigError("target_modules=[] leaves nothing to train; name layers, such as to_q")

    def initial(self, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        """The first value of the adapter's tensor `name`: a function of (seed, name). A as peft has it, B zero."""
        if ".lora_B." in name:
            return torch.zeros(shape)
        key = xxhash.xxh3_64_intdigest(name.encode())
        generator = torch.Generator().manual_seed(derive_seed(seed, Stream.ADAPTER_INIT, key))
        value = torch.empty(shape)
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        return value


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters into `model`, in place; all other parameters stop asking for gradients.

    Raises:
        ConfigError: peft is not installed, or no layer has one of the names.
    """
    try:
        import peft  # an optional package
    except ImportError as error:
        raise ConfigError("model.lora needs peft; run: pip install peft") from error
    try:
        cast(Any, model).add_adapter(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=cast(int, config.alpha or config.rank),
                target_modules=list(config.target_modules),
                lora_dropout=config.dropout,
            )
        )
    except ValueError as error:
        raise ConfigError(
            f"model.lora.target_modules={list(config.target_modules)} are refused ({error}); name layers of the model"
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter's tensor."""
    return ".lora_" in name
