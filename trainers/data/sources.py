"""Where pixels come from: map-style sources, read by index."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from trainers.errors import ConfigError

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are trained on."""

    source: Literal["digits", "folder"] = "digits"
    """digits: scikit-learn's handwritten digits, 1,797 images; folder: image files, one sub-folder a class."""
    path: str | None = None
    """The folder of `source: folder`."""
    image_size: int = 8
    """Images are resized to this many pixels a side, >= 1."""
    flip: bool = False
    """Mirror half of the samples left to right."""
    quarantine: bool = False
    """Go on without a sample that ends training twice: an error or the process's death in reading it, or in the
    forward and backward pass of its microbatch."""
    captions: bool = False
    """Read a text with every image: digits: "a handwritten seven"; folder: from metadata.jsonl."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError(f"image_size={self.image_size} must be at least 1")
        if self.source == "folder" and self.path is None:
            raise ConfigError("path=null, but source=folder needs one; set it to the folder of the images")
        if self.source == "digits" and self.path is not None:
            raise ConfigError(f"path={self.path} has no effect on source=digits; remove it, or set source=folder")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """N images and what is known of them; the reader may write to all of it."""

    images: torch.Tensor
    """(N, C, H, W) float32 in [-1, 1]."""
    labels: torch.Tensor | None = None
    """(N,) int64."""
    captions: tuple[str, ...] | None = None
    """N texts."""
    sizes: torch.Tensor
    """(N, 6) float32: original height and width, crop top and left, target height and width, in pixels.

    The crop is in pixels of the image after it was resized (Podell et al., "SDXL", 2023, section 2.2)."""


class Source(Protocol):
    """Images that are read by index."""

    channels: int
    num_classes: int | None
    """None: the images have no labels."""
    has_captions: bool

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Samples:
        """The images at `indices`, in that order."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that `config` names.

    Raises:
        ConfigError: it is not there, or holds no images.
    """
    if config.source == "digits":
        return DigitsSource(config.image_size, config.captions)
    assert config.path is not None
    return FolderSource(Path(config.path), config.image_size, config.captions)


class DigitsSource:
    """1,797 handwritten digits, 8 x 8 grey, in memory; they come with scikit-learn, nothing is downloaded."""

    channels = 1
    num_classes: int | None = 10

    def __init__(self, image_size: int, captions: bool = False) -> None:
        try:
            # An optional package, and 2 s of imports that only this source needs.
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ConfigError("data.source=digits needs scikit-learn; run: pip install scikit-learn") from error
        pixels, labels = load_digits(return_X_y=True)  # (1797, 64) in 0 .. 16
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
        if image_size != 8:
            images = torch.nn.functional.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
        self._images = images  # (1797, 1, H, W)
        self._labels = torch.from_numpy(labels).long()
        self.has_captions = captions
        self._size = (8, 8, 0, 0, image_size, image_size)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray) -> Samples:
        at = torch.from_numpy(indices)
        labels = self._labels[at]
        captions = tuple(f"a handwritten {_DIGITS[label]}" for label in labels.tolist())
        return Samples(
            images=self._images[at],
            labels=labels,
            captions=captions if self.has_captions else None,
            sizes=torch.tensor([self._size] * len(indices), dtype=torch.float32),
        )


class FolderSource:
    """Image files of a folder, as RGB, centre-cropped to a square and resized; decoded at every read.

    Sub-folders are classes, numbered in sorted order; without any, the images have no labels. Captions are lines
    {"file_name": ..., "text": ...} of metadata.jsonl, file names relative to the folder.
    """

    channels = 3

    def __init__(self, path: Path, image_size: int, captions: bool = False) -> None:
        if not path.is_dir():
            raise ConfigError(f"data.path={path} is not a folder; give the folder of the images")
        classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        # Sorted, because the order of a directory listing differs between machines.
        self._files = [file for folder in classes or [path] for file in sorted(folder.rglob("*")) if _is_image(file)]
        if not self._files:
            raise ConfigError(f"data.path={path} holds no images ({', '.join(sorted(_suffixes()))})")
        self.num_classes = len(classes) or None
        number = {folder.name: label for label, folder in enumerate(classes)}
        self._labels = [number[file.relative_to(path).parts[0]] for file in self._files] if classes else None
        self._captions = _read_captions(path, self._files) if captions else None
        self.has_captions = captions
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: np.ndarray) -> Samples:
        wanted = indices.tolist()
        images, sizes = zip(*(_decode(self._files[index], self._image_size) for index in wanted), strict=True)
        return Samples(
            images=torch.stack(images),
            labels=None if self._labels is None else torch.tensor([self._labels[index] for index in wanted]),
            captions=None if self._captions is None else tuple(self._captions[index] for index in wanted),
            sizes=torch.tensor(sizes, dtype=torch.float32),
        )


def _read_captions(path: Path, files: Sequence[Path]) -> list[str]:
    """The caption of every file, in the order of `files`."""
    listing = path / "metadata.jsonl"
    if not listing.is_file():
        raise ConfigError(
            f"data.captions=true needs {listing}; write a line for every image:"
            ' {"file_name": "a.png", "text": "a red square"}'
        )
    captions = {}
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{listing}, line {number}: {error!r}; give file_name and text as JSON") from None
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigError(f"{listing}, line {number}: file_name and text must be texts; correct the line")
        captions[path / name] = text
    missing = [file for file in files if file not in captions]
    if missing:
        raise ConfigError(f"{listing} has no line for {len(missing)} images, such as {missing[0]}; add them")
    return [captions[file] for file in files]


@functools.cache
def _suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _suffixes() and file.is_file()


def _decode(file: Path, image_size: int) -> tuple[torch.Tensor, tuple[float, ...]]:
    """(3, H, W) float32 in [-1, 1], and the six sizes of `Samples`."""
    try:
        with Image.open(file) as image:
            # Cameras store the turn of a photo in EXIF; without this it would be trained on lying on its side.
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file system's error, not the file's: it names the file, and may pass
        raise ConfigError(f"data.path: {file} can not be read as an image ({error}); repair or remove it") from error
    square = ImageOps.fit(upright, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32))  # (H, W, 3)
    scale = image_size / min(upright.height, upright.width)
    top, left = ((side * scale - image_size) // 2 for side in (upright.height, upright.width))
    sizes = (upright.height, upright.width, top, left, image_size, image_size)
    return (pixels / 127.5 - 1).permute(2, 0, 1), sizes
