"""Trained weights in the form that diffusers loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import trainers.pipeline
from trainers.errors import ConfigError
from trainers.models import ModelConfig, build_model, learns_null_label, null_label
from trainers.objectives import Objective, ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class ExportWeights:
    """One set of weights of an export."""

    tensors: Mapping[str, torch.Tensor]
    """Parameter name -> the whole tensor, as in the model's state_dict."""
    description: str
    """What they are, for the model card: "EMA profile main", "raw weights"."""
    variant: str | None = None
    """diffusers' name for an alternative set of weights (`non_ema`); None: the default weights."""


def export_pipeline(
    out_dir: str | Path,
    model_config: ModelConfig,
    objective_config: ObjectiveConfig,
    weights: Sequence[ExportWeights],
    *,
    image_size: int,
    origin: str,
) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads, with any of the `weights` as its variants.

    It loads as diffusers' `DDPMPipeline`, of which the parts (`unet`, also where it is a transformer, and
    `scheduler`) always work, and the call does for unconditional models. `pipeline.py` in the folder also samples
    class-conditional ones. The model card in README.md says which weights are which, and how to load them.

    Args:
        weights: exactly one without variant, the default weights; in any order.
        image_size: pixels a side, written to the model's config if it has none.
        origin: where the weights come from, for the model card: run, step, samples.

    Raises:
        ConfigError: `out_dir` is not empty.
    """
    assert [entry.variant for entry in weights].count(None) == 1, "exactly one set of default weights"
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"OUT_DIR={out_dir} is not an empty folder; remove it, or name another")
    model: Any = build_model(model_config, seed=0)
    if model.config.get("sample_size") is None:
        model.register_to_config(sample_size=image_size)
    for entry in weights:
        model.load_state_dict(dict(entry.tensors))
        model.save_pretrained(out_dir / "unet", variant=entry.variant)
    scheduler: Any = Objective(objective_config).scheduler()
    scheduler.save_pretrained(out_dir / "scheduler")
    index = diffusers.DDPMPipeline(unet=model, scheduler=scheduler)
    index.save_config(out_dir)  # model_index.json
    shutil.copyfile(trainers.pipeline.__file__, out_dir / "pipeline.py")
    (out_dir / "README.md").write_text(_model_card(weights, objective_config, model, origin))


def _model_card(weights: Sequence[ExportWeights], objective: ObjectiveConfig, model: nn.Module, origin: str) -> str:
    rows = [f"| {entry.variant or '(default)'} | {entry.description} |" for entry in weights]
    null, guided = null_label(model), learns_null_label(model, objective.label_drop)
    arguments, kind = "num_images=4", "Unconditional."
    if null is not None:
        arguments = f"labels=[0, {null - guided}], guidance={1.5 if guided else 1}"
        kind = f"Class-conditional: labels 0 to {null - guided}{f'; {null} stands for no label' if guided else ''}."
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "---",
            "# Diffusion model trained with unbroken",
            "",
            f"From {origin}. Objective: {objective.prediction_type}. {kind}",
            "",
            "| variant | weights |",
            "| --- | --- |",
            *rows,
            "",
            "```python",
            "from diffusers import DiffusionPipeline",
            "",
            'folder = "."  # this folder; variant="..." loads other weights than the default',
            "pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)",
            f"images = pipeline({arguments}).images",
            "```",
            "",
            "`trust_remote_code` lets diffusers run the `pipeline.py` of this folder. Without it and without",
            "`custom_pipeline` the folder loads as a plain DDPMPipeline, which can not pass on class labels.",
            "",
        ]
    )
