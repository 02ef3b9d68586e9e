"""Exponential moving averages of the weights, sharded like the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch

from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """One EMA profile. Give exactly one of decay, half_life_samples and num_steps; for power gamma or sigma_rel.

    Decays are meant per step of the run: with `every` = k one update forgets as much as k would have. The default
    start_step leaves out the random initial weights, as diffusers' `EMAModel` does; its update_after_step is ours - 1.

    kind sma weighs the weights of all updates equally (Izmailov et al., "Averaging weights leads to wider optima",
    2018) until its window is full; from then on the newest has weight 1 / window, because dropping the oldest would
    need as many copies of the model as the window is long. So it is an exact mean of the last steps of a run when
    start_step = num_steps of the run - window + 1.

    kind power weighs the weights after the n-th of t updates by n^gamma, so that its width is the same share of the
    run at any time (Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024, eq. 127).
    From two of them (sigma_rel 0.05 and 0.1, say), as they are in the checkpoints that are kept, an average of any
    other width can be made after training: see `trainers.posthoc_ema`.
    """

    kind: Literal["constant", "warmup", "sma", "power"] = "constant"
    """constant: fixed decay; warmup: at most (1 + n) / (10 + n), n steps after the start; sma: equal weights; power:
    weights that grow with a power of the step."""
    decay: float | None = None
    """Weight of the old average in one step, 0 < decay < 1."""
    half_life_samples: int | None = None
    """Samples after which a weight's influence has halved, > 0."""
    num_steps: int | None = None
    """N of alpha = 2 / (N + 1), >= 1; the window of sma, null: all steps."""
    gamma: float | None = None
    """Exponent of power, >= 0; 0 is equal weights."""
    sigma_rel: float | None = None
    """Width of power: the standard deviation of its weights as a share of the run so far, 1e-9 <= s < 0.2886."""
    start_step: int = 1
    """The average begins as a copy of the weights after this many steps; no memory and no time before, >= 0."""
    every: int = 1
    """Update after every so many steps, >= 1."""

    def __post_init__(self) -> None:
        fitting, foreign = {}, {}
        for key, kinds in _HORIZONS.items():
            if getattr(self, key) is not None:
                (fitting if self.kind in kinds else foreign)[key] = getattr(self, key)
        wanted = [key for key, kinds in _HORIZONS.items() if self.kind in kinds]
        if foreign:
            key, value = next(iter(foreign.items()))
            raise ConfigError(f"{key}={value} does not go with kind={self.kind}; give {' or '.join(wanted)}")
        if len(fitting) != 1 and self.kind != "sma":
            written = " and ".join(f"{key}={value}" for key, value in fitting.items()) or f"{wanted[0]}=null"
            choice = f"{', '.join(wanted[:-1])} and {wanted[-1]}"
            raise ConfigError(f"{written}: give exactly one of {choice} to kind={self.kind}")
        if self.decay is not None and not 0 < self.decay < 1:
            raise ConfigError(f"decay={self.decay} must be between 0 and 1, both excluded; 0.999 is usual")
        if self.sigma_rel is not None:
            check_sigma_rel(self.sigma_rel)
        for key, low in (("half_life_samples", 1), ("num_steps", 1), ("gamma", 0), ("start_step", 0), ("every", 1)):
            value = getattr(self, key)
            if value is not None and value < low:
                raise ConfigError(f"{key}={value} must be at least {low}")

    @property
    def exponent(self) -> float:
        """Gamma of kind power."""
        return self.gamma if self.gamma is not None else gamma_of(cast(float, self.sigma_rel))

    def expected_updates(self, step: int) -> int:
        """Updates that the average must have had after `step` completed steps; the copy at its start is none."""
        return max(0, step - self.start_step) // self.every


_LEAST_SIGMA_REL, _MAX_SIGMA_REL = 1e-9, 12**-0.5
_HORIZONS = {
    "decay": ("constant", "warmup"),
    "half_life_samples": ("constant", "warmup"),
    "num_steps": ("constant", "warmup", "sma"),
    "gamma": ("power",),
    "sigma_rel": ("power",),
}
"""Key -> the kinds whose horizon it may give."""


def check_sigma_rel(sigma_rel: float) -> None:
    """Raises ConfigError: no average is so narrow (less than a step of any run) or so wide."""
    if not _LEAST_SIGMA_REL <= sigma_rel < _MAX_SIGMA_REL:
        raise ConfigError(
            f"sigma_rel={sigma_rel} must be at least {_LEAST_SIGMA_REL:g} and below 1 / sqrt(12) = 0.2886, the width of"
            " equal weights; 0.05 to 0.2 are usual"
        )


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power profile of width `sigma_rel`: 0.05 -> 16.9722, 0.10 -> 6.9372.

    Source: Karras et al., 2024, appendix C: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for gamma.
    """
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """The width of the power profile with this exponent: the inverse of `gamma_of`."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def decay_of_update(config: EMAConfig, num_updates: int, samples_per_step: int) -> float:
    """Weight that the old average keeps in the update that follows `num_updates` earlier ones.

    With kind warmup, start_step 1 and every 1 this is the decay of diffusers' `EMAModel`.
    """
    if config.kind == "sma":
        # The copy at the start counts as one of the equally weighted, so the k-th update has weight 1 / (k + 1).
        window = float("inf") if config.num_steps is None else max(1, config.num_steps // config.every)
        return 1.0 - 1.0 / min(num_updates + 2, window)
    if config.kind == "power":
        # The copy at the start is the first of the averaged weights, at time 1; so this update is at num_updates + 2.
        return (1.0 - 1.0 / (num_updates + 2)) ** (config.exponent + 1.0)
    if config.decay is not None:
        decay = config.decay
    elif config.half_life_samples is not None:
        decay = 0.5 ** (samples_per_step / config.half_life_samples)
    else:
        assert config.num_steps is not None
        decay = 1.0 - 2.0 / (config.num_steps + 1)
    if config.kind == "warmup":
        steps = (num_updates + 1) * config.every
        decay = min(decay, (1 + steps) / (10 + steps))
    return decay**config.every


class EMA:
    """The averages of one rank's part of the weights.

    Elementwise and in place on the local rows, so an update needs no communication, makes no temporaries, and gives
    the same bits whatever the sharding.
    """

    def __init__(
        self, profiles: Mapping[str, EMAConfig], parameters: Mapping[str, torch.Tensor], samples_per_step: int
    ) -> None:
        """Averages of `parameters`, none begun except those with `start_step` 0. Local.

        Args:
            parameters: name -> the live local rows, float32, possibly empty; their memory must stay where it is.
            samples_per_step: the global batch size, which turns half-lives in samples into decays.
        """
        assert all(tensor.dtype == torch.float32 for tensor in parameters.values()), "weights must be float32"
        self._profiles = dict(profiles)
        self._names = list(parameters)
        self._parameters = [tensor.detach() for tensor in parameters.values()]
        self._samples_per_step = samples_per_step
        self._averages: dict[str, list[torch.Tensor]] = {}
        self._num_updates = dict.fromkeys(profiles, 0)
        for name, config in self._profiles.items():
            if config.start_step == 0:
                self._begin(name)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step` completed steps. Call it after every update. Local."""
        for name, config in self._profiles.items():
            if name not in self._averages:
                # Not only at start_step itself: the update of that step may not have been taken.
                if step >= config.start_step:
                    self._begin(name)
            elif step > config.start_step and (step - config.start_step) % config.every == 0:
                decay = decay_of_update(config, self._num_updates[name], self._samples_per_step)
                torch._foreach_lerp_(self._averages[name], self._parameters, 1.0 - decay)
                self._num_updates[name] += 1

    def beginning(self, step: int) -> list[str]:
        """The profiles that get their memory when `step` steps are completed."""
        return [
            name for name, config in self._profiles.items() if step >= config.start_step and name not in self._averages
        ]

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Profile -> parameter name -> the average's live local rows, float32, of the profiles that have begun."""
        return {name: dict(zip(self._names, average, strict=True)) for name, average in self._averages.items()}

    def scalars(self) -> dict[str, Any]:
        """What is not a tensor, JSON-ready: settings and number of updates of every profile."""
        return {
            name: {
                "settings": asdict(config),
                "started": name in self._averages,
                "num_updates": self._num_updates[name],
            }
            for name, config in self._profiles.items()
        }

    def missed_updates(self, step: int) -> dict[str, int]:
        """Profile -> updates expected after `step` steps but not made, of the profiles that should have begun: 0."""
        return {
            name: config.expected_updates(step) - self._num_updates[name]
            for name, config in self._profiles.items()
            if step >= config.start_step
        }

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """The counterpart of `scalars`. Profiles that had begun get their memory, for the caller to fill. Local.

        Raises:
            ConfigError: a profile was added, removed or changed since the checkpoint was written.
        """
        for name in self._profiles.keys() ^ scalars.keys():
            where = "config but not in the checkpoint" if name in self._profiles else "checkpoint but not in the config"
            raise ConfigError(f"ema.{name} is in the {where}; undo that, or start a run of another name")
        for name, config in self._profiles.items():
            saved = scalars[name]
            for key, value in asdict(config).items():
                if saved["settings"][key] != value:
                    raise ConfigError(
                        f"ema.{name}.{key}={value} differs from the checkpoint's {saved['settings'][key]};"
                        " undo that, or start a run of another name"
                    )
            self._averages.pop(name, None)
            if saved["started"]:
                self._begin(name)
            self._num_updates[name] = saved["num_updates"]

    def _begin(self, name: str) -> None:
        # One tensor a parameter: one flat buffer with views was measured and is not faster.
        self._averages[name] = [tensor.clone() for tensor in self._parameters]
        self._num_updates[name] = 0
