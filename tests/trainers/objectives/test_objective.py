from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from trainers.errors import ConfigError
from trainers.objectives import Objective, ObjectiveConfig
from trainers.rng import Stream, normal, uniform

KINDS = ("epsilon", "v_prediction", "sample", "flow")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_ddim_has_the_schedule_of_the_training(kind, schedule):
    betas = {} if schedule in ("squaredcos_cap_v2", "laplace") else {"beta_start": 0.00085, "beta_end": 0.012}
    for terminal in (False, True) if kind != "epsilon" else (False,):
        ours = objective(kind, num_train_timesteps=500, beta_schedule=schedule, zero_terminal_snr=terminal, **betas)
        scheduler: Any = ours.scheduler()
        assert isinstance(scheduler, DDIMScheduler) and scheduler.config["prediction_type"] == kind
        assert torch.equal(scheduler.alphas_cumprod.sqrt(), ours._alphas)


def test_the_flow_sampler_has_the_shift_of_the_training():
    scheduler: Any = objective("flow", num_train_timesteps=500, shift=3.0).scheduler()
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    assert scheduler.config["num_train_timesteps"] == 500 and scheduler.config["shift"] == 3.0


def test_edm_equals_diffusers_and_the_paper(samples):
    x0, noise, u = samples
    ours = objective("edm", sigma_data=0.7)
    theirs: Any = ours.scheduler()
    assert isinstance(theirs, EDMEulerScheduler)
    t = ours.timesteps(u)
    level = torch.exp(4 * t.double()).view(-1, 1, 1, 1)
    torch.testing.assert_close(t.double(), theirs.precondition_noise(level).flatten(), rtol=1e-6, atol=1e-6)
    x = x0.double() + level * noise.double()
    torch.testing.assert_close(
        ours.noisy(x0, noise, t).double(), theirs.precondition_inputs(x, level), rtol=1e-5, atol=1e-5
    )
    # The network that is trained to the target is, preconditioned, a perfect denoiser.
    denoised = theirs.precondition_outputs(x, ours.target(x0, noise, t).double(), level)
    torch.testing.assert_close(denoised, x0.double(), rtol=1e-4, atol=1e-4)
    # Table 1 of the paper: lambda(sigma) |D - x0|^2.
    prediction = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    error = theirs.precondition_outputs(x, prediction.double(), level) - x0.double()
    weight = (level**2 + 0.7**2) / (level * 0.7) ** 2
    expected = (weight * error.square()).mean((1, 2, 3))
    torch.testing.assert_close(ours.loss(prediction, x0, noise, t).double(), expected, rtol=1e-4, atol=1e-5)


def test_offset_noise_is_alike_in_a_channel_and_of_the_sample(samples):
    _, noise, _ = samples
    positions = np.arange(64) + 1000
    ours = objective(offset_noise=0.1)
    target, in_input = ours.noises(noise, 3, positions)
    assert target is in_input
    offset = (target - noise) / 0.1
    expected = normal(3, Stream.OFFSET_NOISE, positions, (3, 1, 1)).expand_as(noise)
    torch.testing.assert_close(offset, expected, rtol=0, atol=1e-4)
    assert offset[:, :, 0, 0].std() == pytest.approx(1, abs=0.15)
    part, _ = ours.noises(noise[10:20], 3, positions[10:20])
    assert torch.equal(part, target[10:20])


def test_input_perturbation_is_in_the_input_and_not_in_the_target(samples):
    x0, noise, u = samples
    ours = objective(input_perturbation=0.2)
    target, in_input = ours.noises(noise, 3, np.arange(64))
    assert torch.equal(target, noise)
    further = normal(3, Stream.INPUT_PERTURBATION, np.arange(64), (3, 4, 4))
    theirs: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    t = ours.timesteps(u)
    assert torch.equal(ours.noisy(x0, in_input, t), theirs.add_noise(x0, noise + 0.2 * further, t))
    assert objective().noises(noise, 3, np.arange(64))[1] is noise


def test_contrastive_flow_matching_is_its_formula(samples):
    x0, noise, u = samples
    ours = objective("flow", contrastive=0.05)
    t = ours.timesteps(u)
    prediction = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    target = noise - x0
    loss = ours.loss(prediction, x0, noise, t)
    for i in range(64):
        other = target[i - 1 if i else 63]
        expected = (prediction[i] - target[i]).square().mean() - 0.05 * (prediction[i] - other).square().mean()
        torch.testing.assert_close(loss[i], expected)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_hybrid_loss_is_the_simple_one_and_the_bound(kind, samples):
    x0, noise, u = samples
    ours = objective(kind, learned_variance=True, vlb_weight=0.002, num_train_timesteps=500)
    t = ours.timesteps(u)
    output = torch.randn(64, 6, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    mean, variance = output.detach().chunk(2, 1)
    simple = objective(kind, num_train_timesteps=500).loss(mean, x0, noise, t)
    x_t = ours.noisy(x0, noise, t)
    alpha, sigma = ours._alpha_sigma(t, x0)
    guess = {"epsilon": (x_t - sigma * mean) / alpha, "sample": mean, "v_prediction": alpha * x_t - sigma * mean}[kind]
    assert ours._bound is not None
    bound = ours._bound(variance, x0, guess, x_t, t)
    loss = ours.loss(output, x0, noise, t)
    torch.testing.assert_close(loss.detach(), simple + 0.002 * 500 * bound)
    loss.sum().backward()
    assert output.grad is not None
    torch.testing.assert_close(
        output.grad[:, :3], 2 / 48 * (mean - ours.target(x0, noise, t))
    )  # of the simple loss alone
    assert (output.grad[:, 3:] != 0).all()
    with pytest.raises(ConfigError, match="6 output channels, twice the data's, and not 3"):
        ours.loss(mean, x0, noise, t)
