from __future__ import annotations

import numpy as np
import pytest
import torch

from trainers.ema import EMA, EMAConfig, gamma_of
from trainers.errors import ConfigError
from trainers.posthoc_ema import Profile, WeightedSum, inner_product, reconstruct

STEPS = 2000
TARGETS = (0.05, 0.07, 0.1, 0.12, 0.15)


def test_inner_products_are_integrals():
    a, b = Profile(700, gamma_of(0.05)), Profile(1000, gamma_of(0.1))
    time = np.linspace(0, 700, 400_001)
    p, q = ((c.gamma + 1) * (time / c.time) ** c.gamma / c.time for c in (a, b))
    assert inner_product(a, b) == inner_product(b, a) == pytest.approx(np.trapezoid(p * q, time), rel=1e-6)


@pytest.fixture(scope="module")
def walk():
    """Averages of a random walk: every target at its end, and two profiles as they were at eight times."""
    profiles = {f"{sigma}": EMAConfig(kind="power", sigma_rel=sigma) for sigma in (*TARGETS, 0.2)}
    weights = torch.zeros(64)
    ema = EMA(profiles, {"w": weights}, 1)
    generator = torch.Generator().manual_seed(0)
    snapshots = []
    for step in range(1, STEPS + 1):
        weights.add_(torch.randn(64, generator=generator))
        ema.update(step)
        if step % (STEPS // 8) == 0:
            for sigma in (0.05, 0.1):
                snapshots.append((Profile(step, gamma_of(sigma)), ema.tensors()[f"{sigma}"]["w"].clone()))
    return snapshots, {sigma: ema.tensors()[f"{sigma}"]["w"] for sigma in TARGETS}


@pytest.mark.parametrize("sigma_rel", TARGETS)
def test_a_reconstruction_is_the_average_computed_directly(walk, sigma_rel):
    snapshots, direct = walk
    plan = reconstruct([profile for profile, _ in snapshots], Profile(STEPS, gamma_of(sigma_rel)))
    assert sum(plan.coefficients) == pytest.approx(1, abs=1e-12)
    total = WeightedSum((64,))
    for (_, tensor), coefficient in zip(snapshots, plan.coefficients, strict=True):
        total.add(tensor, coefficient)
    error = (total.result() - direct[sigma_rel]).norm() / direct[sigma_rel].norm()
    assert error < 1e-2
    assert plan.residual < 0.04
    if sigma_rel in (0.05, 0.1):  # stored as it is
        assert error < 1e-5 and plan.residual < 1e-5


def test_the_residual_tells_when_snapshots_are_missing():
    late = [Profile(time, gamma_of(sigma)) for time in (1990, 1995, 2000) for sigma in (0.05, 0.1)]
    spread = [Profile(time, gamma_of(sigma)) for time in range(100, 2001, 100) for sigma in (0.05, 0.1)]
    target = Profile(2000, gamma_of(0.2))
    assert reconstruct(spread, target).residual < 0.02 < 0.2 < reconstruct(late, target).residual


def test_many_snapshots_stay_well_conditioned():
    snapshots = [Profile(time, gamma_of(sigma)) for time in range(1000, 200_001, 1000) for sigma in (0.05, 0.1)]
    plan = reconstruct(snapshots, Profile(200_000, gamma_of(0.15)))
    assert plan.residual < 1e-3 and sum(map(abs, plan.coefficients)) < 100


def test_a_time_without_snapshot_is_refused():
    with pytest.raises(ConfigError, match="no power profile has a snapshot at its update 1800"):
        reconstruct([Profile(1000, 6.9), Profile(2000, 6.9)], Profile(1800, 5.0))
