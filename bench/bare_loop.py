"""The measured program on the other side: the training loop that one would write with torch alone.

`torchrun --nproc-per-node W -m bench.bare_loop CONFIG.json [STATE_FOLDER]`, with the same config as ours. FSDP2 by
block, AdamW, `clip_grad_norm_`; of unbroken it uses only `build_model`. With STATE_FOLDER it also keeps an EMA, saves
once after ten steps (each rank a safetensors file of its local parameters, moments and EMA), and starts from there when
it is started again. Every rank prints JSON lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import interpolate, mse_loss

from bench.workload import pin
from trainers.models import ModelConfig, build_model

_SAVE_AT = 10


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    state_file = Path(sys.argv[2]) / f"{os.environ['RANK']}.safetensors" if len(sys.argv) > 2 else None
    torch.set_num_threads(1)
    pin(int(os.environ["RANK"]))
    _say("imported", pid=os.getpid())
    _join()
    _say("process group")
    model = _sharded(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["optimizer"]["lr"], betas=(0.9, 0.999), weight_decay=0.0, foreach=True
    )
    images, labels = _digits(config["data"]["image_size"])
    schedule = DDPMScheduler(num_train_timesteps=1000)
    _say("built")
    averages = [parameter.detach().to_local().clone() for parameter in model.parameters()] if state_file else None
    tensors = _state(model, optimizer, averages) if averages else {}
    step = _load(state_file, tensors) if state_file and state_file.exists() else 0
    _say("restored", step=step)
    while True:
        _step(model, optimizer, images, labels, schedule, config["train"])
        step += 1
        if averages:
            torch._foreach_lerp_(averages, [parameter.detach().to_local() for parameter in model.parameters()], 0.001)
        _say("step", step=step)
        if state_file and step == _SAVE_AT:
            temporary = state_file.with_suffix(".tmp")
            save_file(tensors, temporary)
            temporary.rename(state_file)
            dist.barrier()
            _say("saved", step=step)


def _join() -> None:
    """`init_process_group("gloo")`, but with keys of its own for every restart.

    torchrun's store outlives a restart, and torch 2.13 does not tell the restarts apart in it. So a rank can read the
    address at which the other one listened before it was killed; then gloo is refused, which costs one more restart, or
    both ranks wait for the other to connect, until the timeout of 30 minutes. Both were seen here within a few kills.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def _say(kind: str, **fields: Any) -> None:
    line = {"kind": kind, "rank": int(os.environ["RANK"]), "time_s": time.time(), **fields}
    os.write(1, f"{json.dumps(line)}\n".encode())  # in one piece: the ranks share the pipe


def _sharded(config: dict[str, Any]) -> Any:
    model: Any = build_model(ModelConfig(**config["model"]), seed=0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    return interpolate(images, (size, size), mode="bilinear", antialias=True), torch.from_numpy(labels)


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    schedule: DDPMScheduler,
    train: dict[str, int],
) -> None:
    rounds = train["global_batch_size"] // train["microbatch_size"] // dist.get_world_size()
    for index in range(rounds):
        model.set_requires_gradient_sync(index == rounds - 1)
        chosen = torch.randint(len(images), (train["microbatch_size"],))
        noise = torch.randn(len(chosen), *images.shape[1:])
        timesteps = torch.randint(1000, (len(chosen),))
        noisy = schedule.add_noise(images[chosen], noise, timesteps)  # pyright: ignore[reportArgumentType]
        loss = mse_loss(model(noisy, timesteps, class_labels=labels[chosen]).sample, noise) / rounds
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _state(model: Any, optimizer: torch.optim.Optimizer, averages: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The local tensors to save and load, live; makes AdamW's moments."""
    tensors = {}
    for (name, parameter), average in zip(model.named_parameters(), averages, strict=True):
        moments: dict[str, Any] = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        tensors |= {f"model/{name}": parameter.detach().to_local(), f"ema/{name}": average}
        tensors |= {f"{key}/{name}": moment.to_local() for key, moment in moments.items()}
    return tensors


def _load(file: Path, tensors: dict[str, torch.Tensor]) -> int:
    for name, value in load_file(file).items():
        tensors[name].copy_(value)
    return _SAVE_AT


if __name__ == "__main__":
    main()
