from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from trainers.conditioning import Condition, call_model
from trainers.errors import ConfigError
from trainers.models import ModelConfig, build_model, model_class, null_label
from trainers.units import compilable_blocks, sharding_units

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def unet(**args):
    return build_model(ModelConfig(class_name="UNet2DModel", args={**UNET, **args}), seed=0)


def dit(**args):
    return build_model(ModelConfig(class_name="DiTTransformer2DModel", args={**DIT, **args}), seed=0)


def test_weights_follow_from_the_seed_alone():
    config = ModelConfig(class_name="UNet2DModel", args=UNET)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build_model(config, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again, other = build_model(config, seed=1).state_dict(), build_model(config, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


@pytest.mark.parametrize(
    ("class_name", "args", "words"),
    [
        ("UNet2DModl", {}, ["model.class_name=UNet2DModl", "did you mean UNet2DModel"]),
        ("Zzzzzz", {}, ["model.class_name=Zzzzzz", "give a model class"]),
        ("DDPMScheduler", {}, ["model.class_name=DDPMScheduler", "not a model"]),
        ("AutoencoderKL", {}, ["model.class_name=AutoencoderKL", "does not denoise"]),
        ("AuraFlowTransformer2DModel", {}, ["model.class_name=AuraFlowTransformer2DModel", "text", "SD3"]),
        ("UNet2DModel", {"in_chanels": 1}, ["model.args.in_chanels=1", "did you mean in_channels"]),
        ("UNet2DModel", {"block_out_channels": [7]}, ["model.args", "block_out_channels=[7]"]),
    ],
)
def test_refusals_name_key_and_value(class_name, args, words):
    with pytest.raises(ConfigError) as error:
        build_model(ModelConfig(class_name=class_name, args=args), seed=0)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_running_statistics_are_refused(monkeypatch):
    class Normed(diffusers.UNet2DModel):
        def __init__(self):
            super().__init__(**UNET)
            self.norm = nn.BatchNorm2d(3)

    monkeypatch.setattr(diffusers, "Normed", Normed, raising=False)
    with pytest.raises(ConfigError, match=r"running statistics in norm \(BatchNorm2d\)"):
        build_model(ModelConfig(class_name="Normed"), seed=0)


def test_classes_are_found_by_name_without_a_list():
    for name in ("UNet2DModel", "DiTTransformer2DModel"):
        assert model_class(ModelConfig(class_name=name)) == (getattr(diffusers, name), {})


def test_unconditional_call():
    noisy, timesteps = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 999])
    model = unet()
    assert torch.equal(call_model(model, noisy, timesteps, Condition()), model(noisy, timesteps).sample)
    assert null_label(model) is None


def test_class_conditional_call():
    noisy, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    model = unet(num_class_embeds=11)
    assert null_label(model) == 10
    out = call_model(model, noisy, timesteps, Condition(labels=torch.tensor([0, 10])))
    assert torch.equal(out, model(noisy, timesteps, torch.tensor([0, 10])).sample)


def test_learned_sigma_keeps_the_prediction():
    noisy, timesteps, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 10])
    model = dit().eval()
    for p in model.parameters():  # zero-initialised gates would make every output equal
        nn.init.normal_(p, std=0.1)
    assert null_label(model) == 10
    out = call_model(model, noisy, timesteps, Condition(labels=labels))
    assert out.shape == noisy.shape
    assert torch.equal(out, model(noisy, timesteps, labels).sample[:, :1])


def blocks(model):
    found = {id(module): name for name, module in model.named_modules()}
    return sorted(found[id(block)] for block in compilable_blocks(model))


def names(model):
    found = {id(module): name for name, module in model.named_modules()}
    return [[found[id(module)] for module in unit] for unit in sharding_units(model)]


def test_units_of_unets():
    stages = [["down_blocks.0"], ["down_blocks.1"], ["mid_block"], ["up_blocks.0"], ["up_blocks.1"]]
    assert sorted(names(unet())) == stages
    found = blocks(unet())
    assert {"down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "mid_block.resnets.1"} <= set(found)
    assert not any("samplers" in name for name in found)
    conditional = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    assert sorted(names(conditional)) == stages
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in blocks(conditional)
    assert "down_blocks.0.attentions.0" not in blocks(conditional)


def test_the_part_of_dit_that_its_root_calls_comes_first():
    assert names(dit()) == [["transformer_blocks.0.norm1.emb"], ["transformer_blocks.0"], ["transformer_blocks.1"]]
    assert blocks(dit()) == ["transformer_blocks.1"]


def test_units_of_other_transformers():
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
    )
    assert names(sd3) == [["transformer_blocks.0"], ["transformer_blocks.1"]]
    assert blocks(sd3) == ["transformer_blocks.0", "transformer_blocks.1"]
    flux = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    assert names(flux) == [["transformer_blocks.0"], ["single_transformer_blocks.0"], ["single_transformer_blocks.1"]]
    assert blocks(flux) == sorted(name for (name,) in names(flux))


def test_units_of_an_unknown_model():
    def block(*inner):
        return nn.Sequential(*inner or (nn.Linear(2, 2),))

    tied = nn.Linear(2, 2)
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.nested = nn.ModuleList([nn.ModuleList([block(), block()]), block()])
    model.leaves = nn.ModuleList([nn.Linear(2, 2)])
    model.empty = nn.ModuleList([block(nn.ReLU())])
    model.tied = nn.ModuleList([block(tied), block(tied)])
    assert names(model) == [["nested.0.0"], ["nested.0.1"], ["nested.1"]]
