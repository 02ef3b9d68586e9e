"""The published pipelines that recipes name, as folders without weights: settings only, a few kilobytes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
_DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
_UNET = {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
_CLIP = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
_CLIP_2 = {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
_T5 = {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5TokenizerFast"}

_Architecture = tuple[str, str, str, dict[str, Any], dict[str, str], dict[str, Any], dict[str, Any]]

ARCHITECTURES: dict[str, _Architecture] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        "unet",
        "UNet2DConditionModel",
        {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        _CLIP,
        _VAE,
        _DDIM,
    ),
    "stabilityai/stable-diffusion-2-base": (
        "StableDiffusionPipeline",
        "unet",
        "UNet2DConditionModel",
        {
            **_UNET,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        _CLIP,
        _VAE,
        _DDIM,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        "unet",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {**_CLIP, **_CLIP_2},
        _VAE,
        {**_DDIM, "_class_name": "EulerDiscreteScheduler"},
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        "StableDiffusion3Pipeline",
        "transformer",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {**_CLIP, **_CLIP_2, **_T5},
        {**_VAE, "latent_channels": 16},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        "transformer",
        "FluxTransformer2DModel",
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        },
        {**_CLIP, "text_encoder_2": "T5EncoderModel", "tokenizer_2": "T5TokenizerFast"},
        {**_VAE, "latent_channels": 16},
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
        },
    ),
    "facebook/DiT-XL-2-256": (
        "DiTPipeline",
        "transformer",
        "DiTTransformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_embeds_ada_norm": 1000,
        },
        {},
        _VAE,
        {**_DDIM, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    ),
}
"""Hub name -> pipeline, sub-folder, class and arguments of the network, text parts, VAE, scheduler."""


def write_architecture(folder: Path, name: str) -> Path:
    """The pipeline folder `name` without weights, in `folder`."""
    pipeline, part, network, args, text, vae, scheduler = ARCHITECTURES[name]
    index = {
        "_class_name": pipeline,
        part: ["diffusers", network],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **{key: ["transformers", value] for key, value in text.items()},
    }
    files = {
        "model_index.json": index,
        f"{part}/config.json": {"_class_name": network, **args},
        "vae/config.json": {"_class_name": "AutoencoderKL", **vae},
        "scheduler/scheduler_config.json": scheduler,
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    return folder
