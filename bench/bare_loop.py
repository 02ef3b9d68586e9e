"""The measured program on the other side: the training loop that one would write with torch alone.

`torchrun --nproc-per-node W -m bench.bare_loop CONFIG.json [--ema] [--state FOLDER]`, with the same config as ours.
FSDP2 by block, or torch's DDP; AdamW, `clip_grad_norm_`; of unbroken it uses only `build_model`. With --ema it keeps an
average of the weights. With --state it also saves once after ten steps (each rank a safetensors file of its local
parameters, moments and EMA), and starts from there when it is started again. Every rank prints JSON lines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from bench.digits import digits
from bench.lines import say
from bench.workload import EMA_DECAY, pin
from trainers.models import ModelConfig, build_model

_SAVE_AT = 10


class BareLoop:
    """Model, optimizer and, if wanted, EMA of one rank."""

    def __init__(
        self, config: dict[str, Any], ema: bool, replicate: Callable[[Any], Any] = DistributedDataParallel
    ) -> None:
        """Collective: all ranks.

        Args:
            replicate: makes a replica of the model, where the config's strategy is not fsdp.
        """
        size = config["train"]["microbatch_size"]
        self._size, self._rounds = size, config["train"]["global_batch_size"] // size // config["workers"]
        strategy = config.get("parallel", {}).get("strategy", "fsdp")
        self.model: Any = build_model(ModelConfig(**config["model"]), seed=0)
        self._distributed = _sharded(self.model) if strategy == "fsdp" else replicate(self.model)
        lr = config["optimizer"]["lr"]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=lr,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            fused=True,  # the fastest of its ways
        )
        self._images, self._labels = digits(config["data"]["image_size"])
        self._schedule = DDPMScheduler(num_train_timesteps=1000)
        self._weights = [local(parameter) for parameter in self.model.parameters()]
        self.averages = [weight.clone() for weight in self._weights] if ema else []

    def step(self) -> None:
        """One optimizer step. Collective: all ranks."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()

    def backward(self) -> None:
        """The gradients of a step, clipped. Collective: all ranks."""
        for index in range(self._rounds):
            with self._synchronised(index == self._rounds - 1):
                chosen = torch.randint(len(self._images), (self._size,))
                images = self._images[chosen]
                noise = torch.randn_like(images)
                timesteps = torch.randint(1000, (self._size,))
                noisy = self._schedule.add_noise(images, noise, timesteps)  # pyright: ignore[reportArgumentType]
                predicted = self._distributed(noisy, timesteps, class_labels=self._labels[chosen]).sample
                (mse_loss(predicted, noise) / self._rounds).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def average(self) -> None:
        """Update the EMA, if there is one."""
        if self.averages:
            torch._foreach_lerp_(self.averages, self._weights, 1 - EMA_DECAY)

    def _synchronised(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Exchange gradients in this round's backward, or only add them up."""
        if isinstance(self._distributed, DistributedDataParallel):
            return contextlib.nullcontext() if now else self._distributed.no_sync()
        self._distributed.set_requires_gradient_sync(now)
        return contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--state", type=Path)
    options = parser.parse_args()
    state_file = options.state and options.state / f"{os.environ['RANK']}.safetensors"
    torch.set_num_threads(1)
    pin(int(os.environ["RANK"]))
    say("imported", pid=os.getpid())
    join()
    say("process group")
    loop = BareLoop(json.loads(options.config.read_text()), ema=options.ema or state_file is not None)
    say("built")
    tensors = _state(loop) if state_file else {}
    step = _load(state_file, tensors) if state_file and state_file.exists() else 0
    say("restored", step=step)
    while True:
        loop.step()
        step += 1
        say("step", step=step)
        if state_file and step == _SAVE_AT:
            temporary = state_file.with_suffix(".tmp")
            save_file(tensors, temporary)
            temporary.rename(state_file)
            dist.barrier()
            say("saved", step=step)


def join() -> None:
    """`init_process_group("gloo")`, but with keys of its own for every restart.

    torchrun's store outlives a restart, and torch 2.13 does not tell the restarts apart in it. So a rank can read the
    address at which the other one listened before it was killed; then gloo is refused, which costs one more restart, or
    both ranks wait for the other to connect, until the timeout of 30 minutes. Both were seen here within a few kills.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a parameter or moment on this rank."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _state(loop: BareLoop) -> dict[str, torch.Tensor]:
    """The local tensors to save and load, live; makes AdamW's moments."""
    tensors = {}
    for (name, parameter), average in zip(loop.model.named_parameters(), loop.averages, strict=True):
        moments: dict[str, Any] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        loop.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        tensors |= {f"model/{name}": local(parameter), f"ema/{name}": average}
        tensors |= {f"{key}/{name}": local(moment) for key, moment in moments.items()}
    return tensors


def _load(file: Path, tensors: dict[str, torch.Tensor]) -> int:
    for name, value in load_file(file).items():
        tensors[name].copy_(value)
    return _SAVE_AT


if __name__ == "__main__":
    main()
