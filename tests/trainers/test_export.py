from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline

from trainers.config import TrainConfig, TrainerConfig
from trainers.data.sources import DataConfig
from trainers.errors import ConfigError
from trainers.export import ExportWeights, export_pipeline
from trainers.models import ModelConfig, build_model
from trainers.objectives import Objective, ObjectiveConfig
from trainers.rng import Stream, normal
from trainers.sampling import sample_images

UNET = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 1,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
MODELS = {
    "unet": ModelConfig(class_name="UNet2DModel", args=UNET),
    "classes": ModelConfig(class_name="UNet2DModel", args={**UNET, "num_class_embeds": 11}),
    "dit": ModelConfig(class_name="DiTTransformer2DModel", args=DIT),
}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def export(folder, name, kind: Any = "epsilon", data: DataConfig = DataConfig(image_size=8)):  # noqa: B008
    ema, raw = (build_model(MODELS[name], seed) for seed in (1, 2))
    objective = ObjectiveConfig(prediction_type=kind, label_drop=0.0 if name == "unet" else 0.1)
    weights = [
        ExportWeights(tensors=ema.state_dict(), description="EMA profile main"),
        ExportWeights(tensors=raw.state_dict(), description="raw weights", variant="non_ema"),
    ]
    train = TrainConfig(num_steps=1, global_batch_size=1, microbatch_size=1)
    config = TrainerConfig(model=MODELS[name], train=train, data=data, objective=objective)
    export_pipeline(folder, config, weights, origin="run digits, step 7")
    return ema, raw, Objective(objective)


def load(folder, **options) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same(module, model):
    loaded = module.state_dict()
    return all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_loads_as_a_pipeline_with_both_variants(tmp_path, name):
    ema, raw, _ = export(tmp_path / "out", name)
    default = load(tmp_path / "out")
    variant = load(tmp_path / "out", variant="non_ema")
    assert default.unet.config["sample_size"] == 8
    assert same(default.unet, ema) and same(variant.unet, raw)
    assert isinstance(default, DDPMPipeline) and type(default.unet) is type(ema)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_latents_are_not_clipped_on_the_way_as_pixels_are(tmp_path):
    export(tmp_path / "pixels", "unet")
    export(tmp_path / "latents", "unet", data=DataConfig(source="latents", path="x", image_size=8))
    clips = [load(tmp_path / kind).scheduler.config["clip_sample"] for kind in ("pixels", "latents")]
    assert clips == [True, False]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_an_unconditional_export_samples_as_it_is(tmp_path, kind):
    export(tmp_path / "out", "unet", kind)
    pipeline = load(tmp_path / "out")
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("name", "kind", "guidance"),
    [("unet", "epsilon", 1.0), ("classes", "epsilon", 1.5), ("classes", "edm", 1.5), ("dit", "epsilon", 1.5)],
)
def test_the_folder_s_own_pipeline_samples_as_we_do(tmp_path, name, kind, guidance):
    ema, _, objective = export(tmp_path / "out", name, kind)
    folder = str(tmp_path / "out")
    pipeline = load(folder, custom_pipeline=folder, trust_remote_code=True)
    labels = None if name == "unet" else [0, 3, 9]
    noise = normal(0, Stream.SAMPLING, torch.arange(3).numpy(), (1, 8, 8))
    settings = {"guidance": guidance}
    images = pipeline(labels, noise=noise, num_inference_steps=4, output_type="pt", **settings).images
    given = None if labels is None else torch.tensor(labels)
    ours = sample_images(ema, objective, (3, 1, 8, 8), given, num_steps=4, **settings)
    assert torch.equal(images, ours / 2 + 0.5)
    pictures = pipeline(labels, num_images=3, num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    assert len(pictures) == 3 and pictures[0].size == (8, 8)
    with pytest.raises(ValueError, match="labels="):
        pipeline([0] if labels is None else None)


def test_the_model_card_says_which_weights_are_which(tmp_path):
    export(tmp_path / "out", "classes")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "| (default) | EMA profile main |",
        "| non_ema | raw weights |",
        "run digits, step 7",
        "0 to 9; 10 stands",
    ):
        assert words in card
    snippet = card.split("```python\n")[1].split("```")[0].replace('folder = "."', f'folder = "{tmp_path / "out"}"')
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    assert len(scope["images"]) == 2


def test_the_card_of_an_edm_model_says_how_it_is_called(tmp_path):
    words = "scale_model_input", "init_noise_sigma", "sigma_data = 0.5"
    for kind in ("edm", "epsilon"):
        export(tmp_path / kind, "unet", kind)
        card = (tmp_path / kind / "README.md").read_text()
        assert all((word in card) == (kind == "edm") for word in words)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        export(tmp_path, "unet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.txt"]
