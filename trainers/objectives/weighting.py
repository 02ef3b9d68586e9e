"""How much the error at a noise level counts."""

from __future__ import annotations

import math

import torch

from trainers.objectives.config import ObjectiveConfig


def loss_weight(config: ObjectiveConfig, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Weight of the squared error of the prediction, where x_t = alpha x0 + sigma noise: (B,) float64.

    min_snr, p2 and debiased are one weight of the error of x0, whatever is predicted: the factor between that error
    and the error of the prediction (SNR for epsilon, SNR + 1 for v, 1 / sigma^2 for flow) is divided out. `none` weighs
    each kind of prediction by 1, and sigma_sqrt and cosmap weigh the velocity of flow. SNR = alpha^2 / sigma^2.

    Args:
        alpha, sigma: (B,) float64.

    Source: min_snr: Hang et al., "Efficient diffusion training via min-SNR weighting strategy", 2023, section 3.4. p2:
    Choi et al., "Perception prioritized training of diffusion models", 2022, eq. 8, a weight of the error of epsilon.
    debiased: Yu et al., "Debias the training of diffusion models", 2023, 1 / sqrt(SNR) for the error of epsilon.
    sigma_sqrt, cosmap: Esser et al., 2024, section 3.1, as in diffusers' `compute_loss_weighting_for_sd3`.
    """
    kind = config.prediction_type
    match config.weighting:
        case "min_snr":
            return _min_snr(config, alpha, sigma)
        case "p2":
            snr = (alpha / sigma).square()
            share = {"epsilon": 1.0, "sample": snr}.get(kind, alpha.square())  # of an error of epsilon
            return share / (config.p2_k + snr) ** config.p2_gamma
        case "debiased":
            if kind == "epsilon":
                return sigma / alpha
            return alpha / sigma if kind == "sample" else alpha * sigma
        case "sigma_sqrt":
            # Nothing between the image and the sampler's smallest noise level counts for more than that level.
            return sigma.clamp(min=1 / config.num_train_timesteps) ** -2
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    return torch.ones_like(sigma)


def _min_snr(config: ObjectiveConfig, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    snr = (alpha / sigma).square()  # infinite where sigma is 0, which every branch survives
    capped = snr.clamp(max=config.min_snr_gamma)
    kind = config.prediction_type
    if kind == "epsilon":
        return (config.min_snr_gamma / snr).clamp(max=1)
    if kind == "v_prediction":
        return capped / (snr + 1)
    if kind == "flow":
        return capped * sigma.square()
    return capped
