"""Grids of a pipeline show what diffusers' own pipeline would draw."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from tests.trainers.families import PROMPTS, family_config
from tests.trainers.pipelines import write_pipeline
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.evaluation.drawing import _scheduler, dynamic_shift
from trainers.frozen import open_frozen
from trainers.models import build_model
from trainers.objectives import Objective
from trainers.rng import Stream, normal
from trainers.sampling import denoise, guided, sample_pipeline, usual_guidance

CPU = torch.device("cpu")
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def test_flux_is_told_the_guidance_as_its_pipeline_tells_it(tmp_path: Path) -> None:
    config = decode(TrainerConfig, family_config(write_pipeline(tmp_path / "flux", "flux"), "flux"))
    model, frozen = build_model(config.model, 0), open_frozen(config.model, config.conditioning, CPU)
    assert frozen is not None and usual_guidance(model, config) == 3.5
    noise = normal(0, Stream.SAMPLING, np.arange(2), (4, 4, 4))
    given, without = (frozen.condition(None, texts, None) for texts in (tuple(PROMPTS), ("", "")))
    found: dict[float, torch.Tensor] = {}
    for guidance in (1.0, 3.5):
        # In one step: in several, diffusers' pipeline and its scheduler end at levels of their own.
        latents = denoise(guided(model, given, without, guidance), _scheduler(task(config)), noise, 1)
        with torch.no_grad():
            found[guidance] = frozen.images(latents)
        theirs = sample_pipeline(model, config, PROMPTS, guidance=guidance, num_steps=1)
        assert torch.allclose(found[guidance].clamp(-1, 1), theirs, atol=1e-5)
    assert not torch.allclose(found[1.0], found[3.5], atol=1e-3)


def task(config: TrainerConfig, latent_shape: tuple[int, int, int] = (4, 4, 4)) -> Any:
    return SimpleNamespace(config=config, objective=Objective(config.objective), latent_shape=latent_shape)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_shift_that_follows_from_the_size_is_that_of_diffusers(size: int) -> None:
    tokens = (size // 2) ** 2
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    assert dynamic_shift(DYNAMIC, tokens) == pytest.approx(np.exp(mu))
    assert dynamic_shift({**DYNAMIC, "time_shift_type": "linear"}, tokens) == pytest.approx(mu)
    folder = SimpleNamespace(scheduler=DYNAMIC)
    objective = decode(TrainerConfig, family_config(Path("x"), "flux")).objective
    config: Any = SimpleNamespace(model=SimpleNamespace(folder=lambda: folder), objective=objective)
    scheduler = _scheduler(task(config, (16, size, size)))
    assert scheduler.config["shift"] == pytest.approx(np.exp(mu)) and not scheduler.config["use_dynamic_shifting"]
