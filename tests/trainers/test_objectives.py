from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from trainers.errors import ConfigError
from trainers.objectives import Objective, ObjectiveConfig
from trainers.rng import Stream, uniform

KINDS = ("epsilon", "v_prediction", "sample", "flow")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def objective(kind: Any = "epsilon", **settings: Any):
    return Objective(ObjectiveConfig(prediction_type=kind, **settings))


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, 3, 4, 4, generator=generator)
    return x0, noise, torch.rand(64, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noisy_and_targets_equal_ddpm(schedule, samples):
    x0, noise, u = samples
    theirs: Any = DDPMScheduler(beta_schedule=schedule)
    ours = {kind: objective(kind, beta_schedule=schedule) for kind in KINDS[:3]}
    t = ours["epsilon"].timesteps(u)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": theirs.get_velocity(x0, noise, t)}
    for kind, target in expected.items():
        assert torch.equal(ours[kind].noisy(x0, noise, t), theirs.add_noise(x0, noise, t))
        assert torch.equal(ours[kind].target(x0, noise, t), target)


def test_flow_equals_diffusers(samples):
    x0, noise, _ = samples
    theirs: Any = FlowMatchEulerDiscreteScheduler()
    t = theirs.timesteps[torch.arange(0, 1000, 16)][:64]
    x0, noise, ours = x0[: len(t)], noise[: len(t)], objective("flow")
    torch.testing.assert_close(ours.noisy(x0, noise, t), theirs.scale_noise(x0, t, noise), rtol=1e-6, atol=1e-6)
    # The target is the velocity along which the sampler's Euler step moves.
    step = ours.noisy(x0, noise, t + 10) - ours.noisy(x0, noise, t)
    torch.testing.assert_close(step, 0.01 * ours.target(x0, noise, t), rtol=1e-4, atol=1e-5)


def test_timesteps_are_uniform_and_in_range():
    u = torch.from_numpy(uniform(0, Stream.TIMESTEP, np.arange(100_000)))
    t = objective().timesteps(u)
    counts = t.bincount(minlength=1000)
    assert t.dtype == torch.int64 and len(counts) == 1000 and 50 < counts.min() and counts.max() < 160
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert objective().timesteps(ends).tolist() == [0, 999]
    flow = objective("flow").timesteps(u)
    assert flow.dtype == torch.float32 and flow.unique().numel() > 90_000
    assert 0 <= flow.min() < 1 and 999 < flow.max() <= 1000


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_equals_diffusers_training_scripts(gamma):
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(beta_schedule="squaredcos_cap_v2"), t)
    capped = torch.minimum(snr, torch.full_like(snr, gamma))
    for kind, expected in (("epsilon", capped / snr), ("v_prediction", capped / (snr + 1)), ("sample", capped)):
        weight = objective(kind, weighting="min_snr", min_snr_gamma=gamma).weight(t)
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_the_same_weight_of_an_error_of_x0(kind, samples):
    x0, noise, u = samples
    ours = objective(kind, weighting="min_snr")
    t = ours.timesteps(0.05 + 0.9 * u)
    alpha, sigma = (value.double().view(-1, 1, 1, 1) for value in ours._alpha_sigma(t))
    x_t, guess = alpha * x0 + sigma * noise, x0 + 0.1
    guessed_noise = (x_t - alpha * guess) / sigma
    prediction = ours.target(guess, guessed_noise, t)
    snr = (alpha / sigma).square().flatten()
    torch.testing.assert_close(
        ours.loss(prediction, x0, noise, t).double(), 0.01 * snr.clamp(max=5.0), rtol=2e-3, atol=0
    )


def test_weights_stay_finite_at_the_ends():
    for kind in KINDS:
        ours = objective(kind, weighting="min_snr")
        ends = torch.tensor([0.0, 1000.0]) if kind == "flow" else torch.tensor([0, 999])
        weight = ours.weight(ends)
        assert weight.isfinite().all() and (weight >= 0).all()


def test_loss_is_a_float32_mean_of_every_sample(samples):
    x0, noise, u = samples
    ours = objective()
    t = ours.timesteps(u)
    prediction = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = (prediction.double() - noise.double()).square().mean((1, 2, 3))
    loss = ours.loss(prediction, x0, noise, t)
    assert loss.dtype == torch.float32 and loss.shape == (64,)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(ours.weight(t), torch.ones(64))


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_fits_the_objective(kind):
    settings = {"num_train_timesteps": 500, "beta_schedule": "linear"}
    scheduler: Any = objective(kind, **settings).scheduler()
    if kind == "flow":
        assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        assert scheduler.config["num_train_timesteps"] == 500
    else:
        assert isinstance(scheduler, DDIMScheduler)
        assert {key: scheduler.config[key] for key in (*settings, "prediction_type")} == {
            **settings,
            "prediction_type": kind,
        }


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"min_snr_gamma": 0.0}, r"min_snr_gamma=0\.0"),
        ({"label_drop": 1.5}, r"label_drop=1\.5"),
    ],
)
def test_refusals(settings, word):
    with pytest.raises(ConfigError, match=word):
        ObjectiveConfig(**settings)
