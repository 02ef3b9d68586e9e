"""Models by their diffusers class name: how they are built, called, and cut into FSDP units."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import diffusers
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainers.errors import ConfigError
from trainers.rng import Stream, derive_seed

_SAMPLE_NAMES = ("sample", "hidden_states")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network is trained."""

    class_name: str
    """A diffusers ModelMixin by name: UNet2DModel, DiTTransformer2DModel, ..."""
    args: dict[str, Any] = field(default_factory=dict)
    """The arguments of that class."""


def model_class(config: ModelConfig) -> type[diffusers.ModelMixin]:
    """The class of `config`, after checking all that can be checked without building it.

    Raises:
        ConfigError: not a model, not callable as a denoiser of images, or an argument that the class does not have.
    """
    name = config.class_name
    cls = getattr(diffusers, name, None)
    if cls is None:
        near = [match for match in difflib.get_close_matches(name, dir(diffusers), n=8) if _is_model(match)]
        hint = f"did you mean {' or '.join(near[:3])}?" if near else "give a model class of diffusers, e.g. UNet2DModel"
        raise ConfigError(f"model.class_name={name} is not a class of diffusers {diffusers.__version__}; {hint}")
    if not _is_model(name):
        raise ConfigError(f"model.class_name={name} is not a model; give a ModelMixin of diffusers, e.g. UNet2DModel")
    _call_convention(cls)
    known = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    for key, value in config.args.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known arguments: {', '.join(known)}"
            raise ConfigError(f"model.args.{key}={value!r} is not an argument of {name}; {hint}")
    return cls


def build_model(config: ModelConfig, seed: int) -> nn.Module:
    """A freshly initialised float32 model on the CPU; its weights follow from `seed` alone.

    Raises:
        ConfigError: see `model_class`; or the class refuses its arguments; or the model keeps running statistics.
    """
    cls = model_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.MODEL_INIT))
        try:
            model = cls(**config.args)
        except Exception as error:  # whatever the class raises, the cause is what the user wrote
            args = ", ".join(f"{key}={value!r}" for key, value in config.args.items())
            raise ConfigError(
                f"model.args={{{args}}} is refused by {config.class_name}: {type(error).__name__}: {error};"
                " correct the arguments"
            ) from error
    for name, module in model.named_modules():
        # They are averaged per rank from the microbatches it happened to run, so they depend on the world size.
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise ConfigError(
                f"model.class_name={config.class_name} keeps running statistics in {name} ({type(module).__name__}),"
                " which depend on the number of workers; choose a model with group, layer or RMS norm"
            )
    return model


def call_model(
    model: nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    with_variance: bool = False,
) -> torch.Tensor:
    """The prediction of `model`, however its forward names its arguments.

    A model with twice as many output channels as inputs also predicts a variance (DiT's learned sigma). Sampling does
    without it, so only the first half, the prediction proper, is returned unless the variance is asked for.

    Args:
        noisy: (B, C, H, W) float.
        timesteps: (B,) int64 or float.
        labels: (B,) int64, for class-conditional models only, else None.

    Returns:
        (B, C, H, W); or whatever the model puts out, `with_variance`.
    """
    sample_name, takes_labels = _call_convention(type(model))
    arguments: dict[str, Any] = {sample_name: noisy, "timestep": timesteps, "return_dict": False}
    if takes_labels:
        arguments["class_labels"] = labels
    prediction = model(**arguments)[0]
    if not with_variance and prediction.shape[1] == 2 * noisy.shape[1]:
        prediction, _ = prediction.chunk(2, dim=1)  # (B, 2C, H, W) -> (B, C, H, W)
    return prediction


def null_label(model: nn.Module) -> int | None:
    """The label that stands for "no label", or None for a model without classes.

    It is the last row of the label embedding: of the `num_class_embeds` rows of a UNet2DModel (give one more than
    there are classes), and the extra row that DiT appends to its `num_embeds_ada_norm` classes. DiT moreover drops
    labels by itself in training mode, at its own fixed rate of 0.1.
    """
    config = _settings(model)
    if config.get("num_embeds_ada_norm") is not None:
        return config["num_embeds_ada_norm"]
    if config.get("num_class_embeds") is not None:
        return config["num_class_embeds"] - 1
    return None


def learns_null_label(model: nn.Module, label_drop: float) -> bool:
    """Whether training shows the model its null label, so that it can be guided (and no class may have that number)."""
    return null_label(model) is not None and (label_drop > 0 or _settings(model).get("num_embeds_ada_norm") is not None)


def check_fits(model: nn.Module, *, channels: int, image_size: int, num_classes: int | None, label_drop: float) -> None:
    """Check that `model` can be trained on images of this kind and with dropped labels.

    Raises:
        ConfigError: it can't; the message names the argument to change.
    """
    settings = _settings(model)
    in_channels = settings.get("in_channels")
    if in_channels is not None and in_channels != channels:
        raise ConfigError(
            f"model.args.in_channels={in_channels} does not fit the data's {channels} channels;"
            f" set model.args.in_channels={channels} (and out_channels)"
        )
    sample_size = settings.get("sample_size")
    if sample_size is not None and sample_size not in (image_size, [image_size] * 2, (image_size,) * 2):
        raise ConfigError(
            f"model.args.sample_size={sample_size} differs from data.image_size={image_size}; set both to one value"
        )
    null = null_label(model)
    if null is None:
        if label_drop > 0:
            raise ConfigError(
                f"objective.label_drop={label_drop} needs a model with classes; set it to 0, or give the model classes"
            )
        return
    if num_classes is None:
        raise ConfigError("data has no labels, but the model wants classes; sort the images into one folder a class")
    key = "num_class_embeds" if settings.get("num_embeds_ada_norm") is None else "num_embeds_ada_norm"
    needs_null = learns_null_label(model, label_drop)
    missing = num_classes + needs_null - (null + 1)
    if missing > 0:
        raise ConfigError(
            f"model.args.{key}={settings[key]} is too small for {num_classes} classes"
            f"{' and the null label' if needs_null else ''}; set it to {settings[key] + missing}"
        )


def sharding_units(model: nn.Module) -> list[list[nn.Module]]:
    """The modules that FSDP shards together, in the order in which `fully_shard` must see them; the root comes last.

    A unit is a block: an element of a ModuleList that hangs on the model, or a child that itself holds a ModuleList
    (a UNet's mid_block). What is small and single (time embedding, first and last convolution) stays with the root.
    """
    units = [[emb] for emb in _called_from_outside(model)]
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            units += [[block] for block in _blocks(child)]
        elif any(isinstance(module, nn.ModuleList) for module in child.modules()):
            units.append([child])
    # A weight tied between two units would silently come apart; those blocks stay with the root.
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [unit for unit in units if (own := list(unit[0].parameters())) and all(uses[id(p)] == 1 for p in own)]


def _blocks(container: nn.ModuleList) -> list[nn.Module]:
    """The blocks of a list; lists in lists are opened, single layers are left to the root."""
    blocks: list[nn.Module] = []
    for element in container:
        if isinstance(element, nn.ModuleList):
            blocks += _blocks(element)
        elif any(True for _ in element.children()):
            blocks.append(element)
    return blocks


def _called_from_outside(model: nn.Module) -> list[nn.Module]:
    """Parts of a block that the root calls directly, past the hook of the block that would gather their weights.

    DiTTransformer2DModel and Transformer2DModel call `transformer_blocks[0].norm1.emb` from their own forward; as a
    unit of its own, applied before its block, it has its own hook.
    """
    blocks = getattr(model, "transformer_blocks", None)
    emb = getattr(getattr(blocks[0], "norm1", None), "emb", None) if blocks else None
    return [emb] if isinstance(emb, nn.Module) else []


def _settings(model: nn.Module) -> Mapping[str, Any]:
    """The arguments of `model`, with its class's defaults filled in."""
    return cast("Any", model).config


def _is_model(name: str) -> bool:
    cls = getattr(diffusers, name, None)
    return inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)


@functools.cache
def _call_convention(cls: type[nn.Module]) -> tuple[str, bool]:
    """The name of the image argument, and whether labels are taken."""
    parameters = inspect.signature(cls.forward).parameters
    name = cls.__name__
    sample_name = next((key for key in _SAMPLE_NAMES if key in parameters), None)
    if sample_name is None or "timestep" not in parameters or "return_dict" not in parameters:
        raise ConfigError(f"model.class_name={name} does not denoise images: its forward takes {', '.join(parameters)}")
    if "encoder_hidden_states" in parameters:
        raise ConfigError(
            f"model.class_name={name} needs text embeddings, which can not be trained on yet;"
            " choose an unconditional or class-conditional model, e.g. UNet2DModel or DiTTransformer2DModel"
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
