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


def _skipped_step() -> list[int]:
    """What is read of the held out samples after a step that passes without training, in a process that began there."""
    state, task = build_tiny(tiny_config(validation={"num_samples": 10}))
    assert task.validation is not None
    held_out = task.validation._members.tolist()  # type: ignore[union-attr]
    state.exclusions = Exclusions(steps=((1, 1),), samples=((1, held_out[3]),))
    assert trainers.step.train_step(state, task) == {"skipped": 1.0}
    read, indices = task.validation._source.read, list[int]()

    def note(wanted: np.ndarray, crops: np.ndarray | None) -> Samples:
        indices.extend(wanted.tolist())
        return read(wanted, crops)

    task.validation._source.read = note  # type: ignore[method-assign]
    for index in range(10):
        task.validation.read(np.array([index]))
    return [held_out.index(index) for index in indices]


def test_what_is_left_out_of_a_validation_follows_from_the_clock_too() -> None:
    (found,) = run_ranks(1, _skipped_step)
    assert found == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]


def _read_ahead(num_workers: int) -> list[tuple[int, ...]]:
    """Which samples the trace names in the microbatches of a step."""
    config = tiny_config(validation={"fraction": 0.5}, data={"num_workers": num_workers})
    state, task = build_tiny(config)
    train, named = trainers.step.sample_losses, list[tuple[int, ...]]()

    def note(*arguments: Any) -> torch.Tensor:
        named.append(task.trace.place().samples)  # type: ignore[union-attr]
        return train(*arguments)

    trainers.step.sample_losses = note
    trainers.step.train_step(state, task)
    return named


def test_samples_that_were_read_ahead_are_named_as_they_are_in_the_data() -> None:
    """Also where others are held out, and with any number of threads."""
    (alone,), (threads,) = (run_ranks(1, _read_ahead, num_workers) for num_workers in (0, 2))
    assert len(alone) == 6 and threads == alone
