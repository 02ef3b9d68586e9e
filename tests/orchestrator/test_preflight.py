from __future__ import annotations

from typing import Any

import pytest

from orchestrator.preflight import check_trainable
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "num_class_embeds": 11,
}
DIT = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 1,
}


def config(class_name: str, args: dict[str, Any], **sections: Any) -> TrainerConfig:
    train = {"num_steps": 1, "global_batch_size": 2, "microbatch_size": 1}
    return decode(TrainerConfig, {"model": {"class_name": class_name, "args": args}, "train": train, **sections})


@pytest.mark.parametrize(("class_name", "args"), [("UNet2DModel", UNET), ("DiTTransformer2DModel", DIT)])
def test_a_model_that_fits_the_data_passes(class_name: str, args: dict[str, Any]):
    check_trainable(config(class_name, args))


def test_a_model_without_classes_passes_if_no_label_is_dropped():
    check_trainable(config("UNet2DModel", {**UNET, "num_class_embeds": None}, objective={"label_drop": 0}))


def test_a_model_that_learns_the_variance_has_twice_the_channels():
    learns = {"learned_variance": True}
    check_trainable(config("DiTTransformer2DModel", DIT, objective=learns))
    with pytest.raises(
        ConfigError, match=r"needs 2 output channels, twice the data's, and not 1; set model\.args\.out_ch"
    ):
        check_trainable(config("UNet2DModel", UNET, objective=learns))


def test_a_large_model_takes_no_memory():
    wide = {**UNET, "block_out_channels": [8192, 16384]}  # 36 billion parameters
    check_trainable(config("UNet2DModel", wide))


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (config("UNet2DMode", UNET), "model.class_name=UNet2DMode is not a class of diffusers"),
        (config("UNet2DModel", {**UNET, "in_channel": 1}), "model.args.in_channel=1 is not an argument"),
        (config("UNet2DModel", {**UNET, "norm_num_groups": 7}), "is refused by UNet2DModel"),
        (config("UNet2DModel", {**UNET, "out_channels": 3}), "it makes [1, 3, 8, 8] of [1, 1, 8, 8]"),
        (
            config("UNet2DModel", {**UNET, "sample_size": 9}, data={"image_size": 9}),
            "model.class_name=UNet2DModel cannot take images of data.image_size=9: RuntimeError",
        ),
        (config("UNet2DModel", UNET, data={"source": "folder", "path": "/nowhere"}), "data.path=/nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_is_refused(built: TrainerConfig, message: str):
    with pytest.raises(ConfigError) as caught:
        check_trainable(built)
    assert message in str(caught.value)
