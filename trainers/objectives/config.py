"""The section `objective` of a config."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network learns to predict, on which noise schedule."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow", "edm"] = "epsilon"
    """epsilon (noise), v_prediction, sample (x0), flow (rectified flow velocity), or edm (Karras preconditioning)."""
    num_train_timesteps: int = 1000
    """Noise levels, 1 to 100000; for flow, which has a continuum of them, the timestep of pure noise; not for edm."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = "squaredcos_cap_v2"
    """Noise schedule in diffusers' words; for epsilon, v_prediction and sample."""
    beta_start: float = 0.0001
    """First beta of linear, scaled_linear and sigmoid, > 0; Stable Diffusion has scaled_linear from 0.00085 ..."""
    beta_end: float = 0.02
    """... to 0.012. Last beta, beta_start < beta_end < 1."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise; for v_prediction and sample. Weightings but none give
    that timestep no weight, as their papers have it."""
    timestep_density: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """How often flow trains on a noise level."""
    logit_mean: float = 0.0
    """Mean of the logit of sigma under logit_normal; above 0 for more noise."""
    logit_std: float = 1.0
    """Standard deviation of the logit of sigma under logit_normal, > 0."""
    mode_scale: float = 1.29
    """Scale of mode, -1 <= s <= 2 / (pi - 2): above 0 for more of the middle, below 0 for more of the ends."""
    shift: float = 1.0
    """Moves flow, in training and sampling, to more noise, > 0: sqrt(pixels / pixels at which 1 was right)."""
    sigma_mean: float = -1.2
    """Mean of ln(sigma) of edm (P_mean)."""
    sigma_std: float = 1.2
    """Standard deviation of ln(sigma) of edm (P_std), > 0."""
    sigma_data: float = 0.5
    """Standard deviation of the data, which edm expects, > 0."""
    weighting: Literal["none", "min_snr", "p2", "debiased", "sigma_sqrt", "cosmap"] = "none"
    """Loss weight of a noise level; sigma_sqrt and cosmap are for flow, and edm has its own."""
    min_snr_gamma: float = 5.0
    """Gamma of min_snr, > 0."""
    p2_gamma: float = 1.0
    """Gamma of p2, >= 0."""
    p2_k: float = 1.0
    """k of p2, > 0."""
    offset_noise: float = 0.0
    """Standard deviation of noise that is alike in all pixels of a channel, added to the noise, >= 0; 0.1 is usual."""
    input_perturbation: float = 0.0
    """Share of further noise in the input that the network is not asked to predict, >= 0; 0.1 is usual."""
    learned_variance: bool = False
    """Learn the variance too (hybrid loss), for models with twice as many output as input channels."""
    vlb_weight: float = 0.001
    """Lambda of the hybrid loss, > 0."""
    contrastive: float = 0.0
    """Lambda of contrastive flow matching, 0 <= lambda < 1; 0.05 is usual. Pairs neighbours of a microbatch."""
    label_drop: float = 0.0
    """Share of samples trained without their label or caption, 0 <= p <= 1; above 0 for models of these only."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_train_timesteps <= 100_000:
            raise ConfigError(f"num_train_timesteps={self.num_train_timesteps} must be 1 to 100000; 1000 is usual")
        for key, usual in _ABOVE_0.items():
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)} must be above 0; {usual} is usual")
        for key in ("p2_gamma", "offset_noise", "input_perturbation"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}={getattr(self, key)} must be at least 0")
        if not 0 <= self.label_drop <= 1:
            raise ConfigError(f"label_drop={self.label_drop} must be between 0 and 1; 0.1 is usual")
        if not 0 <= self.contrastive < 1:
            raise ConfigError(f"contrastive={self.contrastive} must be at least 0 and below 1; 0.05 is usual")
        if not -1 <= self.mode_scale <= 1.7519:  # beyond, sigma is no monotonous function of the uniform number
            raise ConfigError(f"mode_scale={self.mode_scale} must be between -1 and 1.7519; 1.29 is usual")
        if not self.beta_start < self.beta_end < 1:
            raise ConfigError(f"beta_end={self.beta_end} must be above beta_start={self.beta_start} and below 1")
        self._check_combinations()

    def check_variance(self, out_channels: int, channels: int) -> None:
        """Check that a model with `out_channels` can learn the variance of images with `channels`.

        Raises:
            ConfigError: it can't.
        """
        if out_channels != 2 * channels:
            raise ConfigError(
                f"objective.learned_variance=true needs {2 * channels} output channels, twice the data's, and not"
                f" {out_channels}; set model.args.out_channels={2 * channels}"
            )

    def _check_combinations(self) -> None:
        """Nothing that was set may have no effect."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _ONLY_WITH or value == field.default:
                continue
            other, allowed = _ONLY_WITH[field.name]
            given = getattr(self, other)
            if given not in allowed:
                raise ConfigError(
                    f"{field.name}={_show(value)} does not go with {other}={_show(given)};"
                    f" it is for {' and '.join(map(_show, allowed))}"
                )
        if self.weighting in ("sigma_sqrt", "cosmap") and self.prediction_type != "flow":
            raise ConfigError(
                f"weighting={self.weighting} does not go with prediction_type={self.prediction_type}; it is for flow"
            )
        if self.weighting != "none" and self.prediction_type == "edm":
            raise ConfigError(
                f"weighting={self.weighting} does not go with prediction_type=edm, which has its own; use none"
            )
        if self.learned_variance and self.input_perturbation:
            raise ConfigError(
                f"input_perturbation={self.input_perturbation} does not go with learned_variance=true, which needs the"
                " true posterior of the input; set one of them to its default"
            )
        if self.learned_variance and self.num_train_timesteps < 2:
            raise ConfigError("learned_variance=true needs num_train_timesteps of at least 2; 1000 is usual")


_VARIANCE_PRESERVING = ("epsilon", "v_prediction", "sample")
_ABOVE_0 = {
    "beta_start": 0.0001,
    "min_snr_gamma": 5,
    "p2_k": 1,
    "logit_std": 1,
    "shift": 3,
    "sigma_std": 1.2,
    "sigma_data": 0.5,
    "vlb_weight": 0.001,
}
_ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "num_train_timesteps": ("prediction_type", (*_VARIANCE_PRESERVING, "flow")),
    "beta_schedule": ("prediction_type", _VARIANCE_PRESERVING),
    "beta_start": ("beta_schedule", ("linear", "scaled_linear", "sigmoid")),
    "beta_end": ("beta_schedule", ("linear", "scaled_linear", "sigmoid")),
    # Where nothing of the image is left, the noise is the input itself: predicting it teaches nothing of the image.
    "zero_terminal_snr": ("prediction_type", ("v_prediction", "sample")),
    "timestep_density": ("prediction_type", ("flow",)),
    "logit_mean": ("timestep_density", ("logit_normal",)),
    "logit_std": ("timestep_density", ("logit_normal",)),
    "mode_scale": ("timestep_density", ("mode",)),
    "shift": ("prediction_type", ("flow",)),
    "sigma_mean": ("prediction_type", ("edm",)),
    "sigma_std": ("prediction_type", ("edm",)),
    "sigma_data": ("prediction_type", ("edm",)),
    "min_snr_gamma": ("weighting", ("min_snr",)),
    "p2_gamma": ("weighting", ("p2",)),
    "p2_k": ("weighting", ("p2",)),
    "learned_variance": ("prediction_type", _VARIANCE_PRESERVING),
    "vlb_weight": ("learned_variance", (True,)),
    "contrastive": ("prediction_type", ("flow",)),
}
"""Key -> the other key that gives it a meaning, and with which values."""


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
