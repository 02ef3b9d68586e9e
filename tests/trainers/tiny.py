"""Small configurations that train for real: every feature of the determinism contract, in milliseconds a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainers.build import build
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.state import TrainState, fingerprints
from trainers.step import Task, train_step

UNET = {
    "class_name": "UNet2DModel",
    "args": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "num_class_embeds": 11,
        "dropout": 0.1,
    },
}

DIT = {
    "class_name": "DiTTransformer2DModel",
    "args": {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "patch_size": 2,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 10,
        "dropout": 0.1,
    },
}


def tiny_config(model: Mapping[str, Any] = UNET, **sections: Any) -> dict[str, Any]:
    """A whole `TrainerConfig` as plain values; sections given by name are merged over the defaults."""
    config: dict[str, Any] = {
        "seed": 7,
        "model": dict(model),
        "objective": {"prediction_type": "epsilon", "weighting": "min_snr"},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.01, "clip_norm": 0.5},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "ema": {"slow": {"decay": 0.9}, "late": {"kind": "sma", "num_steps": 4, "start_step": 2}},
        "parallel": {"strategy": "fsdp"},
        "train": {"num_steps": 4, "global_batch_size": 24, "microbatch_size": 4},
    }
    for name, values in sections.items():
        config[name] = {**config[name], **values} if isinstance(config.get(name), dict) else values
    return config


def build_tiny(config: Mapping[str, Any]) -> tuple[TrainState, Task]:
    """Build on this rank's CPU. Collective."""
    return build(decode(TrainerConfig, config), torch.device("cpu"))


def train_tiny(config: Mapping[str, Any], num_steps: int) -> tuple[list[dict[str, float]], dict[str, int]]:
    """The numbers of each step and the fingerprint of every tensor after the last. Collective."""
    state, task = build_tiny(config)
    metrics = [train_step(state, task) for _ in range(num_steps)]
    state.generators.capture()
    return metrics, fingerprints(state)
