"""The loss of the samples that are held out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from trainers.data.batch import load_microbatch
from trainers.evaluation.shares import shares
from trainers.rng import Stream, derive_key, seed_global_generators
from trainers.state import TrainState
from trainers.step import Task, sample_losses
from trainers.tree import halve


@torch.no_grad()
def validation_loss(state: TrainState, task: Task, alive: Callable[[], None]) -> float:
    """The mean loss of the samples in `task.validation`, as the model is now. Collective: all ranks.

    Each of them has the noise and the timestep of its position in a fixed order, from a seed of their own. Neither
    labels nor captions are dropped, and nothing is flipped. They are cut into microbatches as in training, and the
    losses are summed in the same tree: the same bits at every validation, for every world size and strategy.

    Args:
        alive: called before every microbatch.
    """
    source, config = task.validation, task.config
    assert source is not None
    size, seed = config.train.microbatch_size, derive_key(config.seed, Stream.VALIDATION)
    losses = torch.zeros(len(source), device=task.device)
    for part, counts in shares(-(-len(source) // size), state.topology):
        alive()
        positions = np.arange(part * size, min(len(source), (part + 1) * size))
        task.trace.enter(state.progress.step, part, int(positions[0]))
        batch = load_microbatch(
            source,
            positions,
            seed=seed,
            augment=None,
            null_label=task.null_label,
            label_drop=0.0,
            latent_factor=task.latent_factor,
        )
        task.trace.computing()
        seed_global_generators(seed, 0, part)
        found = sample_losses(state.model, task, batch, seed, positions)
        if counts:
            losses[positions[0] : positions[-1] + 1] = found
    task.trace.leave(())
    dist.all_reduce(losses)  # each rank has zeros in the places of the others, so this is exact
    return (halve(losses) / len(losses)).item()
