"""What trainers say of an evaluation between two steps. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainers.progress import Progress

# trainer of rank 0 -> agent -> coordinator


@dataclass(frozen=True, kw_only=True)
class Validated:
    """The loss of the samples that are held out."""

    progress: Progress
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Drew:
    """A grid of images."""

    progress: Progress
    weights: str
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Training goes on."""

    progress: Progress
    seconds: float
