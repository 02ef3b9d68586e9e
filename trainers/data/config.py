"""Section `data` of a config."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the parts of a sample are called; null: as the table in README says."""

    image: str | None = None
    """A column of encoded images; webdataset: a suffix such as png."""
    caption: str | None = None
    """A column of texts; webdataset: a suffix, or json.KEY."""
    label: str | None = None
    """A column of class numbers or names; webdataset: a suffix, or json.KEY."""


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """How far colours are changed, by a random amount for each sample; 0: not at all."""

    brightness: float = 0.0
    """Black and white moved together, by a factor of 1 - x to 1 + x, 0 <= x < 1."""
    contrast: float = 0.0
    """Distance from the image's mean, by a factor of 1 - x to 1 + x, 0 <= x < 1."""
    saturation: float = 0.0
    """Distance from grey, by a factor of 1 - x to 1 + x, 0 <= x < 1."""
    hue: float = 0.0
    """Turns of the colour circle, -x to x, 0 <= x <= 0.5."""

    def __post_init__(self) -> None:
        for key in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} is out of range; give 0 <= {key} < 1")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"hue={self.hue} is out of range; give 0 <= hue <= 0.5 turns")


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Aspect ratios that images are trained in, all of about image_size ** 2 pixels."""

    multiple_of: int = 64
    """Heights and widths are multiples of this many pixels, >= 1."""
    max_ratio: float = 2.0
    """The longer side over the shorter one is at most this, >= 1."""

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ConfigError(f"multiple_of={self.multiple_of} must be at least 1")
        if self.max_ratio < 1:
            raise ConfigError(f"max_ratio={self.max_ratio} must be at least 1")

    def shapes(self, image_size: int) -> list[tuple[int, int]]:
        """(height, width) of every bucket, from the widest to the tallest; the square is always one of them."""
        step, found = self.multiple_of, set()
        for long in range(image_size, math.floor(image_size * math.sqrt(self.max_ratio)) + step, step):
            long -= long % step
            short = image_size**2 // long // step * step
            if short and long <= self.max_ratio * short:
                found |= {(short, long), (long, short)}
        found.add((image_size, image_size))
        return sorted(found)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are trained on."""

    source: Literal["digits", "folder", "table", "datasets", "webdataset", "latents"] = "digits"
    """digits: scikit-learn's handwritten digits, 1,797 images; folder: image files, one sub-folder a class; table:
    parquet or Arrow files; datasets: a data set of Hugging Face; webdataset: tar shards; latents: what
    `unbroken data prepare` has made, or npz and safetensors files."""
    path: str | None = None
    """Where it is: a folder, one file, or a URL such as s3://bucket/images. datasets: what save_to_disk wrote, or a
    name on the hub."""
    split: str | None = None
    """Part of a data set (source: datasets) that has several, such as train."""
    columns: Columns = field(default_factory=Columns)
    image_size: int = 8
    """Images are resized to this many pixels a side, 1 to 16384 (digits: 256). latents: of the images that they were
    made of; without a VAE, of the latents."""
    buckets: BucketConfig | None = None
    """Train images in about their own aspect ratio; null: cut all of them to squares."""
    crop: Literal["center", "random"] = "center"
    """What is kept of an image along its longer side."""
    flip: bool = False
    """Mirror half of the samples left to right."""
    rotation: float = 0.0
    """Turn each sample by a random angle of at most so many degrees, 0 to 180; corners are filled by mirroring."""
    color: ColorJitter = field(default_factory=ColorJitter)
    on_broken: Literal["refuse", "skip"] = "refuse"
    """An image that can not be decoded ends the run; or the next one of the data takes its place, is counted in the
    metric data/broken and named in an event."""
    quarantine: bool = False
    """Go on without a sample that ends training twice: an error or the process's death in reading it, or in the
    forward and backward pass of its microbatch."""
    captions: bool = False
    """Read a text with every image: digits: "a handwritten seven"; others: see `columns`."""
    num_workers: int = 0
    """Threads of each rank that read microbatches ahead; 0: read when they are due. It changes no number."""
    prefetch: int = 4
    """Microbatches that are read ahead, >= 1, by the threads of num_workers. Each is held in memory."""
    cache: str | None = None
    """Local folder for what is found out by reading through the data once; null: ~/.cache/unbroken."""

    def __post_init__(self) -> None:
        most = 256 if self.source == "digits" else 16384  # of digits all are held in memory
        if self.image_size > most:
            raise ConfigError(f"image_size={self.image_size} must be at most {most} for source={self.source}")
        for key, least in (("image_size", 1), ("num_workers", 0), ("prefetch", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least {least}")
        if self.source != "digits" and self.path is None:
            raise ConfigError(f"path=null, but source={self.source} needs one; set it to the folder of the images")
        if self.source == "digits" and self.path is not None:
            raise ConfigError(f"path={self.path} has no effect on source=digits; remove it, or set source=folder")
        if not 0 <= self.rotation <= 180:
            raise ConfigError(f"rotation={self.rotation} is out of range; give 0 to 180 degrees")
        if self.quarantine and self.num_workers:
            raise ConfigError(
                f"quarantine=true needs num_workers=0, and it is {self.num_workers}: with images read ahead it is not"
                " known which one killed a process; set one of the two back (on_broken=skip goes with both)"
            )
        self._check_effects()

    def _check_effects(self) -> None:
        if self.split is not None and self.source != "datasets":
            raise ConfigError(f"split={self.split} has no effect on source={self.source}; remove it")
        if self.columns != Columns() and self.source not in ("table", "datasets", "webdataset"):
            raise ConfigError(f"columns have no effect on source={self.source}; remove them")
        if self.columns.caption is not None and not self.captions:
            raise ConfigError(f"columns.caption={self.columns.caption} has no effect with captions=false; set captions")
        if self.buckets is not None and self.image_size % self.buckets.multiple_of:
            raise ConfigError(
                f"image_size={self.image_size} is not a multiple of buckets.multiple_of={self.buckets.multiple_of};"
                " change one of them"
            )
        if self.source == "digits" and (self.buckets is not None or self.crop == "random"):
            raise ConfigError("source=digits has square images only; leave crop and buckets at their defaults")
        of_pixels = {
            "buckets": self.buckets is not None,
            "crop": self.crop != "center",
            "flip": self.flip,
            "rotation": self.rotation > 0,
            "color": self.color != ColorJitter(),
            "on_broken": self.on_broken != "refuse",
        }
        if self.source == "latents" and any(of_pixels.values()):
            key = next(key for key, is_set in of_pixels.items() if is_set)
            raise ConfigError(f"{key} has no effect on source=latents, which are made already; remove it")
