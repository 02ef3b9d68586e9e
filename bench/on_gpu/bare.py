"""The other side on a GPU: the training loop that one would write with torch alone, without any wish to repeat it.

FSDP2 by block with weights in bfloat16 and sums of gradients in float32, which casts once a step and so is faster than
autocast; fused AdamW, `clip_grad_norm_`, an EMA by `_foreach_lerp_`. Noise is drawn on the device, from where the data
is in pinned memory; nothing waits for the device. Compiled, its blocks are, each as a whole: what FSDP does between
them would break a larger graph. Of unbroken it uses what knows the networks of diffusers: how they are built, called
and cut.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from bench.workload import EMA_DECAY
from trainers.conditioning import Condition, call_model
from trainers.config import TrainerConfig
from trainers.models import build_model
from trainers.units import called_from_outside, sharding_units


class BareLoop:
    """Model, optimizer and EMA of one rank."""

    def __init__(self, config: TrainerConfig, data: dict[str, torch.Tensor], device: torch.device) -> None:
        """Collective: all ranks. Args: config: of our side; data: `Subject.latents`."""
        self._size, self._device = config.train.microbatch_size, device
        self.model: Any = build_model(replace(config.model, compile=False), config.seed).to(device)
        if config.model.compile:
            _compile(self.model)
        _shard(self.model, device)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, fused=True
        )
        noise = config.objective
        levels = DDPMScheduler(
            num_train_timesteps=1000,
            beta_start=noise.beta_start,
            beta_end=noise.beta_end,
            beta_schedule=cast(Any, noise.beta_schedule),
        ).alphas_cumprod.to(device)
        self._of_signal, self._of_noise = levels.sqrt(), (1 - levels).sqrt()
        self._data = {name: part.pin_memory() if device.type == "cuda" else part for name, part in data.items()}
        self._weights = [cast(DTensor, parameter.detach()).to_local() for parameter in self.model.parameters()]
        self._averages = [weight.clone() for weight in self._weights]

    def step(self) -> None:
        """One optimizer step. Collective: all ranks."""
        batch = self._batch()
        latents = batch.pop("latents")
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (self._size,), device=self._device)
        signal, much = (part[timesteps].view(-1, 1, 1, 1) for part in (self._of_signal, self._of_noise))
        noisy = (signal * latents + much * noise).bfloat16()  # (B, 4, h, w)
        if "tokens" in batch:
            batch["tokens"] = batch["tokens"].bfloat16()
        predicted = call_model(self.model, noisy, timesteps, Condition(**batch))
        mse_loss(predicted.float(), noise).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        torch._foreach_lerp_(self._averages, self._weights, 1 - EMA_DECAY)

    def _batch(self) -> dict[str, Any]:
        num = len(self._data["latents"])
        first = int(torch.randint(num - self._size, ()))  # neighbours, so that nothing is gathered
        rows = {name: part[first : first + self._size] for name, part in self._data.items()}
        return {name: part.to(self._device, non_blocking=True) for name, part in rows.items()}


def _compile(model: nn.Module) -> None:
    apart = called_from_outside(model)
    for unit in sharding_units(model):
        for block in unit:
            if block not in apart:  # the root calls these past the block that they are in
                block.forward = torch.compile(
                    block.forward, dynamic=False
                )  # in place, so that FSDP's hooks stay outside


def _shard(model: nn.Module, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    several = dist.get_world_size() > 1  # else there is nothing to free between forward and backward
    for unit in [*sharding_units(model), [model]]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=several)
