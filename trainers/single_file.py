"""A whole pipeline in one file of the layout that the original code of its model has: ComfyUI and others load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from trainers.config import TrainerConfig
from trainers.errors import ConfigError
from trainers.export import ExportWeights, facts
from trainers.frozen import load_pipeline
from trainers.models import build_model
from trainers.original_names import PIPELINES, to_original
from trainers.pretrained import open_pretrained

_WITH_AVERAGE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def export_single_file(
    file: Path,
    config: TrainerConfig,
    weights: ExportWeights,
    *,
    origin: str,
    average: ExportWeights | None = None,
) -> None:
    """Write network, VAE and text encoders into `file`, and what they are into its metadata.

    Args:
        weights: the network's, which everybody takes who loads the file.
        origin: where the weights come from: run, step, samples.
        average: further weights beside them, as `model_ema`, in the way of the original "full" files; for UNets.

    Raises:
        ConfigError: the original layout has no place for this model; or the file exists.
    """
    folder = config.model.folder()
    kind = folder.index.get("_class_name") if folder else None
    if folder is None or folder.part is None or kind not in PIPELINES or config.model.lora is not None:
        what = "adapters" if config.model.lora else f"a {kind or 'model without a pipeline'}"
        raise ConfigError(
            f"the original layout has no form for {what}; it has one for {', '.join(PIPELINES)}."
            " Export a folder instead: OUT without .safetensors"
        )
    if average is not None and kind not in _WITH_AVERAGE:
        raise ConfigError(f"a file of {kind} has no place for a second set of weights; give --weights ema or raw")
    if file.exists():
        raise ConfigError(f"{file} exists; remove it, or name another")
    parts: dict[str, Any] = load_pipeline(config.model, folder, "fp32", **{folder.part: None}).components
    whole = build_model(config.model, config.seed).state_dict()
    found = to_original(kind, folder.part, {**whole, **weights.tensors})
    if average is not None:
        found |= _flattened(to_original(kind, folder.part, {**whole, **average.tensors}))
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            found |= to_original(kind, name, part.state_dict(), getattr(part, "config", None))
    said = {"origin": origin, "pipeline": kind, "weights": facts(weights)}
    if average is not None:
        said["model_ema"] = facts(average)
    dtype = torch.float16 if weights.half else None
    save_file(
        {name: tensor.to(dtype).contiguous() if dtype else tensor.contiguous() for name, tensor in found.items()},
        file,
        metadata={"format": "pt", "unbroken": json.dumps(said)},
    )


def _flattened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the original code keeps its average: under `model_ema`, the name without `model` and dots."""
    return {f"model_ema.{name.removeprefix('model.').replace('.', '')}": value for name, value in tensors.items()}


def unpack_single_file(file: Path, like: str, out_dir: Path) -> None:
    """Make a pipeline folder, for `model.pretrained`, out of a file of the original layout.

    Args:
        like: a pipeline of the same kind, as a folder or the name of a repository: settings and tokenizers are its.

    Raises:
        ConfigError: the file is not of that kind; or `out_dir` is not empty.
    """
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"OUT_DIR={out_dir} is not an empty folder; remove it, or name another")
    folder = open_pretrained(like)
    kind = folder.index.get("_class_name")
    if kind not in PIPELINES:
        raise ConfigError(f"--like {like} is a {kind or 'network alone'}; give one of {', '.join(PIPELINES)}")
    cls: Any = getattr(diffusers, kind)
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = cls.from_single_file(str(file), config=str(folder.root), local_files_only=True)
    except Exception as error:  # whatever the converter meets in a file of another kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{file} cannot be read as a {kind}: {reason}; give a --like of the file's kind") from error
    pipeline.save_pretrained(out_dir)
