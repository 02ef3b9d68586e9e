"""The models that are measured, as plain config values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

SMOKE = (32, 64)
"""Channels of a model for trying out the benchmarks themselves."""
MIDDLE = (160, 256, 320)
"""23 million parameters."""
LARGE = (384, 704)
"""82 million parameters."""

EMA_DECAY = 0.999


def config(
    channels: Sequence[int], *, microbatch_size: int, num_microbatches: int, image_size: int = 16
) -> dict[str, Any]:
    """A `TrainerConfig` as plain values: a UNet on digits, float32, clipped, no EMA."""
    return {
        "model": {
            "class_name": "UNet2DModel",
            "args": {
                "sample_size": image_size,
                "in_channels": 1,
                "out_channels": 1,
                "block_out_channels": list(channels),
                "down_block_types": ["DownBlock2D"] * len(channels),
                "up_block_types": ["UpBlock2D"] * len(channels),
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "num_class_embeds": 11,
            },
        },
        "data": {"source": "digits", "image_size": image_size},
        "train": {
            "num_steps": 1_000_000,
            "global_batch_size": microbatch_size * num_microbatches,
            "microbatch_size": microbatch_size,
        },
    }


def pin(rank: int, pid: int = 0) -> None:
    """Keep a process, and the threads that it will start, on one core: no rank is moved onto another's.

    One of those that this process may use: in a container they need not begin at 0, nor be all of the machine's.

    Args:
        pid: 0: this process.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(pid, {cores[rank % len(cores)]})
