"""One optimizer step: what it is made of follows from the config and the clock, whatever was before."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import trainers.step
from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.data.sampler import sample_indices
from trainers.data.samples import Samples
from trainers.exclusions import Exclusions
from trainers.progress import Progress
from trainers.rng import Stream, derive_seed

SEED, SIZE, POSITIONS = 7, 1797, np.arange(72, 96)
"""Of `tiny_config`, and of its fourth step."""


def _fourth_step() -> dict[str, Any]:
    """As a restored state makes it: dataset indices that are read, and what each microbatch is trained with."""
    state, task = build_tiny(tiny_config())
    state.progress = Progress(3, 72)
    state.exclusions = Exclusions(samples=((4, int(sample_indices(SEED, POSITIONS, SIZE)[0])),))
    read, train = task.source._source.read, trainers.step.sample_losses
    indices: list[int] = []
    positions: list[int] = []
    seeds: list[int] = []

    def note_indices(wanted: np.ndarray, crops: np.ndarray | None) -> Samples:
        indices.extend(wanted.tolist())
        return read(wanted, crops)

    def note_positions(*arguments: Any) -> torch.Tensor:
        positions.extend(arguments[-1].tolist())
        seeds.append(torch.initial_seed())
        return train(*arguments)

    task.source._source.read = note_indices  # type: ignore[method-assign]
    trainers.step.sample_losses = note_positions
    trainers.step.train_step(state, task)
    return {"indices": indices, "positions": positions, "seeds": seeds, "after": torch.initial_seed()}


def test_what_a_step_is_made_of_follows_from_the_clock() -> None:
    (found,) = run_ranks(1, _fourth_step)
    first, *others = sample_indices(SEED, POSITIONS, SIZE).tolist()
    assert found["indices"] == [(first + 1) % SIZE, *others], "the first one is left out"
    assert found["positions"] == POSITIONS.tolist()
    assert found["seeds"] == [derive_seed(SEED, Stream.MODEL_INTERNAL, 3, microbatch) for microbatch in range(6)]
    assert found["after"] == derive_seed(SEED, Stream.MODEL_INTERNAL, 4, 6), "whichever microbatch ran here last"
