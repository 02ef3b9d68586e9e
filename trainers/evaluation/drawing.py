"""Images that are drawn between two steps, dealt out to the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainers.conditioning import Condition
from trainers.evaluation.config import MetricsConfig, SamplesConfig
from trainers.evaluation.shares import shares
from trainers.rng import Stream, normal
from trainers.sampling import denoise, guided, to_pixels, usual_guidance
from trainers.state import TrainState
from trainers.step import Task

Conditions = Callable[[np.ndarray], tuple[Condition, Condition]]
"""Of the images with these numbers: what they are to show, and nothing in particular."""


@torch.no_grad()
def draw_images(
    state: TrainState,
    task: Task,
    wanted: SamplesConfig | MetricsConfig,
    conditions: Conditions,
    alive: Callable[[], None],
) -> torch.Tensor:
    """(N, C, H, W) uint8 on every rank, drawn with the weights that the model has now. Collective: all ranks.

    Image i starts from noise of (seed, i) and is drawn together with the same others whatever the number of workers, so
    it has the same bits for every world size and strategy.

    Args:
        alive: called before every part of the images.
    """
    config, num_images = task.config, wanted.num_images
    size = min(config.train.microbatch_size, -(-num_images // config.train.num_microbatches))
    shape = task.latent_shape or (task.source.channels, config.data.image_size, config.data.image_size)
    image_shape = (task.source.channels, config.data.image_size, config.data.image_size)
    images = torch.zeros(num_images, *image_shape, dtype=torch.uint8, device=task.device)
    guidance = wanted.guidance
    if guidance is None:
        guidance = usual_guidance(state.model, config)
    scheduler = _scheduler(task)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for part, counts in shares(-(-num_images // size), state.topology):
        alive()
        numbers = np.arange(part * size, min(num_images, (part + 1) * size))
        noise = normal(wanted.seed, Stream.SAMPLING, numbers, shape).to(task.device)
        given, without = conditions(numbers)
        predict = guided(state.model, given, without, guidance, dtype)
        drawn = denoise(predict, scheduler, noise, wanted.num_steps)
        if counts:
            drawn = task.frozen.images(drawn) if task.frozen else drawn
            images[numbers[0] : numbers[-1] + 1] = to_pixels(drawn)
    dist.all_reduce(images)  # each rank has zeros in the places of the others
    return images


def under_text(task: Task, texts: tuple[str, ...]) -> tuple[Condition, Condition]:
    """The conditions of square images of what `texts` say, and of nothing in particular."""
    assert task.frozen is not None
    side = float(task.config.data.image_size)
    sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]] * len(texts), device=task.device)
    return task.frozen.condition(None, texts, sizes), task.frozen.condition(None, ("",) * len(texts), sizes)


def under_labels(task: Task, labels: torch.Tensor) -> tuple[Condition, Condition]:
    """The conditions of images of classes, (N,) int64, and of nothing in particular."""
    labels = labels.to(task.device)
    return Condition(labels=labels), Condition(labels=torch.full_like(labels, task.null_label or 0))


def _scheduler(task: Task) -> Any:
    """The objective's sampler. Where the pipeline's shift follows from the size of the image, with that shift."""
    scheduler = task.objective.scheduler(pixels=task.latent_shape is None)
    folder = task.config.model.folder()
    settings = folder.scheduler if folder else {}
    if task.latent_shape is None or "shift" not in scheduler.config or not settings.get("use_dynamic_shifting"):
        return scheduler
    _, height, width = task.latent_shape
    return type(scheduler).from_config(scheduler.config, shift=dynamic_shift(settings, height // 2 * (width // 2)))


def dynamic_shift(settings: Mapping[str, Any], num_tokens: int) -> float:
    """The shift of an image of so many tokens, as diffusers' Flux pipeline has it.

    Args:
        settings: of the pipeline's scheduler.
    """
    fewest, most = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    low, high = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
    mu = low + (high - low) * (num_tokens - fewest) / (most - fewest)
    return mu if settings.get("time_shift_type") == "linear" else math.exp(mu)
