"""Pipeline folders of every family in diffusers form, tiny and with random weights: nothing is downloaded."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

_WORDS = ("a", "handwritten", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_HIDDEN = 16
_UNET = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

FAMILIES = ("sd15", "sd2_v", "sdxl", "sd3", "flux", "pixart", "dit")


def write_pipeline(folder: Path, family: str, *, seed: int = 0) -> Path:
    """A whole pipeline of `family` for grey images of 8 x 8 pixels, latents of 4 x 4."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as vocabularies:
        pipeline = _BUILDERS[family](Path(vocabularies))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            _spread(part)
    pipeline.save_pretrained(folder)
    return folder


def _spread(module: torch.nn.Module) -> None:
    """Weights large enough that every part matters: fresh ones are zero at the gates and nearly so elsewhere."""
    for parameter in module.parameters():
        if parameter.ndim > 1 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def _vae(channels: int = 4) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
        scaling_factor=0.5,
        shift_factor=0.1,
        mid_block_add_attention=False,
    )


def write_text_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A BERT that makes tokens of 16 numbers, and its tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=16)
    torch.manual_seed(seed)
    sizes = {"hidden_size": _HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=12, **sizes)
    encoder: Any = transformers.BertModel(config)
    _spread(encoder)
    for part in (tokenizer, encoder):
        part.save_pretrained(folder)
    return folder


def _clip_tokenizer(folder: Path) -> Any:
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    merges, vocabulary = [], list(letters)
    for word in _WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            if (pair := f"{pieces[0]} {pieces[1]}") not in merges:
                merges.append(pair)
                vocabulary.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def _clip(tokenizer: Any, projected: bool) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=16,
        projection_dim=_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def _t5() -> tuple[Any, Any]:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in _WORDS), *string.ascii_lowercase]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=_HIDDEN,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=False,
    )
    return tokenizer, transformers.T5EncoderModel(config)


def _stable_diffusion(folder: Path, **unet: Any) -> Any:
    tokenizer = _clip_tokenizer(folder)
    prediction = "v_prediction" if unet else "epsilon"
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        tokenizer=tokenizer,
        text_encoder=_clip(tokenizer, projected=False),
        unet=diffusers.UNet2DConditionModel(**{**_UNET, "cross_attention_dim": _HIDDEN, **unet}),
        scheduler=_ddim(prediction),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def _sd2_v(folder: Path) -> Any:
    return _stable_diffusion(folder, attention_head_dim=(2, 4), use_linear_projection=True)


def _ddim(prediction: str = "epsilon") -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def _sdxl(folder: Path) -> Any:
    tokenizer = _clip_tokenizer(folder)
    unet = diffusers.UNet2DConditionModel(
        **{**_UNET, "cross_attention_dim": 2 * _HIDDEN},
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=_HIDDEN + 6 * 4,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=_clip(tokenizer, projected=False),
        text_encoder_2=_clip(tokenizer, projected=True),
        unet=unet,
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _sd3(folder: Path) -> Any:
    tokenizer = _clip_tokenizer(folder)
    tokenizer_3, encoder_3 = _t5()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * _HIDDEN,
        caption_projection_dim=16,
        pooled_projection_dim=2 * _HIDDEN,
        pos_embed_max_size=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        text_encoder=_clip(tokenizer, projected=True),
        text_encoder_2=_clip(tokenizer, projected=True),
        text_encoder_3=transformers.T5EncoderModel(
            transformers.T5Config(**{**encoder_3.config.to_dict(), "d_model": 2 * _HIDDEN})
        ),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(folder: Path) -> Any:
    tokenizer = _clip_tokenizer(folder)
    tokenizer_2, encoder_2 = _t5()
    return diffusers.FluxPipeline(
        vae=_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=_clip(tokenizer, projected=False),
        text_encoder_2=encoder_2,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=_HIDDEN,
            pooled_projection_dim=_HIDDEN,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _pixart(folder: Path) -> Any:
    tokenizer, encoder = _t5()
    return diffusers.PixArtAlphaPipeline(
        vae=_vae(),
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=4,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=_HIDDEN,
            use_additional_conditions=False,
        ),
        scheduler=_ddim(),
    )


def _dit(folder: Path) -> Any:
    return diffusers.DiTPipeline(
        vae=_vae(),
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_embeds_ada_norm=10,
        ),
        scheduler=_ddim(),
    )


_BUILDERS = {
    "sd15": _stable_diffusion,
    "sd2_v": _sd2_v,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart": _pixart,
    "dit": _dit,
}
