"""Accelerate with diffusers' `EMAModel`, put together as diffusers' training scripts do it.

`torchrun --nproc-per-node W -m bench.peers.accelerate_loop CONFIG.json`: DDP, as accelerate 1.15 shards nothing on CPU.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from bench.digits import digits
from bench.lines import say
from bench.workload import EMA_DECAY, pin
from trainers.models import ModelConfig, build_model


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    pin(int(os.environ["RANK"]))
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    plain = build_model(ModelConfig(**config["model"]), seed=0)
    average = EMAModel(plain.parameters(), decay=EMA_DECAY, model_cls=type(plain))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=config["optimizer"]["lr"], weight_decay=0.0, fused=True)
    dataset = TensorDataset(*digits(config["data"]["image_size"]))
    loader = DataLoader(dataset, batch_size=config["train"]["microbatch_size"], shuffle=True, drop_last=True)
    rate = get_scheduler("constant", optimizer)
    prepared: Any = accelerator.prepare(plain, optimizer, loader, rate)
    model, optimizer, loader, rate = prepared
    schedule = DDPMScheduler(num_train_timesteps=1000)
    step = 0
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        with accelerator.accumulate(model):
            noise = torch.randn_like(images)
            timesteps = torch.randint(1000, (len(images),))
            noisy = schedule.add_noise(images, noise, timesteps)  # pyright: ignore[reportArgumentType]
            predicted = model(noisy, timesteps, class_labels=labels).sample
            loss = mse_loss(predicted, noise)
            accelerator.gather(loss.detach()).mean().item()  # pyright: ignore[reportAttributeAccessIssue]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(model.parameters())
        step += 1
        say("step", step=step)


if __name__ == "__main__":
    main()
