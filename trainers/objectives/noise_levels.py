"""Noise levels: how much of an image is left at a timestep, and how often each is trained on."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from diffusers import DDPMScheduler

from trainers.objectives.config import ObjectiveConfig

_SMALLEST_UNIFORM = 2.0**-54  # half the smallest step of a uniform number: 0 itself has no finite normal quantile


def alphas_cumprod(config: ObjectiveConfig) -> torch.Tensor:
    """The variance of the image in x_t at every timestep: (T,) float32, falling.

    Source: linear: Ho et al., "Denoising diffusion probabilistic models", 2020, section 4. squaredcos_cap_v2: Nichol
    and Dhariwal, "Improved DDPM", 2021, eq. 17. Zero terminal SNR: Lin et al., "Common diffusion noise schedules and
    sample steps are flawed", 2024, algorithm 1.
    """
    return _schedule(config, config.zero_terminal_snr).alphas_cumprod


def betas(config: ObjectiveConfig) -> torch.Tensor:
    """(T,) float32, before any rescaling to zero terminal SNR."""
    return _schedule(config, zero_terminal_snr=False).betas


def _schedule(config: ObjectiveConfig, zero_terminal_snr: bool) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=cast(Any, config.beta_schedule),  # its signature forgets laplace
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        rescale_betas_zero_snr=zero_terminal_snr,
    )


def flow_sigma(config: ObjectiveConfig, uniform: torch.Tensor) -> torch.Tensor:
    """Noise levels of flow matching, (B,) float64 in [0, 1], of the density asked for, from uniform numbers in [0, 1).

    Source: Esser et al., "Scaling rectified flow transformers", 2024: logit-normal eq. 19, mode eq. 20, shift eq. 23
    with sqrt(m / n) = `shift`. Our sigma is their t: 0 is the image, 1 is noise.
    """
    sigma = uniform
    if config.timestep_density == "logit_normal":
        sigma = torch.sigmoid(config.logit_mean + config.logit_std * _normal_quantile(uniform))
    elif config.timestep_density == "mode":
        bent = torch.cos(math.pi / 2 * uniform).square() - 1 + uniform
        sigma = 1 - uniform - config.mode_scale * bent
    if config.shift != 1:
        sigma = config.shift * sigma / (1 + (config.shift - 1) * sigma)
    return sigma


def edm_log_sigma(config: ObjectiveConfig, uniform: torch.Tensor) -> torch.Tensor:
    """ln(sigma), normally distributed: (B,) float64, from uniform numbers in [0, 1).

    Source: Karras et al., "Elucidating the design space of diffusion-based generative models", 2022, table 1.
    """
    return config.sigma_mean + config.sigma_std * _normal_quantile(uniform)


def _normal_quantile(uniform: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtri(uniform.clamp(min=_SMALLEST_UNIFORM))
