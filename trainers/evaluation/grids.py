"""Grids of images that show what the model draws by now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainers.conditioning import Condition, takes_text
from trainers.evaluation.shares import shares
from trainers.rng import Stream, normal
from trainers.sampling import denoise, grid_png, guided, to_pixels, usual_guidance
from trainers.state import TrainState
from trainers.step import Task


@torch.no_grad()
def draw_grid(state: TrainState, task: Task, alive: Callable[[], None]) -> bytes:
    """A PNG of the images of `samples`, with the weights that the model has now. Collective: all ranks.

    Image i starts from noise of (samples.seed, i) and is drawn together with the same others whatever the number of
    workers, so the picture has the same bits for every world size and strategy.

    Args:
        alive: called before every part of the images.

    Returns:
        The file on rank 0, nothing elsewhere.
    """
    config, samples = task.config, task.config.samples
    num_images, train = samples.num_images, config.train
    size = min(train.microbatch_size, -(-num_images // train.num_microbatches))
    shape = task.latent_shape or (task.source.channels, config.data.image_size, config.data.image_size)
    image_shape = (task.source.channels, config.data.image_size, config.data.image_size)
    images = torch.zeros(num_images, *image_shape, dtype=torch.uint8, device=task.device)
    guidance = samples.guidance
    if guidance is None:
        guidance = usual_guidance(state.model, config.objective.label_drop)
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    for part, counts in shares(-(-num_images // size), state.topology):
        alive()
        numbers = np.arange(part * size, min(num_images, (part + 1) * size))
        noise = normal(samples.seed, Stream.SAMPLING, numbers, shape).to(task.device)
        given, without = _conditions(state, task, numbers)
        predict = guided(state.model, given, without, guidance, dtype)
        drawn = denoise(predict, _scheduler(task), noise, samples.num_steps)
        if counts:
            drawn = task.frozen.images(drawn) if task.frozen else drawn
            images[torch.from_numpy(numbers)] = to_pixels(drawn)
    dist.all_reduce(images)  # each rank has zeros in the places of the others
    return b"" if state.topology.rank else grid_png(images.cpu(), _num_columns(state, task))


def _scheduler(task: Task) -> Any:
    scheduler: Any = task.objective.scheduler()
    if task.latent_shape is not None and "clip_sample" in scheduler.config:
        return type(scheduler).from_config(scheduler.config, clip_sample=False)  # latents reach beyond 1
    return scheduler


def _conditions(state: TrainState, task: Task, numbers: np.ndarray) -> tuple[Condition, Condition]:
    """Of the images with these numbers: what they are to show, and nothing in particular."""
    samples, device = task.config.samples, task.device
    if takes_text(state.model):
        assert task.frozen is not None
        side = float(task.config.data.image_size)
        sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]] * len(numbers), device=device)
        prompts = tuple(samples.prompts[number % len(samples.prompts)] for number in numbers.tolist())
        empty = ("",) * len(prompts)
        return task.frozen.condition(None, prompts, sizes), task.frozen.condition(None, empty, sizes)
    if task.null_label is None:
        return Condition(), Condition()
    columns = _classes(task)
    labels = torch.tensor([columns[number % len(columns)] for number in numbers.tolist()], device=device)
    return Condition(labels=labels), Condition(labels=torch.full_like(labels, task.null_label))


def _classes(task: Task) -> list[int]:
    return list(task.config.samples.labels) or list(range(task.source.num_classes or 1))


def _num_columns(state: TrainState, task: Task) -> int:
    num_images, samples = task.config.samples.num_images, task.config.samples
    if takes_text(state.model):
        return min(num_images, len(samples.prompts))
    if task.null_label is not None:
        return min(num_images, len(_classes(task)))
    return -(-num_images // max(1, int(num_images**0.5)))
