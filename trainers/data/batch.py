"""One microbatch: images, labels and all the randomness of their training, a function of (seed, position)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainers.data.augment import augment_, crop_places
from trainers.data.config import DataConfig
from trainers.data.sampler import bucketed_indices, sample_indices
from trainers.data.samples import Samples, Source, Text
from trainers.rng import Stream, normal, uniform


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples, on the CPU."""

    images: torch.Tensor
    """(B, C, H, W) float32 in [-1, 1]; or the latents themselves, if the data holds them."""
    labels: torch.Tensor | None
    """(B,) int64, dropped ones replaced by the null label; None for a model without classes."""
    captions: tuple[str, ...] | None = None
    """B texts, dropped ones empty; None for data without captions."""
    text: Text | None = None
    """The captions as text encoders see them, if the data holds that."""
    sizes: torch.Tensor | None = None
    """(B, 6) float32: original height and width, crop top and left, target height and width, in pixels."""
    noise: torch.Tensor
    """(B, c, h, w) float32, standard normal, in the shape of what is denoised."""
    posterior: torch.Tensor | None = None
    """As `noise`, another draw: which of the latents that the VAE finds likely is taken; None without a VAE."""
    uniform: torch.Tensor
    """(B,) float64 in [0, 1), from which the objective makes timesteps."""
    indices: tuple[int, ...] = ()
    """Where in the data the samples are, before any of them was replaced."""
    broken: tuple[str, ...] = ()
    """Samples that could not be read, and why; others have taken their places."""


def load_microbatch(
    source: Source,
    positions: np.ndarray,
    *,
    seed: int,
    augment: DataConfig | None,
    null_label: int | None,
    label_drop: float,
    latent_factor: tuple[int, int] | None = None,
) -> Batch:
    """The samples at the global `positions`; the same whoever asks for them, alone or together. Local.

    Args:
        positions: (B,) int64, global sample positions; for data in buckets, those of a whole microbatch.
        augment: how samples are changed at random; None: not at all.
        null_label: what a dropped label becomes; None: the model takes no labels.
        label_drop: share of samples that lose their label or caption, so that one model learns to denoise with and
            without (Ho and Salimans, "Classifier-free diffusion guidance", 2022, algorithm 1).
        latent_factor: channels of the latents that a VAE makes of an image, and how many times smaller they are; None:
            what the source has is denoised itself.
    """
    indices = _indices(source, seed, positions)
    samples = source.read(indices, crop_places(augment, seed, positions) if augment else None)
    if augment is not None:
        augment_(samples, augment, seed, positions)
    images, deviations = samples.images, samples.deviations
    dropped = uniform(seed, Stream.LABEL_DROP, positions) < label_drop
    labels, captions, text = _dropped(source, samples, dropped, null_label)
    shape, posterior = tuple(images.shape[1:]), None
    if latent_factor is not None:
        channels, factor = latent_factor
        shape = (channels, shape[1] // factor, shape[2] // factor)
    if latent_factor is not None or deviations is not None:
        posterior = normal(seed, Stream.POSTERIOR, positions, shape)
    if deviations is not None:
        assert source.latents is not None and posterior is not None
        images = draw_latents(images, deviations, posterior, source.latents.shift, source.latents.scale)
        posterior = None
    return Batch(
        images=images,
        labels=labels,
        captions=captions,
        text=text,
        sizes=samples.sizes,
        noise=normal(seed, Stream.NOISE, positions, shape),
        posterior=posterior,
        uniform=torch.from_numpy(uniform(seed, Stream.TIMESTEP, positions)),
        indices=tuple(indices.tolist()),
        broken=samples.broken,
    )


def _indices(source: Source, seed: int, positions: np.ndarray) -> np.ndarray:
    if source.buckets is not None:
        return bucketed_indices(seed, positions, source.buckets)
    return sample_indices(seed, positions, len(source))


def _dropped(
    source: Source, samples: Samples, dropped: np.ndarray, null_label: int | None
) -> tuple[torch.Tensor | None, tuple[str, ...] | None, Text | None]:
    """Labels, captions and encoded captions, where the `dropped` ones, (B,) bool, say nothing."""
    labels, captions, text = samples.labels, samples.captions, samples.text
    if null_label is None:
        labels = None
    elif labels is not None:
        labels = torch.where(torch.from_numpy(dropped), null_label, labels)
    if captions is not None:
        captions = tuple("" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True))
    if text is not None and source.latents is not None and source.latents.empty is not None:
        text = text.emptied(torch.from_numpy(dropped), source.latents.empty)
    return labels, captions, text


def draw_latents(
    mean: torch.Tensor, deviation: torch.Tensor, noise: torch.Tensor, shift: float | None, scale: float | None
) -> torch.Tensor:
    """(B, c, h, w) float32: a draw of what a VAE finds likely, shifted and scaled.

    Source: Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022, appendix G.
    """
    return (mean.float() + deviation.float() * noise - (shift or 0.0)) * (1.0 if scale is None else scale)
