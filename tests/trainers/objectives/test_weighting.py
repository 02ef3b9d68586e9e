from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from trainers.objectives import Objective, ObjectiveConfig

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def objective(kind: Any = "epsilon", **settings: Any):
    return Objective(ObjectiveConfig(prediction_type=kind, **settings))


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, 3, 4, 4, generator=generator)
    return x0, noise, torch.rand(64, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_equals_diffusers_training_scripts(gamma):
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(beta_schedule="squaredcos_cap_v2"), t)
    capped = torch.minimum(snr, torch.full_like(snr, gamma))
    for kind, expected in (("epsilon", capped / snr), ("v_prediction", capped / (snr + 1)), ("sample", capped)):
        weight = objective(kind, weighting="min_snr", min_snr_gamma=gamma).weight(t)
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)


# Weight of the error of epsilon, by SNR, as the papers give it.
OF_EPSILON = {
    "min_snr": ({"min_snr_gamma": 2.0}, lambda snr: (2 / snr).clamp(max=1)),
    "p2": ({"p2_gamma": 0.5, "p2_k": 3.0}, lambda snr: (3 + snr) ** -0.5),
    "debiased": ({}, lambda snr: snr**-0.5),
}


@pytest.mark.parametrize("weighting", OF_EPSILON)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_the_same_for_an_error_of_x0_whatever_is_predicted(kind, weighting, samples):
    settings, of_epsilon = OF_EPSILON[weighting]
    x0, noise, u = samples
    ours = objective(kind, weighting=weighting, **settings)
    t = ours.timesteps(0.05 + 0.9 * u)
    alpha, sigma = (value.double().view(-1, 1, 1, 1) for value in ours._alpha_sigma(t))
    x_t, guess = alpha * x0 + sigma * noise, x0 + 0.1
    prediction = ours.target(guess, (x_t - alpha * guess) / sigma, t)
    snr = (alpha / sigma).square().flatten()
    # An error of 0.1 in x0 is one of 0.1 alpha / sigma in epsilon.
    expected = 0.01 * snr * of_epsilon(snr)
    torch.testing.assert_close(ours.loss(prediction, x0, noise, t).double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_weights_of_flow_equal_diffusers(weighting):
    sigma = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    ours = objective("flow", weighting=weighting).weight((1000 * sigma).float())
    theirs = compute_loss_weighting_for_sd3(weighting, sigma)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=0)


def test_cosmap_is_a_density():
    sigma = torch.linspace(0, 1, 10001)
    mean = torch.trapezoid(objective("flow", weighting="cosmap").weight(1000 * sigma), sigma)
    assert mean.item() == pytest.approx(1, abs=1e-5)
    assert objective("flow", weighting="cosmap").weight(torch.tensor([0.0])).item() == pytest.approx(2 / math.pi)


@pytest.mark.parametrize(
    ("kind", "weighting"),
    [(kind, weighting) for kind in KINDS for weighting in ("none", *OF_EPSILON)]
    + [("flow", "sigma_sqrt"), ("flow", "cosmap")],
)
def test_weights_stay_finite_at_the_ends(kind, weighting):
    terminal = kind in ("v_prediction", "sample")
    ours = objective(kind, weighting=weighting, zero_terminal_snr=terminal)
    ends = torch.tensor([0.0, 1000.0]) if kind == "flow" else torch.tensor([0, 999])
    weight = ours.weight(ends)
    assert weight.isfinite().all() and (weight >= 0).all()
