from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from trainers.objectives import Objective, ObjectiveConfig
from trainers.objectives.noise_levels import alphas_cumprod, edm_log_sigma, flow_sigma
from trainers.rng import Stream, uniform

N = 4096


def config(kind: Any, **settings: Any) -> ObjectiveConfig:
    return ObjectiveConfig(prediction_type=kind, **settings)


def numbers() -> torch.Tensor:
    return torch.from_numpy(uniform(0, Stream.TIMESTEP, np.arange(N)))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_equals_diffusers(mean, std):
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling("logit_normal", N, mean, std, generator=generator)
    drawn = torch.normal(mean, std, (N,), generator=generator.manual_seed(0)).double()
    flow = config("flow", timestep_density="logit_normal", logit_mean=mean, logit_std=std)
    ours = flow_sigma(flow, torch.special.ndtr((drawn - mean) / std))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.29, -0.5, 1.7519])
def test_mode_equals_diffusers_and_is_a_density_on_0_to_1(scale):
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling("mode", N, mode_scale=scale, generator=generator)
    drawn = torch.rand(N, generator=generator.manual_seed(0)).double()
    flow = config("flow", timestep_density="mode", mode_scale=scale)
    torch.testing.assert_close(flow_sigma(flow, drawn).float(), theirs, rtol=1e-5, atol=1e-5)
    falling = flow_sigma(flow, torch.linspace(0, 1, 10001, dtype=torch.float64))
    assert (falling.diff() <= 1e-12).all() and falling[0] == 1 and abs(falling[-1]) < 1e-12


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_shift_equals_the_sampler(shift):
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    levels = torch.linspace(1, 0.001, 1000, dtype=torch.float64)
    torch.testing.assert_close(flow_sigma(config("flow", shift=shift), levels).float(), theirs.sigmas[:1000])
    t = Objective(config("flow", shift=shift)).timesteps(levels)
    torch.testing.assert_close(t, theirs.timesteps)


def test_the_ends_of_the_uniform_numbers_stay_finite():
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for settings in ({"timestep_density": "logit_normal"}, {"timestep_density": "mode"}, {"shift": 3.0}):
        t = Objective(config("flow", **settings)).timesteps(ends)
        assert ((t >= 0) & (t <= 1000)).all()
    assert Objective(config("edm")).timesteps(ends).isfinite().all()


def test_edm_draws_the_logarithm_from_a_normal_distribution():
    settings = config("edm", sigma_mean=-0.4, sigma_std=1.0)
    log_sigma = edm_log_sigma(settings, numbers())
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(1.0, abs=0.03)
    torch.testing.assert_close(Objective(settings).timesteps(numbers()), (log_sigma / 4).float())
    assert edm_log_sigma(settings, torch.tensor([0.5], dtype=torch.float64)).item() == pytest.approx(-0.4)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.parametrize("terminal", [False, True])
def test_schedules_equal_diffusers(schedule, terminal):
    ours = alphas_cumprod(config("v_prediction", beta_schedule=schedule, zero_terminal_snr=terminal))
    theirs = DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=terminal).alphas_cumprod
    assert torch.equal(ours, theirs) and (ours.diff() <= 0).all()
    assert (ours[-1] == 0) == terminal


def test_zero_terminal_snr_is_algorithm_1():
    roots = alphas_cumprod(config("v_prediction", beta_schedule="linear")).double().sqrt()
    expected = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    ours = alphas_cumprod(config("v_prediction", beta_schedule="linear", zero_terminal_snr=True))
    torch.testing.assert_close(ours.double().sqrt(), expected, rtol=1e-4, atol=1e-6)


def test_scaled_linear_is_linear_in_the_root():
    settings = config("epsilon", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    np.testing.assert_allclose(alphas_cumprod(settings).numpy(), np.cumprod(1 - betas), rtol=1e-4)
