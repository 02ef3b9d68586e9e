"""Random changes of samples: each a function of (seed, position), so the same at every number of workers."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from trainers.data.config import ColorJitter, DataConfig
from trainers.data.samples import Samples
from trainers.rng import Stream, uniform

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_GREY_AXIS = 1 / math.sqrt(3)


def crop_places(config: DataConfig, seed: int, positions: np.ndarray) -> np.ndarray | None:
    """(N, 2) float64 in [0, 1) for `Source.read`; None: in the middle."""
    if config.crop == "center":
        return None
    return np.stack([uniform(seed, stream, positions) for stream in (Stream.CROP_TOP, Stream.CROP_LEFT)], axis=1)


def augment_(samples: Samples, config: DataConfig, seed: int, positions: np.ndarray) -> None:
    """Turn, colour and mirror the images in place, and write what that did to the crop into their sizes.

    In numpy and one image at a time, so that neither threads nor company decide a bit.
    """
    images, sizes = samples.images, samples.sizes
    if config.rotation:
        degrees = config.rotation * (2 * uniform(seed, Stream.ROTATION, positions) - 1)
        for image, angle in zip(images, degrees.tolist(), strict=True):
            image.copy_(torch.from_numpy(_turned(image.numpy(), angle)))
    if config.color != ColorJitter():
        streams = (Stream.BRIGHTNESS, Stream.CONTRAST, Stream.SATURATION, Stream.HUE)
        draws = np.stack([2 * uniform(seed, stream, positions) - 1 for stream in streams], axis=1)
        for image, draw in zip(images, draws.tolist(), strict=True):
            image.copy_(torch.from_numpy(_colored(image.numpy(), config.color, draw)))
    if config.flip:
        mirrored = torch.from_numpy(uniform(seed, Stream.FLIP, positions) < 0.5)
        images.copy_(torch.where(mirrored[:, None, None, None], images.flip(-1), images))
        sizes[:, 3] = torch.where(mirrored, _cut_at_right(sizes), sizes[:, 3])


def _cut_at_right(sizes: torch.Tensor) -> torch.Tensor:
    """(N,) pixels that were cut off at the right: the left crop of the mirrored image."""
    height, width, _, left, target_height, target_width = sizes.double().unbind(1)
    scale = torch.maximum(target_height / height, target_width / width)
    return ((width * scale - target_width).clamp(min=0).floor() - left).clamp(min=0).float()


def _turned(image: np.ndarray, degrees: float) -> np.ndarray:
    """(C, H, W) float32 turned about its middle; what comes in at the corners is its mirror image."""
    _, height, width = image.shape
    margin = math.ceil((math.hypot(height, width) - min(height, width)) / 2) + 1
    # An image smaller than its margin is mirrored again and again.
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="symmetric")
    channels = [
        np.asarray(Image.fromarray(channel).rotate(degrees, Image.Resampling.BILINEAR))[margin:-margin, margin:-margin]
        for channel in padded
    ]
    return np.stack(channels)


def _colored(image: np.ndarray, jitter: ColorJitter, draw: list[float]) -> np.ndarray:
    """(C, H, W) float32 in [-1, 1]; `draw` in [-1, 1) for brightness, contrast, saturation and hue."""
    brightness, contrast, saturation, hue = draw
    pixels = (image + 1) / 2
    pixels = pixels * np.float32(1 + jitter.brightness * brightness)
    if len(pixels) == 3:
        grey = np.einsum("c,chw->hw", _LUMA, pixels, optimize=False)
        mean = np.float32(grey.mean(dtype=np.float64))
        pixels = grey + np.float32(1 + jitter.saturation * saturation) * (pixels - grey)
        matrix = _hue_rotation(2 * math.pi * jitter.hue * hue)
        pixels = np.einsum("dc,chw->dhw", matrix, pixels, optimize=False)
    else:
        mean = np.float32(pixels.mean(dtype=np.float64))
    pixels = mean + np.float32(1 + jitter.contrast * contrast) * (pixels - mean)
    return (pixels.clip(0, 1) * 2 - 1).astype(np.float32)


def _hue_rotation(angle: float) -> np.ndarray:
    """(3, 3) float32: the rotation of RGB about its grey axis (Rodrigues' formula)."""
    cross = _GREY_AXIS * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    along = np.full((3, 3), 1 / 3)
    return (math.cos(angle) * np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * along).astype(np.float32)
