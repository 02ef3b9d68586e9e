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
    captions: tuple[str, ...] | None = None
    """B texts, dropped ones empty; None for data without captions."""
    sizes: torch.Tensor | None = None
    """(B, 6) float32: original height and width, crop top and left, target height and width, in pixels."""
    noise: torch.Tensor
    """(B, c, h, w) float32, standard normal, in the shape of what is denoised."""
    posterior: torch.Tensor | None = None
    """As `noise`, another draw: which of the latents that the VAE finds likely is taken; None without a VAE."""
    uniform: torch.Tensor
    """(B,) float64 in [0, 1), from which the objective makes timesteps."""


def load_microbatch(
    source: Source,
    positions: np.ndarray,
    *,
    seed: int,
    flip: bool,
    null_label: int | None,
    label_drop: float,
    latent_shape: tuple[int, int, int] | None = None,
) -> Batch:
    """The samples at the global `positions`; the same whoever asks for them, alone or together. Local.

    Args:
        positions: (B,) int64, global sample positions.
        flip: mirror half of the samples left to right.
        null_label: what a dropped label becomes; None: the model takes no labels.
        label_drop: share of samples that lose their label or caption, so that one model learns to denoise with and
            without (Ho and Salimans, "Classifier-free diffusion guidance", 2022, algorithm 1).
        latent_shape: (c, h, w) of what a VAE makes of an image; None: the images themselves are denoised.
    """
    samples = source.read(sample_indices(seed, positions, len(source)))
    images, labels, captions = samples.images, samples.labels, samples.captions
    if flip:
        mirrored = torch.from_numpy(uniform(seed, Stream.FLIP, positions) < 0.5)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    dropped = uniform(seed, Stream.LABEL_DROP, positions) < label_drop
    if null_label is None:
        labels = None
    elif labels is not None:
        labels = torch.where(torch.from_numpy(dropped), null_label, labels)
    if captions is not None:
        captions = tuple("" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True))
    return Batch(
        images=images,
        labels=labels,
        captions=captions,
        sizes=samples.sizes,
        noise=normal(seed, Stream.NOISE, positions, latent_shape or tuple(images.shape[1:])),
        posterior=None if latent_shape is None else normal(seed, Stream.POSTERIOR, positions, latent_shape),
        uniform=torch.from_numpy(uniform(seed, Stream.TIMESTEP, positions)),
    )
