"""The two networks that are trained, as the recipes have them, with random weights on random latents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from bench.workload import EMA_DECAY
from trainers.conditioning import call_model
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.fitting import blank_condition
from trainers.models import empty_model, settings_of

_NUM_SAMPLES = 512
_UNET = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
}
_DIT = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_embeds_ada_norm": 1000,
}
_SMALL_DIT = {**_DIT, "sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network and how it is trained."""

    class_name: str
    args: Mapping[str, Any]
    num_tokens: int
    """Of text; 0: labels instead."""
    microbatch_size: int
    """The recipe's."""
    noise: Mapping[str, Any]
    """Settings of the noise schedule."""

    def config(self, data: Path, world_size: int, compiled: bool) -> TrainerConfig:
        """A run of one microbatch a rank on the latents in `data`: the recipe's, but for what the bare loop has not.

        That is: gradients clipped, no learned variance, no label dropped.
        """
        content = {
            "model": {"class_name": self.class_name, "args": dict(self.args), "compile": compiled},
            "data": {"source": "latents", "path": str(data), "image_size": self.args["sample_size"], "num_workers": 4},
            "objective": {"prediction_type": "epsilon", **self.noise},
            "optimizer": {"lr": 1e-4, "weight_decay": 0.01, "clip_norm": 1.0},
            "ema": {"main": {"decay": EMA_DECAY}},
            "train": {
                "num_steps": 1_000_000,
                "global_batch_size": self.microbatch_size * world_size,
                "microbatch_size": self.microbatch_size,
                "precision": "bf16",
            },
        }
        return decode(TrainerConfig, json.loads(json.dumps(content)))

    def latents(self) -> dict[str, torch.Tensor]:
        """What there is to train on, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        size, num = self.args["sample_size"], _NUM_SAMPLES
        made = {"latents": torch.randn(num, 4, size, size, generator=generator)}
        if self.num_tokens:
            shape = (num, self.num_tokens, self.args["cross_attention_dim"])
            return made | {"tokens": torch.randn(shape, generator=generator).half()}
        classes = self.args["num_embeds_ada_norm"]
        return made | {"labels": torch.randint(classes, (num,), generator=generator)}

    def write(self, folder: Path) -> Path:
        """The same as a run reads them."""
        folder.mkdir(parents=True)
        save_file(self.latents(), folder / "latents.safetensors")
        return folder


_STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SUBJECTS = {
    "sd2-unet": Subject(
        class_name="UNet2DConditionModel", args=_UNET, num_tokens=77, microbatch_size=16, noise=_STABLE_DIFFUSION
    ),
    "dit-xl-2": Subject(
        class_name="DiTTransformer2DModel",
        args=_DIT,
        num_tokens=0,
        microbatch_size=32,
        noise={"beta_schedule": "linear"},
    ),
}
SMALL = {
    "sd2-unet": replace(SUBJECTS["sd2-unet"], args=_SMALL_UNET, num_tokens=3, microbatch_size=2),
    "dit-xl-2": replace(SUBJECTS["dit-xl-2"], args=_SMALL_DIT, microbatch_size=2),
}
"""For trying out."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one network amounts to."""

    num_parameters: int
    flops: int
    """Of forward and backward of one sample, a multiplication and an addition counted as two.

    Of products of matrices, convolutions and attention. What is computed again to save memory would not be in it, nor
    are the optimizer and the EMA.
    """

    @property
    def two_states_bytes(self) -> int:
        """The least that two trainings need that take turns, activations left out.

        Each has weights, two moments and an average in float32 and the weights in bfloat16; one of them has gradients.
        """
        return (2 * (4 + 8 + 4 + 2) + 4) * self.num_parameters


def count(config: TrainerConfig, num_tokens: int) -> Counted:
    """On the meta device, so without memory and time of the real one."""
    meta = torch.device("meta")
    with meta:
        model = empty_model(config.model, config.seed)
    settings = settings_of(model)
    condition = blank_condition(model, 1, max(1, num_tokens), meta)
    size = settings["sample_size"]
    noisy = torch.zeros(1, settings["in_channels"], size, size, device=meta)
    with FlopCounterMode(display=False) as counter:
        prediction = call_model(model, noisy, torch.zeros(1, dtype=torch.long, device=meta), condition)
        prediction.sum().backward()
    return Counted(num_parameters=sum(p.numel() for p in model.parameters()), flops=counter.get_total_flops())
