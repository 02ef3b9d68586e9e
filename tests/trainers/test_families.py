"""Every family of models that people train, tiny: trained out of a pipeline, exported, loaded and drawn elsewhere."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.pipelines import FAMILIES, write_pipeline
from tests.trainers.tiny import build_tiny, tiny_config
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.export import ExportWeights, export_pipeline
from trainers.models import build_model
from trainers.parallel import gather_rows
from trainers.sampling import sample_pipeline
from trainers.state import combined_fingerprint, fingerprints
from trainers.step import train_step

STEPS = 3


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


def train_families(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each configuration: fingerprint, frozen hashes, losses, and the averaged weights. Collective."""
    found = {}
    for name, config in configs.items():
        state, task = build_tiny(config)
        losses = [train_step(state, task)["loss"] for _ in range(STEPS)]
        average = state.ema.tensors()["main"]
        whole = {p.name: gather_rows(average[p.name], p, state.topology) for p in state.parameters}
        state.generators.capture()
        word = combined_fingerprint(fingerprints(state))
        found[name] = (word, dict(state.frozen), losses, {key: value.numpy() for key, value in whole.items()})
    return found


def draw_elsewhere(folders: dict[str, str], pipe: Any) -> None:
    """In another process: what diffusers alone makes of each export, or of a pipeline and its adapters."""
    torch.set_num_threads(1)
    images = {}
    for name, folder in folders.items():
        base, _, adapters = folder.partition("+")
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(base)
        if adapters:
            pipeline.load_lora_weights(adapters, weight_name="pytorch_lora_weights.safetensors")
        pipeline.set_progress_bar_config(disable=True)
        images[name] = pipeline(**call(name), output_type="np").images
    pipe.send(images)


def call(family: str) -> dict[str, Any]:
    """The arguments with which `sample_pipeline` calls the pipeline."""
    from trainers.rng import Stream, derive_seed

    seeds = [derive_seed(0, Stream.SAMPLING, i) for i in range(2)]
    common = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], "num_inference_steps": 2}
    if family == "dit":
        return {**common, "class_labels": [3, 7], "guidance_scale": 1.0}
    options = {"sd3": {"max_sequence_length": 8}, "flux": {"max_sequence_length": 8}}.get(family, {})
    if family == "pixart":
        options = {"max_sequence_length": 8, "use_resolution_binning": False, "clean_caption": False}
    prompts = ["a handwritten three", "a handwritten seven"]
    return {**common, **options, "prompt": prompts, "height": 8, "width": 8, "guidance_scale": 1.5}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folders = {name: write_pipeline(tmp_path_factory.mktemp("families") / name, name) for name in FAMILIES}
    found = {name: family_config(folder, name) for name, folder in folders.items()}
    found["lora"] = family_config(folders["sdxl"], "sdxl", lora={"rank": 2, "alpha": 4})
    return found


@pytest.fixture(scope="module")
def trained(configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What W = 1 and W = 2 make of them."""
    recomputed = {name: config for name, config in configs.items() if name in ("sdxl", "sd3", "lora")}
    for name, config in recomputed.items():  # W = 2 keeps no activations: the same numbers
        recomputed[name] = {**config, "model": {**config["model"], "gradient_checkpointing": True}}
    return [run_ranks(1, train_families, configs)[0], run_ranks(2, train_families, {**configs, **recomputed})[1]]


@pytest.fixture(scope="module")
def drawn(
    configs: dict[str, dict[str, Any]], trained: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images of every export, by us and by diffusers in another process."""
    out, ours, folders = tmp_path_factory.mktemp("exports"), {}, {}
    for name, plain in configs.items():
        config = decode(TrainerConfig, plain)
        average = {key: torch.from_numpy(value) for key, value in trained[0][name][3].items()}
        weights = [
            ExportWeights(tensors=average, description="EMA profile main"),
            ExportWeights(tensors=average, description="float16", variant="fp16", half=True),
        ]
        export_pipeline(out / name, config, weights, origin="test", max_shard_size="20KB")
        folders[name] = f"{config.model.pretrained}+{out / name}" if name == "lora" else str(out / name)
        model = build_model(config.model, config.seed)
        assert not model.load_state_dict(average, strict=False).unexpected_keys
        wanted = [3, 7] if name == "dit" else ["a handwritten three", "a handwritten seven"]
        guidance = 1.0 if name == "dit" else 1.5
        ours[name] = sample_pipeline(model, config, wanted, guidance=guidance, num_steps=2)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=draw_elsewhere, args=(folders, sender))
    process.start()
    assert receiver.poll(120), "the other process drew nothing"
    theirs = receiver.recv()
    process.join()
    return {name: (ours[name], torch.from_numpy(theirs[name]).permute(0, 3, 1, 2) * 2 - 1) for name in configs}


@pytest.mark.parametrize("name", [*FAMILIES, "lora"])
def test_one_result_for_every_world_size(trained: list[dict[str, Any]], name: str) -> None:
    (word, frozen, losses, _), (other_word, other_frozen, other_losses, _) = (found[name] for found in trained)
    assert (word, frozen, losses) == (other_word, other_frozen, other_losses)
    assert len(set(losses)) == STEPS and "vae" in frozen
    assert ("network" in frozen) == (name == "lora")


@pytest.mark.parametrize("name", [*FAMILIES, "lora"])
def test_diffusers_draws_the_same_from_the_export(
    drawn: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str
) -> None:
    ours, theirs = drawn[name]
    assert ours.shape == (2, 1, 8, 8) and ours.std() > 0.01
    assert not torch.equal(ours[0], ours[1])
    assert torch.equal(ours, theirs)
