from __future__ import annotations

import json
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.conditioning import Condition
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.models import empty_model
from trainers.objectives import Objective, ObjectiveConfig
from trainers.rng import Stream, normal
from trainers.sampling import guided, sample_images, save_grid, usual_guidance

IMAGES = torch.linspace(-0.9, 0.9, 3 * 16).view(3, 1, 4, 4)


class Oracle(torch.nn.Module):
    """Knows the only image of each class, so it predicts without error; class 2 is the null label."""

    def __init__(self, objective, conditional=True):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.objective, self.conditional, self.calls = objective, conditional, []
        self.config = {"num_class_embeds": 3 if conditional else None}

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append(len(sample))
        x0 = IMAGES[class_labels if self.conditional else torch.zeros(len(sample), dtype=torch.long)]
        alpha, sigma = self.objective._alpha_sigma(timestep, sample)
        return (self.objective.target(x0, (sample - alpha * x0) / sigma, timestep),)


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "zero_terminal_snr": True},
        {"prediction_type": "sample"},
        {"prediction_type": "flow"},
        {"prediction_type": "flow", "shift": 3.0},
        {"prediction_type": "edm"},
        {"prediction_type": "edm", "sigma_data": 1.0},
    ],
)
def test_a_perfect_model_yields_its_images(settings):
    objective = Objective(ObjectiveConfig(**settings))
    labels = torch.tensor([0, 1, 1, 0])
    oracle = Oracle(objective)
    images = sample_images(oracle, objective, (4, 1, 4, 4), labels, num_steps=10)
    torch.testing.assert_close(images, IMAGES[labels], rtol=0, atol=2e-3)
    assert oracle.training and oracle.calls == [4] * 10


def test_guidance_moves_away_from_the_unconditional_prediction():
    objective = Objective(ObjectiveConfig(prediction_type="flow", label_drop=0.1))
    images = sample_images(Oracle(objective), objective, (1, 1, 4, 4), torch.tensor([1]), guidance=1.2, num_steps=10)
    torch.testing.assert_close(images, IMAGES[2:] + 1.2 * (IMAGES[1:2] - IMAGES[2:]), rtol=0, atol=1e-4)


def test_a_distilled_model_is_told_its_guidance_in_one_pass():
    class Distilled(torch.nn.Module):
        config = MappingProxyType({"guidance_embeds": True})

    told = []

    def call(model, noisy, timesteps, condition):
        told.append(condition.guidance)
        return noisy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.sampling.call_model", call)
        guided(Distilled(), Condition(guidance=1.0), Condition(), 3.5)(torch.zeros(1, 1, 2, 2), torch.zeros(1))
    assert told == [3.5]


TINY_UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 2,
}
TINY_FLUX = {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}


@pytest.mark.parametrize(
    ("network", "pipeline", "keys", "label_drop", "expected"),
    [
        (TINY_UNET, "StableDiffusionPipeline", {}, 0.0, 7.5),  # learnt before this training
        (TINY_UNET, "StableDiffusionXLPipeline", {}, 0.1, 5.0),
        (TINY_UNET, "StableDiffusionPipeline", {"from_scratch": True}, 0.0, 1.0),
        (TINY_UNET, "StableDiffusionPipeline", {"from_scratch": True}, 0.1, 7.5),
        (TINY_UNET, None, {}, 0.0, 1.5),
        ({**TINY_FLUX, "guidance_embeds": True}, "FluxPipeline", {"from_scratch": True}, 0.0, 3.5),
        ({**TINY_FLUX, "guidance_embeds": False}, "FluxPipeline", {}, 0.0, 1.0),
    ],
)
def test_the_usual_guidance_is_that_of_the_pipeline(tmp_path, network, pipeline, keys, label_drop, expected):
    part = "unet" if network is TINY_UNET else "transformer"
    folder = tmp_path / part if pipeline else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(network))
    if pipeline:
        index = {"_class_name": pipeline, part: ["diffusers", network["_class_name"]]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = {"pretrained": str(tmp_path), **keys}
    train = {"num_steps": 1, "global_batch_size": 1, "microbatch_size": 1}
    config = decode(TrainerConfig, {"model": model, "train": train, "objective": {"label_drop": label_drop}})
    with torch.device("meta"):
        assert usual_guidance(empty_model(config.model, 0), config) == expected


class Zero(Oracle):
    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.calls.append(len(sample))
        return (torch.zeros_like(sample),)


def test_noise_is_of_the_image_not_of_the_batch():
    objective = Objective(ObjectiveConfig(prediction_type="flow"))
    model = Zero(objective, conditional=False)
    many = sample_images(model, objective, (70, 1, 4, 4), seed=3, num_steps=1)
    assert model.calls == [64, 6]
    assert torch.equal(many[:5], sample_images(model, objective, (5, 1, 4, 4), seed=3, num_steps=1))
    assert torch.equal(many, normal(3, Stream.SAMPLING, np.arange(70), (1, 4, 4)).clamp(-1, 1))
    assert not torch.equal(many[:5], sample_images(model, objective, (5, 1, 4, 4), seed=4, num_steps=1))


def test_refusals():
    objective = Objective(ObjectiveConfig())
    with pytest.raises(ConfigError, match="labels=None"):
        sample_images(Oracle(objective), objective, (1, 1, 4, 4))
    with pytest.raises(ConfigError, match="guidance=3"):
        sample_images(Oracle(objective), objective, (1, 1, 4, 4), torch.tensor([0]), guidance=3.0)
    with pytest.raises(ConfigError, match="guidance=2"):
        sample_images(Oracle(objective, conditional=False), objective, (1, 1, 4, 4), guidance=2.0)
    with pytest.raises(ConfigError, match="2 channels"):
        save_grid(torch.zeros(1, 2, 4, 4), "never.png", 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(tmp_path, channels):
    images = torch.full((5, channels, 8, 8), -1.0)
    images[4, 0] = 1.0
    save_grid(images, tmp_path / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * (64 + 4) + 4, 3 * (64 + 4) + 4, 3)
    first, last, absent = grid[4:68, 4:68], grid[72:136, 72:136], grid[72:136, 140:204]
    assert (first == 0).all() and (absent == 96).all() and (grid[:4] == 96).all()
    assert (last == ([255, 255, 255] if channels == 1 else [255, 0, 0])).all()
