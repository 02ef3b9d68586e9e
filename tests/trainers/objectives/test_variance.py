from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from trainers.objectives.variance import VariationalBound

T = 50
SCHEDULE = DDPMScheduler(num_train_timesteps=T, beta_schedule="linear", variance_type="learned_range").alphas_cumprod


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (T, 2, 3, 3), generator=generator) / 127.5 - 1
    guess = x0 + 0.1 * torch.randn(x0.shape, generator=generator)
    noise, output = torch.randn(2, *x0.shape, generator=generator)
    t = torch.arange(T)
    alpha = SCHEDULE[t].view(-1, 1, 1, 1)
    return x0, guess, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, output.clamp(-1, 1), t


def test_the_variance_equals_diffusers(data):
    *_, output, t = data
    theirs: Any = DDPMScheduler(num_train_timesteps=T, beta_schedule="linear", variance_type="learned_range")
    ours = VariationalBound(SCHEDULE).log_variance(output, t)
    for step in range(1, T):  # the first timestep's smaller variance is 0: there the two clip differently
        expected = theirs._get_variance(step, predicted_variance=output[step])
        torch.testing.assert_close(ours[step], expected, rtol=1e-3, atol=1e-3)
    ends = VariationalBound(SCHEDULE).log_variance(torch.ones(T, 1, 1, 1), t).flatten()
    torch.testing.assert_close(ends.exp(), theirs.betas, rtol=1e-2, atol=0)  # at 1 it is beta


def test_the_terms_are_divergences_of_the_true_posterior(data):
    x0, guess, x_t, output, t = data
    bound = VariationalBound(SCHEDULE)
    ours = bound(output, x0, guess, x_t, t)
    products = SCHEDULE.double()
    for step in range(1, T):
        now, before = products[step], products[step - 1]
        beta = 1 - now / before
        variance = beta * (1 - before) / (1 - now)

        def mean(x, now=now, before=before, beta=beta, step=step):
            return (before.sqrt() * beta * x + (now / before).sqrt() * (1 - before) * x_t[step].double()) / (1 - now)

        posterior = Normal(mean(x0[step].double()), variance.sqrt())
        learned = Normal(mean(guess[step].double()), (0.5 * bound.log_variance(output, t)[step].double()).exp())
        expected = kl_divergence(posterior, learned).mean() / math.log(2)
        torch.testing.assert_close(ours[step].double(), expected, rtol=2e-3, atol=1e-5)


def test_the_first_timestep_is_a_decoder_of_256_values(data):
    x0, guess, x_t, output, t = data
    bound = VariationalBound(SCHEDULE)
    ours = bound(output, x0, guess, x_t, t)[0]
    deviation = (0.5 * bound.log_variance(output, t)[0].double()).exp()
    mean = guess[0].double()  # the posterior of the first timestep does not look at x_t
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    edges = (values[:-1] + values[1:]) / 2
    inner = torch.special.ndtr((edges.view(-1, 1, 1, 1) - mean) / deviation)
    cumulative = torch.cat([torch.zeros_like(mean)[None], inner, torch.ones_like(mean)[None]])
    probabilities = cumulative.diff(dim=0)  # (256, C, H, W)
    torch.testing.assert_close(probabilities.sum(0), torch.ones_like(mean))
    index = ((x0[0] + 1) * 127.5).round().long()
    chosen = probabilities.gather(0, index[None])[0].clamp(min=1e-12)
    torch.testing.assert_close(ours.double(), -chosen.log().mean() / math.log(2), rtol=2e-2, atol=0)


def test_the_bound_is_least_at_the_true_variance(data):
    x0, _, x_t, _, t = data
    bound = VariationalBound(SCHEDULE)
    small, large = (bound(torch.full_like(x0, value), x0, x0, x_t, t)[1:] for value in (-1.0, 1.0))
    assert (small.abs() < 1e-6).all() and (large > small).all()
