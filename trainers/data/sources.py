"""Where pixels come from: map-style sources, read by index."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from trainers.errors import ConfigError


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

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError(f"image_size={self.image_size} must be at least 1")
        if self.source == "folder" and self.path is None:
            raise ConfigError("path=null, but source=folder needs one; set it to the folder of the images")
        if self.source == "digits" and self.path is not None:
            raise ConfigError(f"path={self.path} has no effect on source=digits; remove it, or set source=folder")


class Source(Protocol):
    """Images that are read by index."""

    channels: int
    num_classes: int | None
    """None: the images have no labels."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images at `indices`, in that order.

        Returns:
            (N, C, H, W) float32 in [-1, 1], and (N,) int64 labels or None; the caller may write to both.
        """
        ...


def open_source(config: DataConfig) -> Source:
    """The source that `config` names.

    Raises:
        ConfigError: it is not there, or holds no images.
    """
    if config.source == "digits":
        return DigitsSource(config.image_size)
    assert config.path is not None
    return FolderSource(Path(config.path), config.image_size)


class DigitsSource:
    """1,797 handwritten digits, 8 x 8 grey, in memory; they come with scikit-learn, nothing is downloaded."""

    channels = 1
    num_classes: int | None = 10

    def __init__(self, image_size: int) -> None:
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

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        at = torch.from_numpy(indices)
        return self._images[at], self._labels[at]


class FolderSource:
    """Image files of a folder, as RGB, centre-cropped to a square and resized; decoded at every read.

    Sub-folders are classes, numbered in sorted order; without any, the images have no labels.
    """

    channels = 3

    def __init__(self, path: Path, image_size: int) -> None:
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
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = torch.stack([_decode(self._files[index], self._image_size) for index in indices.tolist()])
        if self._labels is None:
            return images, None
        return images, torch.tensor([self._labels[index] for index in indices.tolist()])


@functools.cache
def _suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _suffixes() and file.is_file()


def _decode(file: Path, image_size: int) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]."""
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
    return (pixels / 127.5 - 1).permute(2, 0, 1)
