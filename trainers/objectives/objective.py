"""Noisy inputs, targets and losses."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from trainers.objectives.config import ObjectiveConfig
from trainers.objectives.noise_levels import alphas_cumprod, betas, edm_log_sigma, flow_sigma
from trainers.objectives.variance import VariationalBound
from trainers.objectives.weighting import loss_weight
from trainers.rng import Stream, normal

_EXTRA_SCHEDULES = ("sigmoid", "laplace")  # which DDPMScheduler knows by name, and DDIMScheduler does not


class Objective:
    """Noisy inputs, targets and losses of one prediction type.

    In all of them x_t = alpha x0 + sigma noise. alpha^2 + sigma^2 = 1 on the schedules of DDPM (Ho et al., 2020,
    eq. 4: alpha = sqrt(alphas_cumprod)); alpha = 1 - sigma for flow (Liu et al., "Flow straight and fast", 2022,
    eq. 1, with time running from data to noise as in diffusers). For edm (Karras et al., 2022, eq. 7 and table 1) x_t
    is the scaled input c_in (x0 + s noise), so that alpha = c_in = 1 / sqrt(s^2 + sigma_data^2) and sigma = c_in s; its
    timestep is c_noise = ln(s) / 4.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self._is_flow = config.prediction_type == "flow"
        self._is_edm = config.prediction_type == "edm"
        self._bound = None
        if not (self._is_flow or self._is_edm):
            schedule = alphas_cumprod(config)
            self._alphas, self._sigmas = schedule.sqrt(), (1 - schedule).sqrt()  # (T,)
            if config.learned_variance:
                self._bound = VariationalBound(schedule)

    def timesteps(self, uniform: torch.Tensor) -> torch.Tensor:
        """Timesteps of the density asked for, from uniform numbers in [0, 1), float64.

        Returns:
            (B,) int64 in 0 .. T - 1; for flow float32 in [0, T]; for edm float32.
        """
        if self._is_edm:
            return (edm_log_sigma(self.config, uniform) / 4).float()
        if self._is_flow:
            return (flow_sigma(self.config, uniform) * self.config.num_train_timesteps).float()
        scaled = uniform * self.config.num_train_timesteps
        return scaled.long().clamp(max=self.config.num_train_timesteps - 1)

    def noises(self, noise: torch.Tensor, seed: int, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise to be predicted, and the noise in the input; a function of (seed, position) for each sample.

        Args:
            noise: (B, C, H, W), standard normal, on the CPU.
            positions: (B,) int64, global sample positions.

        Source: offset noise: Guttenberg, "Diffusion with offset noise", 2023. Input perturbation: Ning et al., "Input
        perturbation reduces exposure bias in diffusion models", 2023, algorithm 1.
        """
        if self.config.offset_noise:
            alike = (noise.shape[1], *[1] * (noise.ndim - 2))
            noise = noise + self.config.offset_noise * normal(seed, Stream.OFFSET_NOISE, positions, alike)
        if not self.config.input_perturbation:
            return noise, noise
        further = normal(seed, Stream.INPUT_PERTURBATION, positions, tuple(noise.shape[1:]))
        return noise, noise + self.config.input_perturbation * further

    def noisy(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t, the input of the network: (B, C, H, W)."""
        alpha, sigma = self._alpha_sigma(timesteps, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should predict: (B, C, H, W).

        Source: epsilon: Ho et al., 2020, eq. 14. v: Salimans and Ho, "Progressive distillation", 2022, section 4.
        flow: Liu et al., 2022, eq. 1, the velocity d x_t / d sigma. edm: Karras et al., 2022, eq. 8, where
        (x0 - c_skip x) / c_out is what the raw network learns, here in terms of x0 and the noise.
        """
        kind = self.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x0
        if kind == "flow":
            return noise - x0
        alpha, sigma = self._alpha_sigma(timesteps, x0)
        if kind == "edm":
            return sigma / self.config.sigma_data * x0 - self.config.sigma_data * alpha * noise
        return alpha * noise - sigma * x0

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss weight of every sample (see `weighting.loss_weight`): (B,) float32.

        1 for edm: the weight of its table 1 is 1 / c_out^2, which makes that of the raw network's error 1.
        """
        alpha, sigma = (value.double() for value in self._alpha_sigma(timesteps))
        return loss_weight(self.config, alpha, sigma).float()

    def loss(
        self, prediction: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The loss of every sample, in float32 whatever the dtype of `prediction`: (B,).

        The weighted mean squared error; with `contrastive`, less that to the target of the previous sample of the batch
        (the first one's is the last); with `learned_variance`, plus the variational bound, which is T times the term of
        the one timestep drawn.

        Args:
            prediction: (B, C, H, W), or (B, 2 C, H, W) with `learned_variance`.

        Source: contrastive: Stoica et al., "Contrastive flow matching", 2025, section 3. The pairs are those of one
        microbatch, in order: samples are in random order already, and another world size changes nothing.
        Hybrid loss: Nichol and Dhariwal, 2021, eq. 16, with the bound in bits a dimension.
        """
        variance = None
        if self._bound is not None:
            self.config.check_variance(prediction.shape[1], x0.shape[1])
            prediction, variance = prediction.chunk(2, dim=1)
        prediction, target = prediction.float(), self.target(x0, noise, timesteps).float()
        loss = (prediction - target).square().flatten(1).mean(1)
        if self.config.contrastive:
            other = (prediction - target.roll(1, 0)).square().flatten(1).mean(1)
            loss = loss - self.config.contrastive * other
        loss = loss * self.weight(timesteps)
        if self._bound is None or variance is None:
            return loss
        x_t = self.noisy(x0, noise, timesteps)
        guess = self._predicted_x0(prediction.detach(), x_t, timesteps)
        term = self._bound(variance, x0, guess, x_t, timesteps)
        return loss + self.config.vlb_weight * self.config.num_train_timesteps * term

    def scheduler(self, *, pixels: bool = True) -> DDIMScheduler | EDMEulerScheduler | FlowMatchEulerDiscreteScheduler:
        """A new sampler that fits this objective, without random steps.

        DDIM (Song et al., 2021), which needs no variance, learned or not; Euler steps along the flow; or Euler steps of
        edm. The network's input is `scale_model_input` of x_t where the sampler has it, and the first x_t is noise
        times `init_noise_sigma` where it has that: edm's do more than nothing.

        Args:
            pixels: what is drawn are images, in [-1, 1]; latents reach beyond, and are not clipped on the way.
        """
        config = self.config
        if config.prediction_type == "flow":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=config.shift)
        if config.prediction_type == "edm":
            return EDMEulerScheduler(sigma_data=config.sigma_data)
        extra = config.beta_schedule in _EXTRA_SCHEDULES
        return DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule="linear" if extra else config.beta_schedule,
            trained_betas=betas(config).tolist() if extra else None,
            rescale_betas_zero_snr=config.zero_terminal_snr,
            prediction_type=config.prediction_type,
            clip_sample=pixels,
            # Start at the last, purest noise level, as training noise does (Lin et al., 2024, section 3.3).
            timestep_spacing="trailing",
        )

    def _predicted_x0(self, prediction: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        kind = self.config.prediction_type
        alpha, sigma = self._alpha_sigma(timesteps, x_t)
        if kind == "epsilon":
            return (x_t - sigma * prediction) / alpha
        return prediction if kind == "sample" else alpha * x_t - sigma * prediction

    def _alpha_sigma(
        self, timesteps: torch.Tensor, like: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma of every sample, float32: (B,), or shaped to be multiplied with `like`."""
        if self._is_edm:
            level = torch.exp(4 * timesteps)
            alpha = torch.rsqrt(level.square() + self.config.sigma_data**2)
            sigma = alpha * level
        elif self._is_flow:
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
