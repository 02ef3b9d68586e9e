"""A run with real weights in its checkpoints, made without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.checkpoint.writer import CommitInfo, commit, write_shard
from orchestrator.config import RunConfig, to_dict
from trainers.decode import decode
from trainers.models import build_model
from trainers.progress import Progress
from trainers.shards import Chunk, TensorSpec

CONFIG = {
    "run": {"name": "tiny"},
    "model": {
        "class_name": "UNet2DModel",
        "args": {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": [8, 16],
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"],
            "norm_num_groups": 8,
            "num_class_embeds": 11,
        },
    },
    "objective": {"label_drop": 0.1},
    "ema": {"slow": {"decay": 0.99}, "late": {"decay": 0.9, "start_step": 9}},
    "train": {"num_steps": 20, "global_batch_size": 8, "microbatch_size": 2},
}
WORLD_SIZE = 2


def parameters(seed: int) -> dict[str, torch.Tensor]:
    model = build_model(decode(RunConfig, CONFIG).model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save(store: Store, step: int, tensors: dict[str, torch.Tensor], scalars: Mapping[str, Any] | None = None) -> None:
    """A checkpoint of two ranks, with the rows of every tensor split between them."""
    progress, receipts = Progress(step, step * 8), []
    for rank in range(WORLD_SIZE):
        chunks, parts, begin = [], [], 0
        for name, tensor in tensors.items():
            spec = TensorSpec(name=name, dtype="F32", shape=tuple(tensor.shape))
            first, last = spec.num_rows * rank // WORLD_SIZE, spec.num_rows * (rank + 1) // WORLD_SIZE
            part = tensor[first:last].numpy().tobytes()
            chunks.append(Chunk(spec=spec, row_offset=first, num_rows=last - first, begin=begin, end=begin + len(part)))
            parts.append(part)
            begin += len(part)
        key = CheckpointRef(progress.samples_seen, 1).shard(rank, WORLD_SIZE)
        receipts.append(write_shard(store, key, chunks, memoryview(b"".join(parts)), {}))
    info = CommitInfo(
        run_id="0123456789ab",
        attempt=1,
        progress=progress,
        reason="interval",
        strategy="fsdp",
        config_hash="c0ffee",
        versions={},
        scalars=scalars or {},
        health={"ok": True},
    )
    commit(store, receipts, info)


def make_run(folder: Path) -> str:
    """Steps 5 and 10; raw weights of seed `step`, EMA weights of seeds 100 and (from step 10) 200."""
    store = Store.open(str(folder / "tiny"))
    open_or_create(store, to_dict(decode(RunConfig, CONFIG)))
    for step in (5, 10):
        tensors = {f"model/{name}": tensor for name, tensor in parameters(step).items()}
        tensors |= {f"ema/slow/{name}": tensor for name, tensor in parameters(100).items()}
        if step == 10:
            tensors |= {f"ema/late/{name}": tensor for name, tensor in parameters(200).items()}
        save(store, step, tensors)
    return store.url
