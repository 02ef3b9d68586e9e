"""FID, KID and CLIP score between two steps: how near drawn images are to those that are held out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from trainers.conditioning import Condition, takes_text
from trainers.data.sampler import sample_indices
from trainers.data.samples import Samples
from trainers.evaluation.drawing import draw_images, under_labels, under_text
from trainers.evaluation.metrics import FeatureNetwork, frechet_distance, kernel_distance
from trainers.evaluation.shares import shares
from trainers.sampling import to_pixels
from trainers.state import TrainState
from trainers.step import Task
from trainers.tree import halve

Load = Callable[[np.ndarray], torch.Tensor]


@torch.no_grad()
def measure(state: TrainState, task: Task, alive: Callable[[], None]) -> dict[str, float]:
    """The numbers of `validation.metrics`, with the weights that the model has now. Collective: all ranks.

    Images are drawn with the labels or captions of samples that are held out, and compared with all of these. Drawing
    and networks are shared out; distances are computed by rank 0 of all features in one order. So there are the same
    bits at every world size, and every time.

    Args:
        alive: called before every part.
    """
    config, networks = task.config.validation.metrics, task.networks
    assert config is not None and networks is not None
    drawn = draw_images(state, task, config, partial(_conditions, state, task), alive)
    found: dict[str, float] = {}
    if networks.features is not None:
        ours = _features(state, task, networks.features, len(drawn), drawn.__getitem__, alive)
        assert task.validation is not None
        held_out = partial(_held_out_pixels, state, task)
        theirs = _features(state, task, networks.features, len(task.validation), held_out, alive)
        alive()
        found |= _distances(state, task, theirs, ours)
    if networks.clip is not None:
        found[f"clip/{networks.clip.name}"] = _clip_score(state, task, drawn, alive)
    task.trace.leave(())
    return found


def _distances(state: TrainState, task: Task, real: torch.Tensor, drawn: torch.Tensor) -> dict[str, float]:
    config, networks = task.config.validation.metrics, task.networks
    assert config is not None and networks is not None and networks.features is not None
    names = [name for name in config.names if name != "clip"]
    values = torch.zeros(len(names), dtype=torch.float64, device=task.device)
    if state.topology.rank == 0:
        of = {"fid": frechet_distance, "kid": lambda a, b: kernel_distance(a, b, config.seed)[0]}
        values = torch.tensor([of[name](real, drawn) for name in names], dtype=torch.float64, device=task.device)
    dist.broadcast(values, 0)
    return {f"{name}/{networks.features.name}": value for name, value in zip(names, values.tolist(), strict=True)}


def _features(
    state: TrainState, task: Task, network: FeatureNetwork, num: int, pixels: Load, alive: Callable[[], None]
) -> torch.Tensor:
    """(num, D) float32 on the CPU of every rank: the features of images, of which each rank makes its part."""
    size, rows = task.config.train.microbatch_size, None
    for part, counts in shares(-(-num // size), state.topology):
        alive()
        numbers = np.arange(part * size, min(num, (part + 1) * size))
        found = network(pixels(numbers))  # also where it does not count: so every rank knows how wide features are
        rows = torch.zeros(num, found.shape[1], device=task.device) if rows is None else rows
        if counts:
            rows[numbers[0] : numbers[-1] + 1] = found.to(task.device)
    assert rows is not None
    dist.all_reduce(rows)  # each rank has zeros in the places of the others, so this is exact
    return rows.cpu()


def _clip_score(state: TrainState, task: Task, drawn: torch.Tensor, alive: Callable[[], None]) -> float:
    assert task.networks is not None and task.networks.clip is not None
    size = task.config.train.microbatch_size
    sums = torch.zeros(-(-len(drawn) // size), dtype=torch.float64, device=task.device)
    for part, counts in shares(len(sums), state.topology):
        alive()
        numbers = np.arange(part * size, min(len(drawn), (part + 1) * size))
        if counts:
            texts = _counterparts(state, task, numbers).captions
            assert texts is not None
            sums[part] = task.networks.clip(drawn[numbers], texts) * len(numbers)
    dist.all_reduce(sums)
    return halve(sums).item() / len(drawn)


def _conditions(state: TrainState, task: Task, numbers: np.ndarray) -> tuple[Condition, Condition]:
    text = takes_text(state.model)
    if not text and task.null_label is None:
        return Condition(), Condition()
    samples = _counterparts(state, task, numbers)
    if text:
        assert samples.captions is not None
        return under_text(task, samples.captions)
    assert samples.labels is not None
    return under_labels(task, samples.labels)


def _counterparts(state: TrainState, task: Task, numbers: np.ndarray) -> Samples:
    """The samples that the drawn images with these numbers have label and caption of."""
    assert task.validation is not None
    return _read(state, task, sample_indices(task.config.seed, numbers, len(task.validation)))


def _held_out_pixels(state: TrainState, task: Task, numbers: np.ndarray) -> torch.Tensor:
    return to_pixels(_read(state, task, numbers).images)


def _read(state: TrainState, task: Task, indices: np.ndarray) -> Samples:
    assert task.validation is not None
    task.trace.enter(state.progress.step, 0, int(indices[0]))
    samples = task.validation.read(indices)
    task.trace.computing()
    return samples
