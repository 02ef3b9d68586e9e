"""Lightning's Trainer with its own EMA callback.

`torchrun --nproc-per-node W -m bench.peers.lightning_loop CONFIG.json`: DDP, as Lightning's FSDP needs a GPU, and its
weight averaging takes no sharded model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from lightning.pytorch import Callback, LightningModule, Trainer  # pyright: ignore[reportMissingImports]
from lightning.pytorch.callbacks import EMAWeightAveraging  # pyright: ignore[reportMissingImports]
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from bench.digits import digits
from bench.lines import say
from bench.workload import EMA_DECAY, pin
from trainers.models import ModelConfig, build_model


class _Diffusion(LightningModule):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._lr = config["optimizer"]["lr"]
        self.model = build_model(ModelConfig(**config["model"]), seed=0)
        self._schedule = DDPMScheduler(num_train_timesteps=1000)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, (len(images),))
        noisy = self._schedule.add_noise(images, noise, timesteps)  # pyright: ignore[reportArgumentType]
        return mse_loss(self.model(noisy, timesteps, class_labels=labels).sample, noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self._lr, weight_decay=0.0, fused=True)


class _Say(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: object, **__: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        say("step", step=trainer.global_step)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    pin(int(os.environ["RANK"]))
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="ddp",
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[EMAWeightAveraging(decay=EMA_DECAY), _Say()],  # in this order: a step ends after its average
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dataset = TensorDataset(*digits(config["data"]["image_size"]))
    loader = DataLoader(dataset, batch_size=config["train"]["microbatch_size"], shuffle=True, drop_last=True)
    trainer.fit(_Diffusion(config), loader)


if __name__ == "__main__":
    main()
