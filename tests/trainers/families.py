"""Every family of models that people train, tiny: how it is trained out of a pipeline, and drawn from by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.trainers.pipelines import _HIDDEN, _UNET, FAMILIES, write_pipeline, write_text_encoder
from tests.trainers.tiny import UNET, build_tiny, tiny_config
from trainers.rng import Stream, derive_seed, normal
from trainers.state import fingerprints
from trainers.step import train_step

STEPS = 3
PROMPTS = ["a handwritten three", "a handwritten seven"]
LABELS = [3, 7]


def family_config(folder: Path, family: str, **model: Any) -> dict[str, Any]:
    """Trains a pipeline of `family` on captioned digits (DiT: on their labels)."""
    objective: dict[str, Any] = {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "weighting": "none"}
    if family in ("sd3", "flux"):
        objective = {"prediction_type": "flow", "weighting": "none", "shift": 3.0 if family == "sd3" else 1.0}
    if family == "sd2_v":
        objective["prediction_type"] = "v_prediction"
    return tiny_config(
        {"pretrained": str(folder), **model},
        data={"captions": family != "dit"},
        objective={**objective, "label_drop": 0.0 if family == "dit" else 0.25},
        train={"num_steps": STEPS, "global_batch_size": 6, "microbatch_size": 2},
        ema={"main": {"decay": 0.5}},
        conditioning={} if family in ("dit", "sd15", "sd2_v", "sdxl") else {"max_tokens": 8},
    )


def all_families(folder: Path) -> dict[str, dict[str, Any]]:
    """A configuration for each family, one of adapters, and two of models of pixels; the pipelines lie in `folder`."""
    pipelines = {name: write_pipeline(folder / name, name) for name in FAMILIES}
    found = {name: family_config(path, name) for name, path in pipelines.items()}
    found["lora"] = family_config(pipelines["sdxl"], "sdxl", lora={"rank": 2, "alpha": 4})
    pixels = {**UNET, "args": {**UNET["args"], "num_class_embeds": None}}
    found["pixels"] = {**family_config(folder, "dit"), "model": pixels}
    found["text"] = text_config(write_text_encoder(folder / "text"))
    return found


def text_config(encoder: Path) -> dict[str, Any]:
    """Trains a model of pixels on captioned digits, with a text encoder of its own."""
    args = {**_UNET, "sample_size": 8, "in_channels": 1, "out_channels": 1, "cross_attention_dim": _HIDDEN}
    return {
        **family_config(encoder, "sd15"),
        "model": {"class_name": "UNet2DConditionModel", "args": {k: _plain(v) for k, v in args.items()}},
        "conditioning": {"text_encoder": str(encoder), "max_tokens": 8},
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def train_families(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each configuration: fingerprints, frozen hashes, and losses of the whole training. Collective."""
    found = {}
    for name, config in configs.items():
        state, task = build_tiny(config)
        losses = [train_step(state, task)["loss"] for _ in range(STEPS)]
        state.generators.capture()
        found[name] = (fingerprints(state), dict(state.frozen), losses)
    return found


def draw_elsewhere(folders: dict[str, str], pipe: Any) -> None:
    """In another process: what diffusers alone makes of each export, or of a pipeline and its adapters."""
    torch.set_num_threads(1)
    images = {}
    for name, folder in folders.items():
        base, _, adapters = folder.partition("+")
        own = {"custom_pipeline": base, "trust_remote_code": True} if name in ("pixels", "text") else {}
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(base, **own)
        if adapters:
            pipeline.load_lora_weights(adapters, weight_name="pytorch_lora_weights.safetensors")
        pipeline.set_progress_bar_config(disable=True)
        images[name] = pipeline(**call(name), output_type="np").images
    pipe.send(images)


def call(family: str) -> dict[str, Any]:
    """The arguments with which a pipeline starts from the noise of our own sampling with seed 0."""
    if family in ("pixels", "text"):
        noise = normal(0, Stream.SAMPLING, torch.arange(2).numpy(), (1, 8, 8))
        what = {"labels": PROMPTS, "guidance": 1.5} if family == "text" else {}
        return {"noise": noise, "num_inference_steps": 2, **what}
    seeds = [derive_seed(0, Stream.SAMPLING, i) for i in range(2)]
    common = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], "num_inference_steps": 2}
    if family == "dit":
        return {**common, "class_labels": LABELS, "guidance_scale": 1.0}
    options = {"sd3": {"max_sequence_length": 8}, "flux": {"max_sequence_length": 8}}.get(family, {})
    if family == "pixart":
        options = {"max_sequence_length": 8, "use_resolution_binning": False, "clean_caption": False}
    return {**common, **options, "prompt": PROMPTS, "height": 8, "width": 8, "guidance_scale": 1.5}
