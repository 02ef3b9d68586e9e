"""The data that every measured program trains on."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate


def digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits: images (1797, 1, size, size) in -1 .. 1, and labels (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    return interpolate(images, (size, size), mode="bilinear", antialias=True), torch.from_numpy(labels)
