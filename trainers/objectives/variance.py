"""The variational bound that trains a learned variance.

Source: Nichol and Dhariwal, "Improved denoising diffusion probabilistic models", 2021: eq. 15 (the variance), eq. 16
(the hybrid loss), with the posterior of Ho et al., 2020, eq. 6 and 7, and their discrete decoder, eq. 13.
"""

from __future__ import annotations

import math

import torch

_HALF_LEVEL = 1 / 255  # half the distance of two of the 256 values of an image in [-1, 1]
_LEAST_PROBABILITY = 1e-12


class VariationalBound:
    """Terms of the bound on one noise schedule."""

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        """Args: alphas_cumprod: (T,), T >= 2."""
        products = alphas_cumprod.double()
        previous = torch.cat([torch.ones(1, dtype=torch.float64), products[:-1]])
        alphas = products / previous
        posterior = (1 - alphas) * (1 - previous) / (1 - products)
        # The posterior of the first timestep has no variance, of which there is no logarithm: the next one's is taken.
        posterior[0] = posterior[1]
        self._table = torch.stack(
            [
                (1 - alphas).log(),
                posterior.log(),
                previous.sqrt() * (1 - alphas) / (1 - products),  # of x0 in the mean of the posterior
                alphas.sqrt() * (1 - previous) / (1 - products),  # of x_t in it
            ]
        ).float()  # (4, T)

    def log_variance(self, output: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network's output means: beta at 1, the posterior's variance at -1, geometrically between.

        Shapes: (B, C, H, W) -> (B, C, H, W) float32.
        """
        log_beta, log_posterior, _, _ = self._at(timesteps, output)
        share = (output.float() + 1) / 2
        return share * log_beta + (1 - share) * log_posterior

    def __call__(
        self,
        output: torch.Tensor,
        x0: torch.Tensor,
        guess: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """This timestep's term of the bound, in bits a dimension: (B,) float32.

        Args:
            output: (B, C, H, W), the network's second half.
            guess: (B, C, H, W), x0 as the first half predicts it; without gradient, so that only the variance learns.
        """
        _, log_posterior, of_x0, of_x_t = self._at(timesteps, x0)
        log_variance = self.log_variance(output, timesteps)
        mean = of_x0 * guess + of_x_t * x_t
        true_mean = of_x0 * x0 + of_x_t * x_t
        divergence = 0.5 * (
            log_variance
            - log_posterior
            + torch.exp(log_posterior - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
            - 1
        )
        decoder = -_log_likelihood(x0, mean, log_variance)
        first = (timesteps == 0).view(-1, *[1] * (x0.ndim - 1))
        return torch.where(first, decoder, divergence).flatten(1).mean(1) / math.log(2)

    def _at(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The columns of the table at `timesteps`: (4, B, 1, 1, 1)."""
        self._table = self._table.to(timesteps.device)  # once
        return self._table[:, timesteps].view(4, -1, *[1] * (like.ndim - 1))


def _log_likelihood(x0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log probability that a Gaussian falls on the one of 256 values in [-1, 1] that x0 has; outer bins are open."""
    scale = torch.exp(-0.5 * log_variance)
    upper = torch.special.ndtr((x0 + _HALF_LEVEL - mean) * scale)
    lower = torch.special.ndtr((x0 - _HALF_LEVEL - mean) * scale)
    upper = torch.where(x0 > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x0 < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=_LEAST_PROBABILITY).log()
