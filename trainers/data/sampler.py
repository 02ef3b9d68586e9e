"""Which sample comes when: a function of the seed and the position in the run."""

from __future__ import annotations

import functools

import numpy as np
import torch

from trainers.data.samples import Buckets
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


def bucketed_indices(seed: int, positions: np.ndarray, buckets: Buckets) -> np.ndarray:
    """As `sample_indices` for one microbatch of data in buckets: all samples of it are of one bucket.

    Every epoch puts the samples of each bucket into a random order of its own, cuts it into microbatches, and puts the
    microbatches of all buckets into one random order. The last microbatch of a bucket is filled up from the beginning
    of its order, so each sample is seen at least once an epoch.

    Args:
        positions: (B,) int64, the global positions of a whole microbatch; B is the same in all of the run.
    """
    size = len(positions)
    assert positions[0] % size == 0, "buckets are of whole microbatches"
    per_epoch = sum(-(-count // size) for count in np.bincount(buckets.of).tolist())
    epoch, offset = divmod(int(positions[0]) // size, per_epoch)
    return _microbatches(seed, epoch, size, buckets)[offset].copy()


@functools.lru_cache(maxsize=2)
def _microbatches(seed: int, epoch: int, size: int, buckets: Buckets) -> np.ndarray:
    """(M, size) int64 dataset indices: the microbatches of one epoch."""
    order = _permutation(seed, epoch, len(buckets.of))
    parts = []
    for bucket in range(len(buckets.shapes)):
        members = order[buckets.of[order] == bucket]
        parts.append(np.resize(members, (-(-len(members) // size), size)))  # repeats from the beginning
    rows = np.concatenate(parts)
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.BUCKET_ORDER, epoch))
    return rows[torch.randperm(len(rows), generator=generator).numpy()]
