"""The original layout, read back by diffusers' own converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from safetensors import safe_open
from safetensors.torch import load_file

from tests.trainers.families import family_config
from tests.trainers.pipelines import write_pipeline
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.export import ExportWeights
from trainers.models import ModelConfig, build_model
from trainers.original_names import to_original
from trainers.single_file import export_single_file, unpack_single_file

Tensors = dict[str, torch.Tensor]


def weights(config: TrainerConfig, factor: float) -> ExportWeights:
    """Other weights than those of the pretrained folder."""
    model = build_model(config.model, config.seed)
    tensors = {name: parameter.detach() * factor for name, parameter in model.named_parameters()}
    return ExportWeights(tensors=tensors, description=f"times {factor}")


def make(folder: Path, family: str, **options: Any) -> tuple[Path, TrainerConfig, ExportWeights]:
    """A file, what it was made of, and the weights of the network in it."""
    if not folder.exists():
        write_pipeline(folder, family)
    config = decode(TrainerConfig, family_config(folder, family))
    file, main = folder.with_suffix(".safetensors"), weights(config, 1.5)
    export_single_file(file, config, main, origin="run x, step 7", **options)
    return file, config, main


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["sd15", "sd2_v", "sdxl", "sd3"])
def test_diffusers_loads_it_back(family, tmp_path):
    folder = write_pipeline(tmp_path / "pipeline", family)
    if family == "sd2_v":  # as the text encoder of Stable Diffusion 2, which is OpenCLIP's
        settings = folder / "text_encoder/config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "hidden_act": "gelu"}))
    file, _, main = make(folder, family)
    base: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    loaded: Any = type(base).from_single_file(str(file), config=str(folder), local_files_only=True)
    part = "transformer" if family == "sd3" else "unet"
    network = dict(getattr(loaded, part).named_parameters())
    assert same(network, dict(main.tensors))
    names = ["vae", "text_encoder", *(["text_encoder_3"] if family == "sd3" else [])]
    for name in names:
        found, expected = getattr(loaded, name).state_dict(), getattr(base, name).state_dict()
        if (name, family) == ("text_encoder", "sd3"):
            del found["text_projection.weight"], expected["text_projection.weight"]  # an identity, for diffusers
        assert same(found, expected), name
    if family == "sdxl":  # which of two encoders is which, diffusers tells by their widths: here they are equal
        prefix = "conditioner.embedders.1.model."
        found = converters.convert_open_clip_checkpoint(base.text_encoder_2, load_file(file), prefix=prefix)
        assert same(found, base.text_encoder_2.state_dict())


def test_its_metadata_says_what_it_is(tmp_path):
    file, config, main = make(tmp_path / "pipeline", "sd15")
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["unbroken"])
    assert said["origin"] == "run x, step 7" and said["weights"]["description"] == "times 1.5"
    export_single_file(tmp_path / "other.safetensors", config, weights(config, 2.0), origin="", average=main)
    with safe_open(tmp_path / "other.safetensors", "pt") as opened:
        other = json.loads(opened.metadata()["unbroken"])
    assert other["model_ema"] == said["weights"] != other["weights"]
    with pytest.raises(ConfigError, match="exists"):
        make(tmp_path / "pipeline", "sd15")


def test_a_full_file_has_the_average_beside_the_weights(tmp_path):
    folder = write_pipeline(tmp_path / "pipeline", "sdxl")
    config = decode(TrainerConfig, family_config(folder, "sdxl"))
    average = weights(config, 2.0)
    file, _, main = make(folder, "sdxl", average=average)
    tensors, settings = load_file(file), build_model(config.model, config.seed).config
    for extract_ema, expected in ((False, main), (True, average)):
        found = converters.convert_ldm_unet_checkpoint(dict(tensors), settings, extract_ema=extract_ema)
        assert same(found, dict(expected.tensors))


def test_half_precision(tmp_path):
    folder = write_pipeline(tmp_path / "pipeline", "sd15")
    config = decode(TrainerConfig, family_config(folder, "sd15"))
    main = weights(config, 1.0)
    half = ExportWeights(tensors=main.tensors, description="half", half=True)
    export_single_file(tmp_path / "half.safetensors", config, half, origin="")
    tensors = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    found = converters.convert_ldm_unet_checkpoint(tensors, build_model(config.model, config.seed).config)
    assert same(found, {name: tensor.half() for name, tensor in main.tensors.items()})


def test_it_unpacks_to_a_folder_to_train_on(tmp_path):
    file, _, main = make(tmp_path / "pipeline", "sd15")
    unpack_single_file(file, str(tmp_path / "pipeline"), tmp_path / "out")
    model = build_model(ModelConfig(pretrained=str(tmp_path / "out")), seed=0)
    assert same(dict(model.named_parameters()), dict(main.tensors))
    with pytest.raises(ConfigError, match="not an empty folder"):
        unpack_single_file(file, str(tmp_path / "pipeline"), tmp_path / "out")
    other = write_pipeline(tmp_path / "sd3", "sd3")
    with pytest.raises(ConfigError, match="cannot be read as a StableDiffusion3Pipeline"):
        unpack_single_file(file, str(other), tmp_path / "new")


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 2}}])
def test_what_has_no_such_layout_is_refused(tmp_path, model):
    family = "sd15" if model else "dit"
    folder = write_pipeline(tmp_path / "pipeline", family)
    config = decode(TrainerConfig, family_config(folder, family, **model))
    with pytest.raises(ConfigError, match="adapters" if model else "a DiTPipeline"):
        export_single_file(tmp_path / "a.safetensors", config, weights(config, 1.0), origin="")
    assert not (tmp_path / "a.safetensors").exists()


def numbered(model: torch.nn.Module) -> Tensors:
    """Tensors with the names and rows of the model's, a single column wide, no two values alike."""
    found, first = {}, 0
    for name, tensor in model.state_dict().items():
        shape = tensor.shape[:1] if tensor.ndim == 1 else (tensor.shape[0], 1)
        found[name] = torch.arange(first, first + tensor.shape[0]).float().view(shape)
        first += tensor.shape[0]
    return found


def test_flux_at_its_own_width():
    """diffusers' converter knows no other width than the published one."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    tensors = numbered(model)
    found = to_original("FluxPipeline", "transformer", tensors)
    assert "model.diffusion_model.double_blocks.1.img_attn.qkv.weight" in found
    assert same(converters.convert_flux_transformer_checkpoint_to_diffusers(found), tensors)


def test_a_vae_with_attention():
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae: Any = diffusers.AutoencoderKL(block_out_channels=(8, 16, 16), norm_num_groups=4, **kinds)
    expected = vae.state_dict()
    found = to_original("StableDiffusionPipeline", "vae", expected)
    assert found["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert same(converters.convert_ldm_vae_checkpoint(found, vae.config), expected)


def test_stable_diffusion_3_5_with_its_second_attention():
    args = {"sample_size": 4, "num_layers": 3, "attention_head_dim": 4, "num_attention_heads": 2}
    model: Any = diffusers.SD3Transformer2DModel(
        **args,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    expected = model.state_dict()
    found = to_original("StableDiffusion3Pipeline", "transformer", expected)
    assert same(converters.convert_sd3_transformer_checkpoint_to_diffusers(found), expected)
