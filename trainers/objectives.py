"""Training objectives: what the network predicts, and how its error is weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network learns to predict, on which noise schedule."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] = "epsilon"
    """epsilon (noise), v_prediction, sample (x0), or flow (rectified flow velocity)."""
    num_train_timesteps: int = 1000
    """Number of noise levels, >= 1; for flow, which has a continuum of them, the timestep of pure noise."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Noise schedule in diffusers' words; not used by flow."""
    weighting: Literal["none", "min_snr"] = "none"
    """Loss weight of a noise level."""
    min_snr_gamma: float = 5.0
    """Gamma of min-SNR, > 0."""
    label_drop: float = 0.0
    """Share of samples trained without their label, 0 <= p <= 1; above 0 for models with classes only."""

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1:
            raise ConfigError(f"num_train_timesteps={self.num_train_timesteps} must be at least 1; 1000 is usual")
        if not self.min_snr_gamma > 0:
            raise ConfigError(f"min_snr_gamma={self.min_snr_gamma} must be above 0; 5 is usual")
        if not 0 <= self.label_drop <= 1:
            raise ConfigError(f"label_drop={self.label_drop} must be between 0 and 1; 0.1 is usual")


class Objective:
    """Noisy inputs, targets and losses of one prediction type.

    In all of them x_t = alpha x0 + sigma noise. alpha^2 + sigma^2 = 1 on the schedules of DDPM (Ho et al., 2020,
    eq. 4: alpha = sqrt(alphas_cumprod)); alpha = 1 - sigma for flow (Liu et al., "Flow straight and fast", 2022,
    eq. 1, with time running from data to noise as in diffusers).
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self._is_flow = config.prediction_type == "flow"
        if not self._is_flow:
            schedule = DDPMScheduler(
                num_train_timesteps=config.num_train_timesteps, beta_schedule=config.beta_schedule
            ).alphas_cumprod
            self._alphas, self._sigmas = schedule.sqrt(), (1 - schedule).sqrt()  # (T,)

    def timesteps(self, uniform: torch.Tensor) -> torch.Tensor:
        """Uniformly distributed timesteps from uniform numbers in [0, 1).

        Returns:
            (B,) int64 in 0 .. T - 1; for flow float32 in [0, T].
        """
        scaled = uniform * self.config.num_train_timesteps
        if self._is_flow:
            return scaled.float()
        return scaled.long().clamp(max=self.config.num_train_timesteps - 1)

    def noisy(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t, the input of the network: (B, C, H, W)."""
        alpha, sigma = self._alpha_sigma(timesteps, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should predict: (B, C, H, W).

        Source: epsilon: Ho et al., 2020, eq. 14. v: Salimans and Ho, "Progressive distillation", 2022, section 4.
        flow: Liu et al., 2022, eq. 1, the velocity d x_t / d sigma.
        """
        kind = self.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x0
        if kind == "flow":
            return noise - x0
        alpha, sigma = self._alpha_sigma(timesteps, x0)
        return alpha * noise - sigma * x0

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss weight of every sample: (B,) float32.

        min-SNR weighs the error of x0 by min(SNR, gamma), SNR = alpha^2 / sigma^2. An error of another prediction is
        that of x0 times a factor, which is divided out: SNR for epsilon, SNR + 1 for v, 1 / sigma^2 for flow.

        Source: Hang et al., "Efficient diffusion training via min-SNR weighting strategy", 2023, section 3.4.
        """
        if self.config.weighting == "none":
            return torch.ones(timesteps.shape, device=timesteps.device)
        alpha, sigma = (value.double() for value in self._alpha_sigma(timesteps))
        snr = (alpha / sigma).square()  # infinite where sigma is 0, which every branch survives
        capped = snr.clamp(max=self.config.min_snr_gamma)
        kind = self.config.prediction_type
        if kind == "epsilon":
            capped = (self.config.min_snr_gamma / snr).clamp(max=1)
        elif kind == "v_prediction":
            capped = capped / (snr + 1)
        elif kind == "flow":
            capped = capped * sigma.square()
        return capped.float()

    def loss(
        self, prediction: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Weighted mean squared error of every sample, in float32 whatever the dtype of `prediction`: (B,)."""
        error = prediction.float() - self.target(x0, noise, timesteps).float()
        return error.square().flatten(1).mean(1) * self.weight(timesteps)

    def scheduler(self) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
        """A new sampler that fits this objective: DDIM (Song et al., 2021), or Euler steps along the flow."""
        kind = self.config.prediction_type
        if kind == "flow":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.config.num_train_timesteps)
        return DDIMScheduler(
            num_train_timesteps=self.config.num_train_timesteps,
            beta_schedule=self.config.beta_schedule,
            prediction_type=kind,
            # Start at the last, purest noise level, as training noise does (Lin et al., 2024, section 3.3).
            timestep_spacing="trailing",
        )

    def _alpha_sigma(
        self, timesteps: torch.Tensor, like: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma of every sample, float32: (B,), or shaped to be multiplied with `like`."""
        if self._is_flow:
            sigma = timesteps / self.config.num_train_timesteps
            alpha = 1 - sigma
        else:
            device = timesteps.device
            self._alphas, self._sigmas = self._alphas.to(device), self._sigmas.to(device)  # once
            alpha, sigma = self._alphas[timesteps], self._sigmas[timesteps]
        if like is None:
            return alpha, sigma
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.view(shape), sigma.view(shape)
