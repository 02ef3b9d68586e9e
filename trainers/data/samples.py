"""What every source of data gives: samples, read by index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Text:
    """N captions as text encoders see them; what a model does not take is None."""

    tokens: torch.Tensor | None = None
    """(N, T, D) float32."""
    pooled: torch.Tensor | None = None
    """(N, P) float32."""
    mask: torch.Tensor | None = None
    """(N, T) int64."""

    def parts(self) -> dict[str, torch.Tensor]:
        """Those that are there, by name."""
        return {name: part for name, part in vars(self).items() if part is not None}

    def emptied(self, dropped: torch.Tensor, empty: Text) -> Text:
        """With the one row of `empty` in place of the `dropped` ones, (N,) bool."""
        return Text(
            **{
                name: torch.where(dropped.view(-1, *[1] * (part.ndim - 1)), empty.parts()[name], part)
                for name, part in self.parts().items()
            }
        )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N images and what is known of them; the reader may write to all of it."""

    images: torch.Tensor
    """(N, C, H, W) float32 in [-1, 1]; or latents, in their own range."""
    labels: torch.Tensor | None = None
    """(N,) int64."""
    captions: tuple[str, ...] | None = None
    """N texts."""
    sizes: torch.Tensor
    """(N, 6) float32: original height and width, crop top and left, target height and width, in pixels.

    The crop is in pixels of the image after it was resized (Podell et al., "SDXL", 2023, section 2.2)."""
    deviations: torch.Tensor | None = None
    """As `images`, which are then the means of the latents that a VAE finds likely, before shift and scale."""
    text: Text | None = None
    """Captions that are encoded already."""
    broken: tuple[str, ...] = ()
    """Samples that could not be read, and why; others have taken their places."""


def joined(parts: list[Samples]) -> Samples:
    """The samples of all parts, one after the other."""
    first = parts[0]

    def rows(name: str) -> torch.Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    text = first.text and Text(
        **{name: torch.cat([part.text.parts()[name] for part in parts if part.text]) for name in first.text.parts()}
    )
    captions = None if first.captions is None else tuple(text for part in parts for text in part.captions or ())
    tensors = {name: rows(name) for name in ("images", "labels", "sizes", "deviations")}
    return replace(first, **tensors, captions=captions, text=text, broken=sum((part.broken for part in parts), ()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Buckets:
    """Images of several shapes. Every microbatch is of one of them."""

    shapes: tuple[tuple[int, int], ...]
    """(height, width) of each bucket, in pixels."""
    of: np.ndarray
    """(N,) int64: the bucket of each image of the data, by its own size."""


@dataclass(frozen=True, kw_only=True)
class LatentFacts:
    """What is known of latents that were made before the run."""

    shape: tuple[int, int, int]
    """(c, h, w)"""
    shift: float | None = None
    """With `scale`: what the VAE's draws are shifted and scaled by; None: the latents are as they are denoised."""
    scale: float | None = None
    image_size: int | None = None
    """Of the images that they were made of; None: nobody wrote it down."""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """Hash of each frozen part that made them."""
    empty: Text | None = None
    """One row: how the encoders see a caption that was dropped."""
    has_text: bool = False
    has_sizes: bool = False
    """Whether it is known how large the images were, and what was cut off."""


class Source(Protocol):
    """Images that are read by index. Reading is thread-safe."""

    channels: int
    num_classes: int | None
    """None: the images have no labels."""
    has_captions: bool
    identity: str = ""
    """A hash of what the data is, without where it is; a run that comes back to other data is refused."""
    buckets: Buckets | None = None
    """None: all images have one shape."""
    latents: LatentFacts | None = None
    """None: pixels."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        """The images at `indices`, in that order; all of one bucket.

        Args:
            crops: (N, 2) float64 in [0, 1), where from top to bottom and from left to right an image is cut to its
                shape; None: in the middle.
        """
        ...
