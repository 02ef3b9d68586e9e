"""Whether a model can be trained on the data that a configuration gives it."""

from __future__ import annotations

import diffusers
import torch
from torch import nn

from trainers.conditioning import Condition, ConditioningConfig, takes_guidance, takes_sizes, takes_text, type_name
from trainers.config import TrainerConfig
from trainers.data.latents import EMPTY
from trainers.data.samples import LatentFacts, Source
from trainers.errors import ConfigError
from trainers.evaluation.config import check_metrics, check_samples
from trainers.evaluation.split import split
from trainers.frozen import check_schedule, latent_shape
from trainers.models import can_be_guided, learns_null_label, null_label, num_classes_of, settings_of
from trainers.pretrained import PretrainedFolder
from trainers.text_encoder import encoder_facts


def check_fits(model: nn.Module, source: Source, config: TrainerConfig) -> tuple[int, int, int] | None:
    """Check that `model` can be trained on the images, labels and captions of `source`.

    Returns:
        (c, h, w) of the latents that `model` denoises; None if it denoises the images themselves.

    Raises:
        ConfigError: it can't; the message names the argument to change.
    """
    folder, image_size = config.model.folder(), config.data.image_size
    made, encoded = source.latents, folder is not None and folder.has("tokenizer")
    if config.conditioning.text_encoder is not None:
        _check_text_encoder(model, folder, config.conditioning)
        encoded = True
    shape = latent_shape(folder, source.channels if made is None else None, image_size)
    if made is not None:
        _check_made(made, shape, config)
        if takes_sizes(model) and not made.has_sizes:
            raise ConfigError(
                f"data.path={config.data.path} has no sizes, and a {type_name(model)} is told the size and the crop of"
                " every image; add a tensor sizes, or make the latents by `unbroken data prepare`"
            )
        encoded = encoded or made.has_text
    elif source.buckets is not None and shape is not None:
        _check_buckets(source.buckets.shapes, image_size // shape[1])
    if folder is not None and not config.model.from_scratch:
        check_schedule(folder, config.objective)
    if folder is not None and config.model.lora is not None:
        _check_adapters(folder)
    _check_channels(model, shape or data_shape(source, config), config)
    _check_captions(model, source, encoded)
    _check_conditioning(model, folder, config.conditioning)
    _check_labels(model, source.num_classes, config.objective.label_drop)
    guided = can_be_guided(model, config.model, config.objective.label_drop)
    check_samples(config.samples, model, source, guided)
    _, held_out = split(config.validation, config.seed, len(source))
    if config.validation.metrics is not None and held_out is not None:
        check_metrics(config.validation.metrics, model, source, len(held_out), guided)
    if source.buckets is not None and config.validation.holds_out:
        raise ConfigError(
            "validation holds samples out, which can not be cut into microbatches of one shape; remove data.buckets or"
            " the section validation"
        )
    return shape if made is None else None


def data_shape(source: Source, config: TrainerConfig) -> tuple[int, int, int]:
    """(C, H, W) of what `source` holds, square."""
    size = config.data.image_size
    return source.latents.shape if source.latents is not None else (source.channels, size, size)


def _check_made(made: LatentFacts, expected: tuple[int, int, int] | None, config: TrainerConfig) -> None:
    size = config.data.image_size
    if made.image_size is not None and made.image_size != size:
        raise ConfigError(
            f"data.image_size={size}, but the latents were made of images of {made.image_size};"
            f" set data.image_size={made.image_size}"
        )
    if expected is not None and made.shape != expected:
        raise ConfigError(
            f"data.path={config.data.path} holds latents of {made.shape}, but the VAE of model.pretrained makes"
            f" {expected} of images of data.image_size={size}; set the size that they were made at"
        )
    if expected is None and made.shape[1:] != (size, size):
        raise ConfigError(
            f"data.image_size={size} differs from the latents, {made.shape}; set data.image_size={made.shape[1]}"
        )
    if config.objective.label_drop > 0 and made.has_text and made.empty is None:
        raise ConfigError(
            f"objective.label_drop={config.objective.label_drop} needs {config.data.path}/{EMPTY}, how the text"
            " encoders see an empty caption; add it, or set objective.label_drop=0"
        )


def _check_buckets(shapes: tuple[tuple[int, int], ...], factor: int) -> None:
    odd = [shape for shape in shapes if shape[0] % factor or shape[1] % factor]
    if odd:
        raise ConfigError(
            f"data.buckets makes images of {odd[0][0]} x {odd[0][1]}, which the VAE can not make {factor} times"
            f" smaller; set data.buckets.multiple_of to a multiple of {factor}"
        )


def _check_adapters(folder: PretrainedFolder) -> None:
    pipeline = folder.index.get("_class_name", "")
    if not hasattr(getattr(diffusers, pipeline, None), "save_lora_weights"):
        raise ConfigError(
            f"model.lora: {f'a {pipeline}' if pipeline else 'a network without a pipeline'} cannot load adapters,"
            " so they would be of no use; remove model.lora"
        )


def _check_channels(model: nn.Module, shape: tuple[int, int, int], config: TrainerConfig) -> None:
    settings = settings_of(model)
    patch = 4 if type_name(model) == "FluxTransformer2DModel" else 1  # it takes 2 x 2 latents as one token
    in_channels = settings.get("in_channels")
    if in_channels is not None and in_channels != shape[0] * patch:
        raise ConfigError(
            f"model.args.in_channels={in_channels} does not fit the data's {shape[0]} channels;"
            f" set model.args.in_channels={shape[0] * patch} (and out_channels)"
        )
    sample_size = settings.get("sample_size")
    # Out of a pretrained folder it is the size that the folder was made for; what the model takes is tried instead.
    fixed = config.model.pretrained is None
    if fixed and sample_size is not None and sample_size not in (shape[1], list(shape[1:]), shape[1:]):
        raise ConfigError(
            f"model.args.sample_size={sample_size} differs from data.image_size={shape[1]}; set both to one value"
        )


def _check_captions(model: nn.Module, source: Source, encoded: bool) -> None:
    text = takes_text(model)
    if text and not encoded:
        raise ConfigError(
            f"a {type_name(model)} needs text encoders, and there are none; set model.pretrained to a pipeline folder"
            " that has them (model.from_scratch=true to begin at random weights), or conditioning.text_encoder"
        )
    if source.latents is not None:
        if text and not source.latents.has_text:
            raise ConfigError(
                "the latents have no tokens, but the model is conditioned on text; prepare them with data.captions=true"
            )
        return
    if text and not source.has_captions:
        raise ConfigError("data.captions=false, but the model is conditioned on text; set data.captions=true")
    if source.has_captions and not text:
        raise ConfigError("data.captions=true has no effect on a model without text; set it to false")


def _check_conditioning(model: nn.Module, folder: PretrainedFolder | None, config: ConditioningConfig) -> None:
    """Nothing that was set may have no effect."""
    classes = [entry[1] for entry in folder.index.values() if isinstance(entry, list)] if folder and folder.part else []
    if config.guidance != 1 and not takes_guidance(model):
        raise ConfigError(
            f"conditioning.guidance={config.guidance:g} has no effect on a {type_name(model)}, which is told none;"
            " remove it: samples.guidance is what images are drawn with"
        )
    if config.text_encoder is not None:
        return
    if config.max_tokens is not None and "T5EncoderModel" not in classes:
        raise ConfigError(f"conditioning.max_tokens={config.max_tokens} has no effect without a T5; remove it")
    if config.precision != "fp32" and not classes:
        raise ConfigError(
            f"conditioning.precision={config.precision} has no effect without a pipeline as model.pretrained, or"
            " conditioning.text_encoder; remove it"
        )


def _check_text_encoder(model: nn.Module, folder: PretrainedFolder | None, config: ConditioningConfig) -> None:
    where, settings = f"conditioning.text_encoder={config.text_encoder}", settings_of(model)
    if folder is not None and (folder.has("tokenizer") or folder.has("vae")):
        raise ConfigError(f"{where} does not go with the frozen parts of model.pretrained={folder.root}; remove one")
    if type_name(model) != "UNet2DConditionModel" or settings["addition_embed_type"] is not None:
        raise ConfigError(
            f"{where} makes tokens alone, and a {type_name(model)} takes other things; use a UNet2DConditionModel"
            " without addition_embed_type, or a pipeline as model.pretrained"
        )
    width, _ = encoder_facts(config)
    taken = settings["cross_attention_dim"]
    if any(part != width for part in (taken if isinstance(taken, list | tuple) else [taken])):
        raise ConfigError(f"model.args.cross_attention_dim={taken}, but {where} makes tokens of {width}; set {width}")


def _check_labels(model: nn.Module, num_classes: int | None, label_drop: float) -> None:
    settings, null = settings_of(model), null_label(model)
    if null is None:
        if label_drop > 0 and not takes_text(model):
            raise ConfigError(
                f"objective.label_drop={label_drop} needs a model with classes; set it to 0, or give the model classes"
            )
        return
    if num_classes is None:
        raise ConfigError("data has no labels, but the model wants classes; sort the images into one folder a class")
    key = "num_class_embeds" if settings.get("num_embeds_ada_norm") is None else "num_embeds_ada_norm"
    missing = num_classes - num_classes_of(model, label_drop)
    if missing > 0:
        null_too = " and the null label" if learns_null_label(model, label_drop) else ""
        raise ConfigError(
            f"model.args.{key}={settings[key]} is too small for {num_classes} classes{null_too};"
            f" set it to {settings[key] + missing}"
        )


def blank_condition(model: nn.Module, batch: int, num_tokens: int, device: torch.device) -> Condition:
    """A condition of the shapes that `model` takes, all zeros: to find out what it makes of them."""
    settings = settings_of(model)
    if not takes_text(model):
        labels = None if null_label(model) is None else torch.zeros(batch, dtype=torch.long, device=device)
        return Condition(labels=labels)
    name = type_name(model)
    if name == "UNet2DConditionModel":
        width, pooled = settings["cross_attention_dim"], None
        width = width if isinstance(width, int) else width[0]
        if settings.get("addition_embed_type") == "text_time":
            pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
    elif name == "PixArtTransformer2DModel":
        width, pooled = settings["caption_channels"], None
    else:
        width, pooled = settings["joint_attention_dim"], settings["pooled_projection_dim"]
    return Condition(
        tokens=torch.zeros(batch, num_tokens, width, device=device),
        pooled=None if pooled is None else torch.zeros(batch, pooled, device=device),
        mask=torch.ones(batch, num_tokens, dtype=torch.long, device=device),
        sizes=torch.zeros(batch, 6, device=device),
    )
