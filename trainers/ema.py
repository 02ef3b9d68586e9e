"""Exponential moving averages of the weights, sharded like the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """One EMA profile. Give exactly one of decay, half_life_samples and num_steps, or kind sma.

    Decays are meant per step of the run: with `every` = k one update forgets as much as k would have. The default
    start_step leaves out the random initial weights, as diffusers' `EMAModel` does; its update_after_step is ours - 1.

    kind sma weighs the weights of all updates equally (Izmailov et al., "Averaging weights leads to wider optima",
    2018) until its window is full; from then on the newest has weight 1 / window, because dropping the oldest would
    need as many copies of the model as the window is long. So it is an exact mean of the last steps of a run when
    start_step = num_steps of the run - window.
    """

    kind: Literal["constant", "warmup", "sma"] = "constant"
    """constant: fixed decay; warmup: at most (1 + n) / (10 + n), n steps after the start; sma: equal weights."""
    decay: float | None = None
    """Weight of the old average in one step, 0 < decay < 1."""
    half_life_samples: int | None = None
    """Samples after which a weight's influence has halved, > 0."""
    num_steps: int | None = None
    """N of alpha = 2 / (N + 1), >= 1; the window of sma, null: all steps."""
    start_step: int = 1
    """The average begins as a copy of the weights after this many steps; no memory and no time before, >= 0."""
    every: int = 1
    """Update after every so many steps, >= 1."""

    def __post_init__(self) -> None:
        horizons = {key: getattr(self, key) for key in ("decay", "half_life_samples", "num_steps")}
        given = {key: value for key, value in horizons.items() if value is not None}
        written = " and ".join(f"{key}={value}" for key, value in given.items()) or "decay=null"
        if self.kind == "sma" and given.keys() - {"num_steps"}:
            raise ConfigError(f"{written} does not go with kind=sma; give num_steps, or nothing for all steps")
        if self.kind != "sma" and len(given) != 1:
            raise ConfigError(f"{written}: give exactly one of decay, half_life_samples and num_steps")
        if self.decay is not None and not 0 < self.decay < 1:
            raise ConfigError(f"decay={self.decay} must be between 0 and 1, both excluded; 0.999 is usual")
        for key, low in (("half_life_samples", 1), ("num_steps", 1), ("start_step", 0), ("every", 1)):
            value = getattr(self, key)
            if value is not None and value < low:
                raise ConfigError(f"{key}={value} must be at least {low}")


def decay_of_update(config: EMAConfig, num_updates: int, samples_per_step: int) -> float:
    """Weight that the old average keeps in the update that follows `num_updates` earlier ones.

    With kind warmup, start_step 1 and every 1 this is the decay of diffusers' `EMAModel`.
    """
    if config.kind == "sma":
        # The copy at the start counts as one of the equally weighted, so the k-th update has weight 1 / (k + 1).
        window = float("inf") if config.num_steps is None else max(1, config.num_steps // config.every)
        return 1.0 - 1.0 / min(num_updates + 2, window)
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
