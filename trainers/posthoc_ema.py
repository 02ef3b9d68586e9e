"""Averages of any width, made after training from snapshots of power-function averages.

Source: Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024, section 3.2 and
appendix C: the weighted sum of the stored averages whose profile is nearest, in least squares, to the wanted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainers.errors import ConfigError


@dataclass(frozen=True)
class Profile:
    """The weights of a power-function average: (gamma + 1) n^gamma / time^(gamma + 1) at time n <= `time`."""

    time: int
    """Updates of the average when it was taken, the copy at its start counted, >= 1."""
    gamma: float


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How to make the wanted average."""

    coefficients: tuple[float, ...]
    """One for each snapshot; their sum is 1."""
    residual: float
    """Distance of the profile that is made from the wanted one, as a share of the wanted one's length."""


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles over the time that both have."""
    time = min(a.time, b.time)
    scale = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return scale * (time / a.time) ** a.gamma * (time / b.time) ** b.gamma / max(a.time, b.time)


def reconstruct(snapshots: Sequence[Profile], target: Profile) -> Reconstruction:
    """The nearest sum of `snapshots` to `target` whose coefficients sum to 1, so that constant weights stay the same.

    Raises:
        ConfigError: no snapshot is as late as the target; from earlier ones it cannot be made.
    """
    if target.time not in [snapshot.time for snapshot in snapshots]:
        raise ConfigError(f"no power profile has a snapshot at its update {target.time}; choose a step that has one")
    gram = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    wanted = np.array([inner_product(a, target) for a in snapshots])
    length = inner_product(target, target)
    # The conditions of a minimum under sum(x) = 1, scaled so that long and short profiles weigh alike.
    scale = 1 / np.sqrt(gram.diagonal())
    system = np.zeros((len(snapshots) + 1,) * 2)
    system[:-1, :-1] = gram * np.outer(scale, scale)
    system[-1, :-1] = system[:-1, -1] = scale
    solution = np.linalg.lstsq(system, np.append(wanted * scale, 1.0), rcond=1e-12)[0]
    x = solution[:-1] * scale
    x /= x.sum()  # what rounding left
    square = length - 2 * x @ wanted + x @ gram @ x
    return Reconstruction(coefficients=tuple(x.tolist()), residual=float(np.sqrt(max(0.0, square) / length)))


class WeightedSum:
    """Tensors times coefficients, added up in float64, one at a time."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._total = torch.zeros(shape, dtype=torch.float64)

    def add(self, tensor: torch.Tensor, coefficient: float) -> None:
        self._total.add_(tensor, alpha=coefficient)

    def result(self) -> torch.Tensor:
        """float32."""
        return self._total.float()
