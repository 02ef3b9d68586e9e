"""Trained weights in the form that diffusers loads."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch

import trainers.pipeline
from trainers.conditioning import takes_text
from trainers.config import TrainerConfig
from trainers.errors import ConfigError
from trainers.fingerprint import partial_fingerprint
from trainers.frozen import pipeline_scheduler
from trainers.models import build_model, empty_model, learns_null_label, null_label, num_classes_of
from trainers.objectives import Objective
from trainers.pretrained import PretrainedFolder
from trainers.sampling import usual_guidance
from trainers.shards import TensorSpec
from trainers.state import SAFETENSORS_DTYPES, combined_fingerprint
from trainers.text_encoder import open_text_encoder


@dataclass(frozen=True, kw_only=True)
class ExportWeights:
    """One set of weights of an export."""

    tensors: Mapping[str, torch.Tensor]
    """Parameter name -> the whole tensor, as in the model's state_dict."""
    description: str
    """What they are, for the model card: "EMA profile main", "raw weights"."""
    variant: str | None = None
    """diffusers' name for an alternative set of weights (`non_ema`); None: the default weights."""
    half: bool = False
    """Written in float16."""


def export_pipeline(
    out_dir: str | Path,
    config: TrainerConfig,
    weights: Sequence[ExportWeights],
    *,
    origin: str,
    max_shard_size: str = "10GB",
) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads, with any of the `weights` as its variants.

    Out of a pretrained pipeline comes a pipeline of the same kind, its frozen parts copied; of adapters, a folder for
    its `load_lora_weights`. Any other network loads as diffusers' `DDPMPipeline`, of which the parts (`unet`, also
    where it is a transformer, and `scheduler`) always work, and the call does for unconditional models; `pipeline.py`
    in the folder also samples class-conditional ones, and those of text, whose text encoder is copied. README.md says
    which weights are which, and how to load them; unbroken.json says the same to programs.

    Args:
        weights: exactly one without variant, the default weights; in any order.
        origin: where the weights come from: run, step, samples.
        max_shard_size: larger weights are cut into files of this size, with an index.

    Raises:
        ConfigError: `out_dir` is not empty.
    """
    assert [entry.variant for entry in weights].count(None) == 1, "exactly one set of default weights"
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"OUT_DIR={out_dir} is not an empty folder; remove it, or name another")
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = config.model.folder()
    if config.model.lora is not None:
        assert folder is not None
        card = _write_adapters(out_dir, config, folder, weights)
    elif folder is not None and folder.index:
        card = _write_whole_pipeline(out_dir, config, folder, weights, max_shard_size)
    else:
        card = _write_network(out_dir, config, weights, max_shard_size)
    about = _model_card(weights, card, f"From {origin}. {_objective(config)}")
    (out_dir / "README.md").write_text(about, encoding="utf-8")
    variants = {entry.variant or "default": facts(entry) for entry in weights}
    _write_json(out_dir / "unbroken.json", {"origin": origin, "weights": variants})


def facts(entry: ExportWeights) -> dict[str, str]:
    """What is said of one set of weights; the fingerprint is that of the float32 tensors in the run."""
    tensors = {name: tensor.contiguous() for name, tensor in entry.tensors.items()}
    found = {
        name: partial_fingerprint(
            TensorSpec(name=name, dtype=SAFETENSORS_DTYPES[tensor.dtype], shape=tuple(tensor.shape)),
            0,
            tensor.reshape(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in tensors.items()
    }
    return {"description": entry.description, "fingerprint": combined_fingerprint(found)}


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _write_network(
    out_dir: Path, config: TrainerConfig, weights: Sequence[ExportWeights], max_shard_size: str
) -> list[str]:
    model: Any = build_model(config.model, config.seed)
    if model.config.get("sample_size") is None:
        model.register_to_config(sample_size=config.data.image_size)
    _save_variants(model, out_dir / "unet", weights, max_shard_size)
    scheduler: Any = Objective(config.objective).scheduler(pixels=config.data.source != "latents")
    scheduler.save_pretrained(out_dir / "scheduler")
    index = diffusers.DDPMPipeline(unet=model, scheduler=scheduler)
    index.save_config(out_dir)  # model_index.json
    shutil.copyfile(trainers.pipeline.__file__, out_dir / "pipeline.py")
    _write_text_encoder(out_dir, config)
    arguments, kind = _call_of(model, config)
    edm = _edm_note(config.objective.sigma_data) if config.objective.prediction_type == "edm" else []
    return [
        kind,
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
        "`custom_pipeline` the folder loads as a plain DDPMPipeline, which can not pass on classes or texts.",
        *edm,
    ]


def _write_text_encoder(out_dir: Path, config: TrainerConfig) -> None:
    if config.conditioning.text_encoder is None:
        return
    encoder = open_text_encoder(config.conditioning, torch.device("cpu"))
    encoder.tokenizer.model_max_length = encoder.max_tokens
    index = json.loads((out_dir / "model_index.json").read_text(encoding="utf-8"))
    for name, part in (("text_encoder", encoder.model), ("tokenizer", encoder.tokenizer)):
        part.save_pretrained(out_dir / name)
        index[name] = ["transformers", type(part).__name__]
    _write_json(out_dir / "model_index.json", index)


def _call_of(model: Any, config: TrainerConfig) -> tuple[str, str]:
    """How the pipeline of a network alone is called, and what kind of model that is."""
    drop, null = config.objective.label_drop, null_label(model)
    if takes_text(model):
        return f'labels=["a text", "another one"], guidance={usual_guidance(model, config):g}', "Draws what texts say."
    if null is None:
        return "num_images=4", "Unconditional."
    last = num_classes_of(model, drop) - 1
    absent = f"; {null} stands for no label" if learns_null_label(model, drop) else ""
    arguments = f"labels=[0, {last}], guidance={usual_guidance(model, config):g}"
    return arguments, f"Class-conditional: labels 0 to {last}{absent}."


def _edm_note(sigma_data: float) -> list[str]:
    return [
        "",
        f"EDM preconditioning (Karras et al., 2022), sigma_data = {sigma_data:g}: `unet` is the raw network F of",
        "D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4). The EDMEulerScheduler in `scheduler` has them.",
        "Start from noise times its `init_noise_sigma`, call `scale_model_input` before the network and `step` after",
        "it, as `pipeline.py` does. The call of a plain DDPMPipeline does not, so its images are wrong.",
    ]


def _write_whole_pipeline(
    out_dir: Path,
    config: TrainerConfig,
    folder: PretrainedFolder,
    weights: Sequence[ExportWeights],
    max_shard_size: str,
) -> list[str]:
    assert folder.part is not None
    for name in folder.index:
        if folder.has(name) and name not in (folder.part, "scheduler") and (folder.root / name).is_dir():
            shutil.copytree(folder.root / name, out_dir / name)
    shutil.copyfile(folder.root / "model_index.json", out_dir / "model_index.json")
    scheduler = pipeline_scheduler(folder, config.objective)
    scheduler.save_pretrained(out_dir / "scheduler")
    index = json.loads((out_dir / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    _write_json(out_dir / "model_index.json", index)
    _save_variants(build_model(config.model, config.seed), out_dir / folder.part, weights, max_shard_size)
    return [
        f"The frozen parts are copies of {config.model.pretrained}.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'folder = "."  # this folder; variant="..." loads other weights than the default',
        "pipeline = DiffusionPipeline.from_pretrained(folder)",
        "```",
    ]


def _save_variants(model: Any, folder: Path, weights: Sequence[ExportWeights], max_shard_size: str) -> None:
    for entry in weights:
        loaded = model.load_state_dict(dict(entry.tensors), strict=False)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
        half = copy.deepcopy(model).half() if entry.half else model
        half.save_pretrained(folder, variant=entry.variant, max_shard_size=max_shard_size)


def _write_adapters(
    out_dir: Path, config: TrainerConfig, folder: PretrainedFolder, weights: Sequence[ExportWeights]
) -> list[str]:
    pipeline: Any = getattr(diffusers, folder.index["_class_name"])
    settings = cast(Any, empty_model(config.model, config.seed)).peft_config["default"].to_dict()
    for entry in weights:
        tensors = {name.replace(".default.", "."): tensor for name, tensor in entry.tensors.items()}
        pipeline.save_lora_weights(
            out_dir,
            weight_name=adapter_file(entry.variant),
            **{
                f"{folder.part}_lora_layers": {
                    name: tensor.half() if entry.half else tensor for name, tensor in tensors.items()
                },
                f"{folder.part}_lora_adapter_metadata": settings,
            },
        )
    return [
        f"Adapters (LoRA) for {config.model.pretrained}.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{config.model.pretrained}")',
        f'pipeline.load_lora_weights(".", weight_name="{adapter_file(None)}")  # this folder',
        "```",
        "",
        *(f"{adapter_file(entry.variant)}: {entry.description}." for entry in weights),
    ]


def adapter_file(variant: str | None) -> str:
    """The file of one set of adapters in an export."""
    return f"pytorch_lora_weights{f'.{variant}' if variant else ''}.safetensors"


def _objective(config: TrainerConfig) -> str:
    return f"Objective: {config.objective.prediction_type}."


def _model_card(weights: Sequence[ExportWeights], card: Sequence[str], origin: str) -> str:
    rows = [f"| {entry.variant or '(default)'} | {entry.description} |" for entry in weights]
    head = ["---", "library_name: diffusers", "---", "# Diffusion model trained with unbroken", "", origin, ""]
    return "\n".join([*head, "| variant | weights |", "| --- | --- |", *rows, "", *card, ""])
