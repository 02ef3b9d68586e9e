"""Images from a trained model."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from trainers.conditioning import Condition, call_model, takes_guidance
from trainers.config import TrainerConfig
from trainers.errors import ConfigError
from trainers.frozen import load_pipeline, pipeline_scheduler
from trainers.models import can_be_guided, learns_null_label, null_label, settings_of
from trainers.objectives import Objective
from trainers.rng import Stream, derive_seed, normal
from trainers.text_encoder import open_text_encoder

_BATCH_SIZE = 64
_PIPELINE_BATCH_SIZE = 8  # latents are small, but the images that a VAE makes of them are not


def sample_images(
    model: nn.Module,
    objective: Objective,
    shape: tuple[int, int, int, int],
    labels: torch.Tensor | None = None,
    *,
    seed: int = 0,
    guidance: float = 1.0,
    num_steps: int = 50,
) -> torch.Tensor:
    """Images drawn from the model by DDIM or Euler steps, in evaluation mode and without gradients.

    Image i starts from noise of (seed, i), so it shows the same motif for any weights and any number of images.

    Args:
        shape: (N, C, H, W).
        labels: (N,) int64 for class-conditional models, else None.
        guidance: strength of classifier-free guidance, >= 0; 1 is none.
        num_steps: denoising steps, >= 1; the model is called twice in each with guidance.

    Returns:
        (N, C, H, W) float32 in [-1, 1], on the CPU.

    Source: Ho and Salimans, "Classifier-free diffusion guidance", 2022, eq. 6 with w = guidance - 1.
    """
    null = null_label(model)
    if (null is None) != (labels is None):
        raise ConfigError(f"labels={labels} do not fit a model with {'no classes' if null is None else 'classes'}")
    if guidance != 1 and not learns_null_label(model, objective.config.label_drop):
        raise ConfigError(f"guidance={guidance} needs a model that was trained with dropped labels; use guidance=1")
    without = None if labels is None else torch.full_like(labels, null or 0)
    conditions = Condition(labels=labels), Condition(labels=without)
    return _sample(model, objective, shape, conditions, seed=seed, guidance=guidance, num_steps=num_steps)


def sample_texts(
    model: nn.Module,
    config: TrainerConfig,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    guidance: float = 1.0,
    num_steps: int = 50,
) -> torch.Tensor:
    """As `sample_images`, of a model of pixels that was trained with `conditioning.text_encoder`."""
    if guidance != 1 and not can_be_guided(model, config.model, config.objective.label_drop):
        raise ConfigError(f"guidance={guidance} needs a model that was trained with dropped captions; use guidance=1")
    encoder = open_text_encoder(config.conditioning, torch.device("cpu"))
    given = encoder.condition(None, tuple(prompts), None)
    without = encoder.condition(None, ("",) * len(prompts), None)
    shape = (len(prompts), settings_of(model)["in_channels"], config.data.image_size, config.data.image_size)
    how = {"seed": seed, "guidance": guidance, "num_steps": num_steps}
    return _sample(model, Objective(config.objective), shape, (given, without), **how)


@torch.no_grad()
def _sample(
    model: nn.Module,
    objective: Objective,
    shape: tuple[int, int, int, int],
    conditions: tuple[Condition, Condition],
    *,
    seed: int,
    guidance: float,
    num_steps: int,
) -> torch.Tensor:
    """Images under the first condition, guided away from the second."""
    noise = normal(seed, Stream.SAMPLING, np.arange(shape[0]), tuple(shape[1:]))
    device, parts = next(model.parameters()).device, []
    was_training = model.training
    model.eval()
    try:
        for i, part in zip(range(0, shape[0], _BATCH_SIZE), noise.split(_BATCH_SIZE), strict=True):
            given, without = (condition.rows(i, i + len(part)).to(device) for condition in conditions)
            predict = guided(model, given, without, guidance)
            parts.append(denoise(predict, objective.scheduler(), part.to(device), num_steps).cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts).clamp(-1, 1)


def sample_pipeline(
    model: nn.Module,
    config: TrainerConfig,
    prompts: Sequence[str] | Sequence[int],
    *,
    seed: int = 0,
    guidance: float = 1.0,
    num_steps: int = 50,
) -> torch.Tensor:
    """Images drawn by diffusers' own pipeline, from the model and the frozen parts that it was trained with.

    Image i starts from a generator of (seed, i), for any weights and any number of images.

    Args:
        model: whole; it was trained out of a pretrained pipeline.
        guidance: as the pipeline's own `guidance_scale`: of a guidance-distilled model what it is told.
        prompts: a text or, for a pipeline of classes, a label for each image.

    Returns:
        (N, C, H, W) float32 in [-1, 1], on the CPU.
    """
    folder = config.model.folder()
    assert folder is not None and folder.part is not None
    scheduler = pipeline_scheduler(folder, config.objective)
    pipeline: Any = load_pipeline(config.model, folder, **{folder.part: model.eval(), "scheduler": scheduler})
    pipeline.to(next(model.parameters()).device)
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    options = {name: value for name, value in _call_options(config).items() if name in known and value is not None}
    two_passes = guidance != 1 and "true_cfg_scale" in known and not takes_guidance(model)
    images = []
    for begin in range(0, len(prompts), _PIPELINE_BATCH_SIZE):
        part = list(prompts[begin : begin + _PIPELINE_BATCH_SIZE])
        if two_passes:  # else a Flux that is told no guidance would go without, and say nothing
            options |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(part)}
        seeds = [derive_seed(seed, Stream.SAMPLING, begin + i) for i in range(len(part))]
        images.append(
            pipeline(
                **{"prompt" if "prompt" in known else "class_labels": part},
                generator=[torch.Generator().manual_seed(value) for value in seeds],
                guidance_scale=guidance,
                num_inference_steps=num_steps,
                output_type="np",
                **options,
            ).images
        )
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).float() * 2 - 1  # (N, H, W, C) -> (N, C, H, W)


def _call_options(config: TrainerConfig) -> dict[str, Any]:
    """What any of the pipelines is called with, where it takes that."""
    return {
        "height": config.data.image_size,
        "width": config.data.image_size,
        "max_sequence_length": config.conditioning.max_tokens,
        "use_resolution_binning": False,
        "clean_caption": False,
    }


def draw(model: nn.Module, config: TrainerConfig, wanted: Sequence[Any], **how: Any) -> torch.Tensor:
    """Images of whatever the model was trained to draw.

    Args:
        wanted: for each image its text or label; anything for a model of neither.
        how: seed, guidance and num_steps of `sample_images` and `sample_pipeline`.

    Returns:
        (N, C, H, W) float32 in [-1, 1], on the CPU.
    """
    folder = config.model.folder()
    if folder is not None and folder.has("vae"):
        return sample_pipeline(model, config, wanted, **how)
    if config.conditioning.text_encoder is not None:
        return sample_texts(model, config, wanted, **how)
    labels = None if null_label(model) is None else torch.tensor(wanted)
    shape = (len(wanted), settings_of(model)["in_channels"], config.data.image_size, config.data.image_size)
    return sample_images(model, Objective(config.objective), shape, labels, **how)


def usual_guidance(model: nn.Module, config: TrainerConfig) -> float:
    """The guidance of who asks for none: what diffusers' pipeline of this kind takes, of a network alone 1.5; 1 where
    the model can not be guided."""
    if not can_be_guided(model, config.model, config.objective.label_drop):
        return 1.0
    folder = config.model.folder()
    cls = getattr(diffusers, folder.index.get("_class_name", ""), None) if folder else None
    scale = inspect.signature(cls.__call__).parameters.get("guidance_scale") if cls else None
    return 1.5 if scale is None else float(scale.default)


Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What is predicted of (B, C, H, W) at (B,) timesteps; float32."""


def guided(
    model: nn.Module, given: Condition, without: Condition, guidance: float, dtype: torch.dtype = torch.float32
) -> Predict:
    """The prediction of `model` under the condition `given`, led away from that `without`; 1 is no guidance.

    A guidance-distilled model is told the guidance instead, as diffusers' Flux pipeline does.

    Args:
        dtype: what the model takes.
    """
    if takes_guidance(model):
        given, guidance = replace(given, guidance=guidance), 1.0
    given, without = given.cast(dtype), without.cast(dtype)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        prediction = call_model(model, noisy.to(dtype), timesteps, given).float()
        if guidance == 1:
            return prediction
        other = call_model(model, noisy.to(dtype), timesteps, without).float()
        return other + guidance * (prediction - other)

    return predict


@torch.no_grad()
def denoise(predict: Predict, scheduler: Any, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
    """(B, C, H, W) noise to (B, C, H, W) images or latents, on the same device."""
    scheduler.set_timesteps(num_steps, device=noise.device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scale_input = getattr(scheduler, "scale_model_input", lambda x, _: x)
    for timestep in scheduler.timesteps:
        prediction = predict(scale_input(x, timestep), timestep.expand(len(x)))
        x = scheduler.step(prediction, timestep, x).prev_sample
    return x


def save_grid(images: torch.Tensor, path: str | Path, columns: int) -> None:
    """Write images as one PNG, see `grid_png`.

    Args:
        images: (N, C, H, W) float in [-1, 1], C = 1 or 3.
    """
    Path(path).write_bytes(grid_png(to_pixels(images), columns))


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8, 0 .. 255, of images in [-1, 1]; what lies beyond is clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def grid_png(pixels: torch.Tensor, columns: int) -> bytes:
    """Images as one PNG, row by row, small ones enlarged without smoothing so that their pixels can be seen.

    Args:
        pixels: (N, C, H, W) uint8, C = 1 or 3.
    """
    if pixels.shape[1] not in (1, 3):
        raise ConfigError(f"{pixels.shape[1]} channels can not be drawn; give images of 1 or 3")
    pixels = pixels.expand(-1, 3, -1, -1)  # (N, 3, H, W)
    zoom = max(1, 64 // pixels.shape[-1])
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    gap, (num, _, height, width) = max(1, zoom // 2), pixels.shape
    rows = -(-num // columns)
    grid = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 96, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    file = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
