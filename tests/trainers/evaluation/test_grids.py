"""Grids of latent models: what diffusers' own pipeline draws with the same weights, noise and sampler."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainers.distributed import run_ranks
from tests.trainers.families import family_config
from tests.trainers.pipelines import write_pipeline
from tests.trainers.tiny import DIT, UNET, build_tiny, tiny_config
from trainers.config import TrainerConfig
from trainers.data.sources import open_source
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.evaluation.drawing import _scheduler
from trainers.evaluation.grids import draw_grid
from trainers.evaluation.validation import validation_loss
from trainers.fitting import check_fits
from trainers.frozen import load_pipeline
from trainers.models import build_model, empty_model
from trainers.rng import Stream, derive_seed

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "dit")
PROMPTS = ["a handwritten three", "a handwritten seven"]
GUIDANCE, SEED = 3.0, 5


def grid_config(folder: Path, family: str) -> dict[str, Any]:
    config = family_config(folder, family)
    what: dict[str, Any] = {"labels": [3, 7]} if family == "dit" else {"prompts": PROMPTS}
    # Diffusers' Flux is told its guidance, and its DiT takes 1000 for the null label, whatever the model's is.
    guidance = 1.0 if family in ("flux", "dit") else GUIDANCE
    common = {"every_steps": 3, "num_images": 4, "num_steps": 2, "guidance": guidance, "seed": SEED}
    return {**config, "samples": {**common, **what}, "validation": {"num_samples": 3}}


def draw(configs: dict[str, dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """The pixels of our grid, of diffusers' images, and the validation loss, before the first step."""
    found = {}
    for family, config in configs.items():
        state, task = build_tiny(config)
        with torch.no_grad():
            state.model.eval()
            grid = np.asarray(Image.open(io.BytesIO(draw_grid(state, task, lambda: None))))
        tiles = [grid[4 + 68 * row :, 4 + 68 * column :][:64:8, :64:8, 0] for row in range(2) for column in range(2)]
        theirs = pipeline_images(decode(TrainerConfig, config), _scheduler(task), family)
        found[family] = (np.stack(tiles), theirs, validation_loss(state, task, lambda: None))
    return found


def pipeline_images(config: TrainerConfig, scheduler: Any, family: str) -> np.ndarray:
    folder = config.model.folder()
    assert folder is not None and folder.part is not None
    model = build_model(config.model, config.seed).eval()
    pipeline = cast(Any, load_pipeline(config.model, folder, **{folder.part: model, "scheduler": scheduler}))
    pipeline.set_progress_bar_config(disable=True)
    wanted: dict[str, Any] = {"class_labels": [3, 7] * 2}
    if family != "dit":
        wanted = {"prompt": PROMPTS * 2, "height": 8, "width": 8}
    if family in ("sd3", "flux"):
        wanted["max_sequence_length"] = 8
    images = pipeline(
        **wanted,
        generator=[torch.Generator().manual_seed(derive_seed(SEED, Stream.SAMPLING, i)) for i in range(4)],
        guidance_scale=config.samples.guidance,
        num_inference_steps=2,
        output_type="np",
    ).images
    return np.round(images[..., 0] * 255).astype(np.uint8)


def test_the_grid_is_what_the_pipeline_draws(tmp_path: Path) -> None:
    configs = {family: grid_config(write_pipeline(tmp_path / family, family), family) for family in FAMILIES}
    for family, (ours, theirs, loss) in run_ranks(1, draw, configs)[0].items():
        assert ours.shape == theirs.shape == (4, 8, 8) and np.isfinite(loss), family
        assert ours.std() > 1 and (ours[0] != ours[1]).any()
        # A level of 255: the pipeline batches guided and unguided images together, which rounds otherwise. Flux's has
        # noise levels of its own.
        limit = 16 if family == "flux" else 1
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= limit, family


CONFIG = tiny_config(UNET, objective={"label_drop": 0.1}, samples={"every_steps": 2})
TEXTLESS = tiny_config(UNET, samples={"every_steps": 2, "prompts": ["a"]})


class FourChannels:
    channels, num_classes, has_captions, buckets, latents = 4, 10, False, None, None

    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TEXTLESS, "samples.prompts=.* have no effect"),
        ({**CONFIG, "samples": {"every_steps": 2, "labels": [4, 10]}}, "the data has no class 10; give 0 to 9"),
        ({**tiny_config(UNET), "samples": {"every_steps": 2, "guidance": 2}}, "samples.guidance=2.0 needs a model"),
        ({**CONFIG, "validation": {"num_samples": 1797}}, "holds out all of the 1797"),
    ],
)
def test_refused_before_anything_starts(config: dict[str, Any], message: str) -> None:
    checked = decode(TrainerConfig, config)
    with pytest.raises(ConfigError, match=message):
        check_fits(empty_model(checked.model, 0), open_source(checked.data), checked)


def test_what_is_no_image_is_not_drawn() -> None:
    args = {**DIT["args"], "in_channels": 4, "out_channels": 4}
    config = decode(TrainerConfig, tiny_config({**DIT, "args": args}, samples={"every_steps": 2}))
    with pytest.raises(ConfigError, match="4 channels"):
        check_fits(empty_model(config.model, 0), cast(Any, FourChannels()), config)
