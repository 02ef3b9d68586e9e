"""Which sample comes when: a function of the seed and the position in the run."""

from __future__ import annotations

import functools

import numpy as np
import torch

from trainers.rng import Stream, derive_seed


def sample_indices(seed: int, positions: np.ndarray, dataset_size: int) -> np.ndarray:
    """The dataset index of every global sample position.

    Positions run through the dataset epoch by epoch, each epoch in its own random order; a batch may straddle two.
    No state: any rank can ask for any positions, in any order.

    Args:
        positions: (N,) int64, global sample positions, >= 0.
        dataset_size: samples in the dataset, >= 1.

    Returns:
        (N,) int64 in 0 .. dataset_size - 1.
    """
    epochs, offsets = np.divmod(positions, dataset_size)
    indices = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = _permutation(seed, epoch, dataset_size)[offsets[here]]
    return indices


@functools.lru_cache(maxsize=2)  # the two epochs that a batch can straddle
def _permutation(seed: int, epoch: int, dataset_size: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.DATA_ORDER, epoch))
    return torch.randperm(dataset_size, generator=generator).numpy()
