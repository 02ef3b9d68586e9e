"""What a model is conditioned on, and how models of each family are called with it."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from trainers.errors import ConfigError

_SAMPLE_NAMES = ("sample", "hidden_states")
_TEXT_MODELS = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel")


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """How text becomes what a model takes: by the frozen parts of a pretrained pipeline, or by one text encoder."""

    text_encoder: str | None = None
    """A folder of transformers with a text encoder and its tokenizer, for a model.class_name of text that is trained on
    pixels; null: that of model.pretrained."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of text encoders and VAE. It decides numbers."""
    max_tokens: int | None = None
    """Tokens that a T5 or text_encoder sees of a caption, >= 1; null: as many as its pipeline (SD3 256, Flux 512) or
    tokenizer has it."""
    guidance: float = 1.0
    """What a guidance-distilled model (Flux dev) is told in training that it imitates, >= 0; 1 is usual. When it draws,
    samples.guidance says what it is told."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1; null is the pipeline's own number")
        if self.guidance < 0:
            raise ConfigError(f"guidance={self.guidance} must be at least 0; 1 is usual in training")
        if self.text_encoder is not None and self.guidance != 1:
            raise ConfigError(f"guidance={self.guidance} has no effect with text_encoder; remove it")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What B samples are denoised under; what a model does not take is None."""

    labels: torch.Tensor | None = None
    """(B,) int64."""
    tokens: torch.Tensor | None = None
    """(B, N, D) float: the text, as its encoder sees it."""
    pooled: torch.Tensor | None = None
    """(B, P) float: the text in one vector."""
    mask: torch.Tensor | None = None
    """(B, N) int64: which tokens count; None: all."""
    sizes: torch.Tensor | None = None
    """(B, 6) float32: original height and width, crop top and left, target height and width, in pixels."""
    guidance: float = 1.0
    """The guidance that a guidance-distilled model is told to imitate."""

    def cast(self, dtype: torch.dtype) -> Condition:
        """The embeddings in `dtype`; sizes stay as they are, for bfloat16 has only 8 bits for them."""
        tokens = None if self.tokens is None else self.tokens.to(dtype)
        return replace(self, tokens=tokens, pooled=None if self.pooled is None else self.pooled.to(dtype))

    def rows(self, begin: int, end: int) -> Condition:
        """The condition of the samples `begin : end` alone."""
        parts = {name: value[begin:end] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **parts)

    def to(self, device: torch.device) -> Condition:
        """All of it on `device`."""
        parts = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **parts)


def takes_text(model: nn.Module) -> bool:
    """Whether the model is conditioned on text."""
    return type_name(model) in _TEXT_MODELS


def takes_guidance(model: nn.Module) -> bool:
    """Whether the model is guidance-distilled: told a guidance, it makes in one pass what others need two for."""
    return bool(cast(Any, model).config.get("guidance_embeds"))


def takes_sizes(model: nn.Module) -> bool:
    """Whether the model is told the size and the crop of an image."""
    settings = cast(Any, model).config
    if type_name(model) == "PixArtTransformer2DModel":
        return bool(cast(Any, model).use_additional_conditions)
    return settings.get("addition_embed_type") == "text_time"


def type_name(model: nn.Module) -> str:
    """The name of the model's class as diffusers has it: FSDP puts a class of its own in front."""
    known = (cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("diffusers"))
    return next(known, type(model).__name__)


def call_model(
    model: nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Condition,
    *,
    with_variance: bool = False,
) -> torch.Tensor:
    """The prediction of `model`, however its forward names its arguments.

    A model with twice as many output channels as inputs also predicts a variance (DiT's learned sigma). Sampling does
    without it, so only the first half, the prediction proper, is returned unless the variance is asked for.

    Args:
        noisy: (B, C, H, W) float.
        timesteps: (B,) int64 or float.
        condition: what the model takes beside them; as `FrozenParts.condition` makes it.

    Returns:
        (B, C, H, W); or whatever the model puts out, `with_variance`.
    """
    name = type_name(model)
    if name == "FluxTransformer2DModel":
        return _call_flux(model, noisy, timesteps, condition)
    sample_name, takes_labels = call_convention(type(model))
    arguments: dict[str, Any] = {sample_name: noisy, "timestep": timesteps, "return_dict": False}
    if name in _TEXT_MODELS:
        arguments |= _text_arguments(model, name, condition)
    elif takes_labels:
        arguments["class_labels"] = condition.labels
    prediction = model(**arguments)[0]
    if not with_variance and prediction.shape[1] == 2 * noisy.shape[1]:
        prediction, _ = prediction.chunk(2, dim=1)  # (B, 2C, H, W) -> (B, C, H, W)
    return prediction


def _text_arguments(model: nn.Module, name: str, condition: Condition) -> dict[str, Any]:
    arguments: dict[str, Any] = {"encoder_hidden_states": condition.tokens}
    if name == "SD3Transformer2DModel":
        arguments["pooled_projections"] = condition.pooled
    elif name == "PixArtTransformer2DModel":
        arguments |= {"encoder_attention_mask": condition.mask, "added_cond_kwargs": _pixart_sizes(model, condition)}
    elif takes_sizes(model):
        arguments["added_cond_kwargs"] = {"text_embeds": condition.pooled, "time_ids": condition.sizes}
    return arguments


def _pixart_sizes(model: nn.Module, condition: Condition) -> dict[str, torch.Tensor | None]:
    """PixArt-alpha's resolution and aspect ratio (Chen et al., 2023, section 2.3), where the model takes them."""
    if not takes_sizes(model):
        return {"resolution": None, "aspect_ratio": None}
    assert condition.sizes is not None
    target = condition.sizes[:, 4:]
    return {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}


def _call_flux(model: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Flux sees patches of 2 x 2 latents as one token each, beside the tokens of the text. (B, C, H, W) -> the same."""
    batch, channels, height, width = noisy.shape
    patches = noisy.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    places = torch.zeros(height // 2, width // 2, 3, device=noisy.device)
    places[..., 1] = torch.arange(height // 2, device=noisy.device)[:, None]
    places[..., 2] = torch.arange(width // 2, device=noisy.device)
    assert condition.tokens is not None
    prediction = model(
        hidden_states=patches.reshape(batch, -1, channels * 4),  # (B, HW/4, 4C)
        encoder_hidden_states=condition.tokens,
        pooled_projections=condition.pooled,
        timestep=timesteps / 1000,  # the model takes 0 .. 1 and multiplies by 1000 itself
        guidance=torch.full((batch,), condition.guidance, device=noisy.device) if takes_guidance(model) else None,
        img_ids=places.view(-1, 3),
        txt_ids=torch.zeros(condition.tokens.shape[1], 3, device=noisy.device),
        return_dict=False,
    )[0]
    patches = prediction.view(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


@functools.cache
def call_convention(cls: type[nn.Module]) -> tuple[str, bool]:
    """The name of the image argument, and whether labels are taken."""
    parameters = inspect.signature(cls.forward).parameters
    name = cls.__name__
    sample_name = next((key for key in _SAMPLE_NAMES if key in parameters), None)
    if sample_name is None or "timestep" not in parameters or "return_dict" not in parameters:
        raise ConfigError(f"model.class_name={name} does not denoise images: its forward takes {', '.join(parameters)}")
    denoiser = next((base.__name__ for base in cls.__mro__ if base.__name__ in _TEXT_MODELS), None)
    if denoiser is not None:
        return sample_name, False
    if "encoder_hidden_states" in parameters:
        raise ConfigError(
            f"model.class_name={name} takes text in a way that is not known here; of the models of text, these can be"
            f" trained: {', '.join(_TEXT_MODELS)}"
        )
    handled = {"self", sample_name, "timestep", "class_labels"}
    missing = [
        key
        for key, parameter in parameters.items()
        if key not in handled
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing:
        raise ConfigError(f"model.class_name={name} needs inputs that the data does not have: {', '.join(missing)}")
    return sample_name, "class_labels" in parameters
