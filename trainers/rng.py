"""Randomness as a function of (seed, stream, position), never of rank, process or call order.

torch's CPU generator uses only the low 32 bits of a seed, so every derivation here ends in 32 well-mixed bits.
"""

from __future__ import annotations

import random
from enum import IntEnum

import numpy as np
import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """One stream a purpose. The numbers are part of the contract: never reuse or reorder them."""

    MODEL_INIT = 1
    DATA_ORDER = 2
    NOISE = 3
    TIMESTEP = 4
    LABEL_DROP = 5
    FLIP = 6
    MODEL_INTERNAL = 7  # dropout and the like, seeded per (step, microbatch)
    SAMPLING = 8
    OFFSET_NOISE = 9
    INPUT_PERTURBATION = 10
    POSTERIOR = 20  # the VAE's draw of a latent
    ADAPTER_INIT = 21
    CROP_TOP = 30
    CROP_LEFT = 31
    ROTATION = 32
    BRIGHTNESS = 33
    CONTRAST = 34
    SATURATION = 35
    HUE = 36
    BUCKET_ORDER = 37
    SPLIT = 40  # which samples are held out
    VALIDATION = 41  # a seed of its own for noise and timesteps of these


def mix64(value: int) -> int:
    """The splitmix64 finalizer: a bijection of 64 bits in which every output bit depends on every input bit.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_key(seed: int, stream: Stream, *position: int) -> int:
    """A 64-bit key of (seed, stream, position...)."""
    key = mix64(seed & _MASK)
    for part in (int(stream), *position):
        key = mix64(key ^ (part & _MASK))
    return key


def derive_seed(seed: int, stream: Stream, *position: int) -> int:
    """A seed for `torch.Generator.manual_seed`, in 0 .. 2**32 - 1."""
    return derive_key(seed, stream, *position) >> 32


def uniform(seed: int, stream: Stream, positions: np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) for each sample position.

    Args:
        positions: (N,) int64, global sample positions.

    Returns:
        (N,) float64 with 53 random bits each; equal to hashing every position on its own.
    """
    with np.errstate(over="ignore"):
        key = np.uint64(derive_key(seed, stream)) ^ positions.astype(np.uint64)
        key = key + np.uint64(_GOLDEN)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key = key ^ (key >> np.uint64(31))
    return (key >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, stream: Stream, positions: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, one independent draw for each sample position.

    Always drawn on the CPU in float32 and in the full shape of a sample, so it is the same on every device kind.

    Returns:
        (N, *shape) float32.
    """
    out = torch.empty((len(positions), *shape))
    generator = torch.Generator()
    for row, position in zip(out, positions.tolist(), strict=True):
        generator.manual_seed(derive_seed(seed, stream, position))
        torch.randn(shape, generator=generator, out=row)
    return out


def seed_global_generators(seed: int, step: int, microbatch: int) -> None:
    """Seed torch (CPU and CUDA), numpy and python for one forward and backward pass.

    Randomness inside a model (dropout) draws from these; seeding them here makes it independent of the rank
    that happens to run the microbatch, so no generator state has to be saved.
    """
    value = derive_seed(seed, Stream.MODEL_INTERNAL, step, microbatch)
    # `torch.manual_seed` writes this thread's stack down, in text, for every kind of device that is not there.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)
    np.random.seed(value)
    random.seed(value)
