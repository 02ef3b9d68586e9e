"""One microbatch: images, labels and all the randomness of their training, a function of (seed, position)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainers.data.sampler import sample_indices
from trainers.data.sources import Source
from trainers.rng import Stream, normal, uniform


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples, on the CPU."""

    images: torch.Tensor
    """(B, C, H, W) float32 in [-1, 1]."""
    labels: torch.Tensor | None
    """(B,) int64, dropped ones replaced by the null label; None for a model without classes."""
    noise: torch.Tensor
    """(B, C, H, W) float32, standard normal."""
    uniform: torch.Tensor
    """(B,) float64 in [0, 1), from which the objective makes timesteps."""


def load_microbatch(
    source: Source, positions: np.ndarray, *, seed: int, flip: bool, null_label: int | None, label_drop: float
) -> Batch:
    """The samples at the global `positions`; the same whoever asks for them, alone or together. Local.

    Args:
        positions: (B,) int64, global sample positions.
        flip: mirror half of the samples left to right.
        null_label: what a dropped label becomes; None: the model takes no labels.
        label_drop: share of samples that lose their label, so that one model learns to denoise with and without
            (Ho and Salimans, "Classifier-free diffusion guidance", 2022, algorithm 1).
    """
    images, labels = source.read(sample_indices(seed, positions, len(source)))
    if flip:
        mirrored = torch.from_numpy(uniform(seed, Stream.FLIP, positions) < 0.5)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if null_label is None:
        labels = None
    elif labels is not None:
        dropped = torch.from_numpy(uniform(seed, Stream.LABEL_DROP, positions) < label_drop)
        labels = torch.where(dropped, null_label, labels)
    return Batch(
        images=images,
        labels=labels,
        noise=normal(seed, Stream.NOISE, positions, tuple(images.shape[1:])),
        uniform=torch.from_numpy(uniform(seed, Stream.TIMESTEP, positions)),
    )
