from __future__ import annotations

import json
import shutil
from typing import Any

import diffusers
import pytest
import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.families import family_config
from tests.trainers.pipelines import write_pipeline
from tests.trainers.tiny import UNET, build_tiny, tiny_config
from trainers.conditioning import ConditioningConfig
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.fitting import check_fits
from trainers.frozen import check_schedule, open_frozen, pipeline_scheduler
from trainers.identity import check_hashes
from trainers.models import ModelConfig, build_model, empty_model, pretrained_weights
from trainers.objectives import ObjectiveConfig
from trainers.parallel import gather_rows
from trainers.pretrained import open_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pretrained") / "dit", "dit")


def initial(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first weights of each configuration, as training has them. Collective."""
    found = {}
    for name, config in configs.items():
        state, _ = build_tiny(config)
        found[name] = {p.name: gather_rows(p.local, p, state.topology).numpy() for p in state.parameters}
    return found


def test_every_rank_s_rows_make_up_the_whole_model(folder, tmp_path):
    network: Any = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
    network.save_pretrained(tmp_path / "cut", max_shard_size="5KB")
    assert (tmp_path / "cut" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    single = family_config(folder, "dit")
    scratch = family_config(folder, "dit", from_scratch=True, args={"num_layers": 1})
    found = run_ranks(3, initial, {"single": single, "scratch": scratch, "unet": tiny_config(UNET)})
    expected = dict(network.named_parameters())
    for rank in found:
        assert rank["single"].keys() == expected.keys()
        assert all(torch.equal(torch.from_numpy(rank["single"][name]), value) for name, value in expected.items())
        for name, plain in (("scratch", scratch), ("unet", tiny_config(UNET))):
            config = decode(TrainerConfig, plain)
            whole = dict(build_model(config.model, config.seed).named_parameters())
            assert all(torch.equal(torch.from_numpy(rank[name][key]), value) for key, value in whole.items())
    cut = build_model(ModelConfig(pretrained=str(tmp_path / "cut")), seed=0)
    assert all(torch.equal(value, expected[name]) for name, value in cut.named_parameters())


def test_a_model_without_memory_keeps_its_constants(folder):
    config = ModelConfig(pretrained=str(folder))
    empty, whole = empty_model(config, seed=0), build_model(config, seed=0)
    assert all(parameter.is_meta for parameter in empty.parameters())
    buffers = dict(whole.named_buffers())
    assert buffers and all(torch.equal(value, buffers[name]) for name, value in empty.named_buffers())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pretrained": "/nowhere"}, ["model.pretrained=/nowhere is no folder", "hub"]),
        ({"subfolder": "unet"}, ["model.subfolder=unet", "unet/config.json"]),
        ({"variant": "fp16"}, ["model.variant=fp16", "it has diffusion_pytorch_model.safetensors"]),
    ],
)
def test_what_is_not_there_is_refused(folder, monkeypatch, keys, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as error:
        build_model(ModelConfig(**{"pretrained": str(folder), **keys}), seed=0)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "name", ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
)
def test_a_file_that_is_cut_short_is_one_line(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for length in (0, (tmp_path / name).stat().st_size - 3):
        with (tmp_path / name).open("r+b") as file:
            file.truncate(length)
        with pytest.raises(ConfigError, match=f"{name} cannot be read .*; copy it anew"):
            build_model(ModelConfig(pretrained=str(tmp_path)), seed=0)
        shutil.copy(folder / name, tmp_path / name)


def test_a_frozen_part_that_is_cut_short_is_one_line(tmp_path):
    folder = write_pipeline(tmp_path / "sd15", "sd15")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="a frozen part cannot be loaded"):
        open_frozen(ModelConfig(pretrained=str(folder)), ConditioningConfig(), torch.device("cpu"))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"class_name": "UNet2DModel", "pretrained": "x"},
        {"class_name": "UNet2DModel", "variant": "fp16"},
        {"pretrained": "x", "args": {"num_layers": 1}},
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys):
    with pytest.raises(ConfigError):
        ModelConfig(**keys)


def test_other_weights_than_the_config_s_are_refused(folder, tmp_path):
    other = diffusers.DiTTransformer2DModel(**build_model(ModelConfig(pretrained=str(folder)), 0).config)  # pyright: ignore
    other.proj_out_1 = torch.nn.Linear(2, 2)
    other.save_pretrained(tmp_path)
    config = ModelConfig(pretrained=str(tmp_path))
    with pytest.raises(ConfigError, match=r"are not those of its config\.json"):
        pretrained_weights(config, empty_model(config, 0))


def test_another_noise_schedule_than_the_weights_know_is_refused(folder):
    config = decode(TrainerConfig, {**family_config(folder, "dit"), "objective": {"beta_schedule": "linear"}})
    source: Any = type(
        "Latents", (), {"channels": 1, "num_classes": 10, "has_captions": False, "latents": None, "buckets": None}
    )
    with pytest.raises(ConfigError, match=r"objective\.beta_schedule=.scaled_linear"):
        check_fits(empty_model(config.model, 0), source, config)


def test_another_frozen_part_is_refused_by_name():
    check_hashes({"vae": "a"}, {"vae": "a"})
    with pytest.raises(ConfigError, match=r"frozen part vae .* put the old one back"):
        check_hashes({"vae": "a"}, {"vae": "b"})


def test_a_pipeline_without_one_of_its_text_encoders_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    parts = {"transformer": ["diffusers", "SD3Transformer2DModel"], "text_encoder_3": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **parts}))
    with pytest.raises(ConfigError, match="has no text_encoder_3, which captions are encoded with"):
        open_frozen(ModelConfig(pretrained=str(tmp_path)), ConditioningConfig(), torch.device("cpu"))


@pytest.mark.parametrize("stored", ["PNDMScheduler", "DDIMScheduler"])
def test_an_export_draws_on_the_schedule_with_zero_terminal_snr(tmp_path, stored):
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    for name in ("unet", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    known = {"_class_name": stored, "prediction_type": "v_prediction", "steps_offset": 1, "clip_sample": False}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(known))
    objective = ObjectiveConfig(prediction_type="v_prediction", beta_schedule="linear", zero_terminal_snr=True)
    folder = open_pretrained(str(tmp_path))
    check_schedule(folder, objective)
    scheduler = pipeline_scheduler(folder, objective)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[999] == 0
    assert type(scheduler).__name__ == "DDIMScheduler" and not scheduler.config.clip_sample
    plain = pipeline_scheduler(folder, ObjectiveConfig(prediction_type="v_prediction", beta_schedule="linear"))
    assert type(plain).__name__ == stored and plain.config.timestep_spacing == "leading"
