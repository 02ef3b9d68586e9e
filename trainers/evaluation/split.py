"""Which samples are held out of training."""

from __future__ import annotations

import numpy as np

from trainers.errors import ConfigError
from trainers.evaluation.config import ValidationConfig
from trainers.rng import Stream, uniform


def split(config: ValidationConfig, seed: int, dataset_size: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The dataset indices to train on and those to validate on, (N,) int64 in rising order; None, None: train on all.

    A sample's number of (seed, index) decides, so with `fraction` a dataset that grows keeps its split.

    Raises:
        ConfigError: one of the two would be empty.
    """
    if not config.holds_out:
        return None, None
    numbers = uniform(seed, Stream.SPLIT, np.arange(dataset_size))
    if config.fraction is not None:
        held_out = numbers < config.fraction
        asked = f"validation.fraction={config.fraction}"
    else:
        held_out = np.zeros(dataset_size, dtype=bool)
        held_out[np.argsort(numbers, kind="stable")[: config.num_samples]] = True
        asked = f"validation.num_samples={config.num_samples}"
    if not held_out.any() or held_out.all():
        which = "all" if held_out.all() else "none"
        raise ConfigError(f"{asked} holds out {which} of the {dataset_size} samples of the data; set another number")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
