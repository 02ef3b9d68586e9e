"""Grids of images that show what the model draws by now."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from trainers.conditioning import Condition, takes_text
from trainers.evaluation.drawing import draw_images, under_labels, under_text
from trainers.sampling import grid_png
from trainers.state import TrainState
from trainers.step import Task


def draw_grid(state: TrainState, task: Task, alive: Callable[[], None]) -> bytes:
    """A PNG of the images of `samples`, as `draw_images` draws them. Collective: all ranks.

    Returns:
        The file on rank 0, nothing elsewhere.
    """
    images = draw_images(state, task, task.config.samples, partial(_conditions, state, task), alive)
    return b"" if state.topology.rank else grid_png(images.cpu(), _num_columns(state, task))


def _conditions(state: TrainState, task: Task, numbers: np.ndarray) -> tuple[Condition, Condition]:
    prompts = task.config.samples.prompts
    if takes_text(state.model):
        return under_text(task, tuple(prompts[number % len(prompts)] for number in numbers.tolist()))
    if task.null_label is None:
        return Condition(), Condition()
    columns = _classes(task)
    return under_labels(task, torch.tensor([columns[number % len(columns)] for number in numbers.tolist()]))


def _classes(task: Task) -> list[int]:
    return list(task.config.samples.labels) or list(range(task.source.num_classes or 1))


def _num_columns(state: TrainState, task: Task) -> int:
    num_images, samples = task.config.samples.num_images, task.config.samples
    if takes_text(state.model):
        return min(num_images, len(samples.prompts))
    if task.null_label is not None:
        return min(num_images, len(_classes(task)))
    return -(-num_images // max(1, int(num_images**0.5)))
