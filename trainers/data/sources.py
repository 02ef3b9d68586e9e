"""Where pixels come from: map-style sources, read by index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
