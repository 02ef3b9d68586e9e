"""Validation and sample grids: the sections `validation` and `samples`, and what they demand of model and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from trainers.conditioning import takes_text
from trainers.data.samples import Source
from trainers.errors import ConfigError
from trainers.models import null_label

RAW = "raw"
"""The weights themselves, among the names of EMA profiles."""
FIRST = "ema"
"""The first EMA profile."""


INCEPTION = "inception"
"""The standard network of FID and KID: Inception v3 with the weights of 2015, as torch-fidelity has them."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How near drawn images are to the samples that are held out, measured with the weights and every EMA profile."""

    names: tuple[Literal["fid", "kid", "clip"], ...] = ("kid",)
    """Some of fid, kid and clip. fid is mostly bias unless there are many more images than features."""
    network: str = INCEPTION
    """Features of fid and kid: inception, or a TorchScript or .pt2 file that makes (N, D) of (N, 3, H, W) uint8."""
    clip: str | None = None
    """Model of the CLIP score: a folder in transformers' form, or a name on the hub."""
    every_steps: int | None = None
    """Measured after every so many steps and at the end, >= 1; null: with every validation loss."""
    num_images: int = 1000
    """Images to draw, >= 2; they have the labels or captions of samples that are held out, in turn."""
    num_steps: int = 50
    """Denoising steps, >= 1."""
    guidance: float | None = None
    """Classifier-free guidance, or what a guidance-distilled model is told, >= 0; 1 is none. null: what diffusers'
    pipeline takes (Stable Diffusion 7.5, Flux 3.5); of a network alone 1.5; 1 where the model can not be guided."""
    seed: int = 0
    """Of the noise that the images are made of, >= 0."""

    def __post_init__(self) -> None:
        for key, low in (("every_steps", 1), ("num_images", 2), ("num_steps", 1), ("guidance", 0), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < low:
                raise ConfigError(f"{key}={value} must be at least {low}")
        if not self.names:
            raise ConfigError("names=[] measures nothing; give some of fid, kid, clip, or metrics: null")
        if ("clip" in self.names) != (self.clip is not None):
            raise ConfigError(f"clip={self.clip} and names={list(self.names)}: the CLIP score needs both, or neither")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Samples that are never trained on, and how often the loss of them is measured. Neither given: none are."""

    fraction: float | None = None
    """Share of the samples that is held out, 0 < fraction < 1; which ones is a function of the seed and their index."""
    num_samples: int | None = None
    """Number of samples to hold out instead, >= 1."""
    every_steps: int | None = 1000
    """Their loss is measured after every so many steps and at the end, >= 1; null: never."""
    metrics: MetricsConfig | None = None
    """How near drawn images are to them, too; null: not measured."""

    def __post_init__(self) -> None:
        if self.fraction is not None and self.num_samples is not None:
            raise ConfigError(f"fraction={self.fraction} and num_samples={self.num_samples}: give one of them")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ConfigError(f"fraction={self.fraction} must be between 0 and 1, both excluded; 0.01 is usual")
        for key in ("num_samples", "every_steps"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value} must be at least 1, or null for none")
        if not self.holds_out and self.every_steps not in (None, 1000):
            raise ConfigError(
                f"every_steps={self.every_steps} has no effect, as nothing is held out; give fraction or num_samples"
            )

        if not self.holds_out and self.metrics is not None:
            raise ConfigError("metrics compare with samples that are held out; give fraction or num_samples")
        if self.metrics is not None and self.every_steps is None and self.metrics.every_steps is None:
            raise ConfigError("every_steps=null and metrics.every_steps=null: metrics are never measured; give one")

    @property
    def holds_out(self) -> bool:
        return self.fraction is not None or self.num_samples is not None

    def due(self, step: int, num_steps: int) -> bool:
        """Whether there is a validation after `step` completed steps."""
        return self.holds_out and _due(self.every_steps, step, num_steps)

    def measures(self, step: int, num_steps: int) -> bool:
        """Whether images are drawn and compared after `step` completed steps."""
        return self.metrics is not None and _due(self.metrics.every_steps or self.every_steps, step, num_steps)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Images that are drawn while the model is trained, from the same noise each time."""

    every_steps: int | None = None
    """A grid after every so many steps and at the end, >= 1; null: none."""
    num_images: int = 16
    """Images of one grid, >= 1. They are cut like the batch of a step, so that as many workers can draw them."""
    num_steps: int = 50
    """Denoising steps, >= 1."""
    guidance: float | None = None
    """Classifier-free guidance, or what a guidance-distilled model is told, >= 0; 1 is none. null: what diffusers'
    pipeline takes (Stable Diffusion 7.5, Flux 3.5); of a network alone 1.5; 1 where the model can not be guided."""
    prompts: tuple[str, ...] = ()
    """For models of text, which need at least one; each has a column."""
    labels: tuple[int, ...] = ()
    """For models of classes; each has a column. Empty: every class of the data."""
    weights: tuple[str, ...] = ()
    """raw, ema (the first profile) or profiles by name: a grid each, once they have begun. Empty: ema, raw without."""
    seed: int = 0
    """Of the noise that the images are made of, >= 0."""

    def __post_init__(self) -> None:
        for key, low in (("every_steps", 1), ("num_images", 1), ("num_steps", 1), ("guidance", 0), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < low:
                raise ConfigError(f"{key}={value} must be at least {low}")

    def due(self, step: int, num_steps: int) -> bool:
        """Whether a grid is drawn after `step` completed steps."""
        return _due(self.every_steps, step, num_steps)

    def chosen(self, profiles: list[str]) -> list[str]:
        """The weights to draw from, of a run with these EMA profiles."""
        first = profiles[:1] or [RAW]
        return list(dict.fromkeys(first[0] if name == FIRST else name for name in self.weights or first))

    def check_weights(self, profiles: list[str]) -> None:
        """Raises ConfigError for a profile that the run does not have."""
        known = [RAW, *([FIRST] if profiles else []), *profiles]
        if unknown := [name for name in self.weights if name not in known]:
            raise ConfigError(f"samples.weights: there are no weights {unknown[0]}; give {' or '.join(known)}")


def _due(every: int | None, step: int, num_steps: int) -> bool:
    return every is not None and (step % every == 0 or step == num_steps)


def check_samples(samples: SamplesConfig, model: nn.Module, source: Source, guided: bool) -> None:
    """Check that `model`, trained on `source`, can draw what `samples` asks for.

    Args:
        guided: as `can_be_guided`.

    Raises:
        ConfigError: it can't; the message names the key to change.
    """
    if samples.every_steps is None:
        return
    text, null, num_classes = takes_text(model), null_label(model), source.num_classes or 0
    if source.channels not in (1, 3):
        raise ConfigError(f"samples.every_steps={samples.every_steps}: data of {source.channels} channels is not drawn")
    if text and not samples.prompts:
        raise ConfigError('samples.prompts=[] for a model that draws what a text says; give some: ["a red square"]')
    if samples.prompts and not text:
        raise ConfigError(
            f"samples.prompts={list(samples.prompts)} have no effect on a model without text; remove them"
        )
    if samples.labels and null is None:
        raise ConfigError(
            f"samples.labels={list(samples.labels)} have no effect on a model without classes; remove them"
        )
    if wrong := [label for label in samples.labels if not 0 <= label < num_classes]:
        raise ConfigError(f"samples.labels: the data has no class {wrong[0]}; give 0 to {num_classes - 1}")
    _check_guidance("samples", samples.guidance, guided)


def check_metrics(metrics: MetricsConfig, model: nn.Module, source: Source, num_held_out: int, guided: bool) -> None:
    """Check that images of `model` can be drawn and compared with those of `source`.

    Args:
        guided: as `can_be_guided`.

    Raises:
        ConfigError: they can't; the message names the key to change.
    """
    if source.latents is not None or source.channels not in (1, 3):
        raise ConfigError("validation.metrics compare images, and data.source holds none; remove validation.metrics")
    if num_held_out < 2:
        raise ConfigError(f"validation.metrics compare with {num_held_out} sample that is held out; hold out 2 or more")
    if metrics.clip is not None and not takes_text(model):
        raise ConfigError(f"validation.metrics.clip={metrics.clip} needs a model of text; remove it")
    if set(metrics.names) != {"clip"} and metrics.network != INCEPTION and not Path(metrics.network).is_file():
        raise ConfigError(f"validation.metrics.network={metrics.network} is not there; give {INCEPTION} or a file")
    _check_guidance("validation.metrics", metrics.guidance, guided)


def _check_guidance(section: str, guidance: float | None, guided: bool) -> None:
    if guidance not in (None, 1) and not guided:
        raise ConfigError(
            f"{section}.guidance={guidance} needs a model that learns to do without label or caption;"
            " set objective.label_drop, or guidance=1"
        )
