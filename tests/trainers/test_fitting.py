from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from trainers.config import TrainerConfig
from trainers.data.samples import LatentFacts
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.fitting import check_fits
from trainers.models import build_model

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
TRAIN = {"num_steps": 1, "global_batch_size": 1, "microbatch_size": 1}


def unet(**args: Any) -> dict[str, Any]:
    return {"class_name": "UNet2DModel", "args": {**UNET, **args}}


def dit() -> dict[str, Any]:
    return {"class_name": "DiTTransformer2DModel", "args": DIT}


def check(model: dict[str, Any], given: dict[str, Any]) -> None:
    fits = {"channels": 1, "image_size": 8, "num_classes": 10, "label_drop": 0.0, "has_captions": False, **given}
    source: Any = type("Given", (SimpleNamespace,), {"__len__": lambda self: 10})(
        **{key: fits[key] for key in ("channels", "num_classes", "has_captions")}, buckets=None, latents=None
    )
    sections = {"data": {"image_size": fits["image_size"]}, "objective": {"label_drop": fits["label_drop"]}}
    sections["conditioning"] = given.get("conditioning", {})
    config = decode(TrainerConfig, {"model": model, "train": TRAIN, **sections})
    assert check_fits(build_model(config.model, seed=0), source, config) is None


@pytest.mark.parametrize(
    ("model", "given", "word"),
    [
        (unet(), {"channels": 3}, "model.args.in_channels=1"),
        (unet(), {"image_size": 16}, "model.args.sample_size=8"),
        (unet(), {"label_drop": 0.1}, "objective.label_drop=0.1"),
        (unet(), {"has_captions": True}, "data.captions=true has no effect"),
        (dit(), {"num_classes": None}, "no labels"),
        (dit(), {"num_classes": 11}, "model.args.num_embeds_ada_norm=10"),
        (unet(num_class_embeds=10), {"label_drop": 0.1}, "model.args.num_class_embeds=10"),
        (unet(), {"conditioning": {"guidance": 3.5}}, "conditioning.guidance=3.5 has no effect on a UNet2DModel"),
        (unet(), {"conditioning": {"max_tokens": 8}}, "conditioning.max_tokens=8 has no effect without a T5"),
        (unet(), {"conditioning": {"precision": "bf16"}}, "conditioning.precision=bf16 has no effect"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(model, given, word):
    with pytest.raises(ConfigError) as error:
        check(model, given)
    assert word in str(error.value)


def test_what_fits_is_let_through():
    check(unet(), {})
    check(unet(num_class_embeds=10), {})
    check(unet(num_class_embeds=11), {"label_drop": 0.1})
    check(dit(), {"label_drop": 0.1})


@pytest.mark.parametrize("has_sizes", [True, False])
def test_latents_must_have_the_sizes_that_the_model_is_told(has_sizes: bool) -> None:
    told = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 40,
    }
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    args = {**UNET, **blocks, **told, "cross_attention_dim": 16, "in_channels": 4, "out_channels": 4}
    made = LatentFacts(shape=(4, 8, 8), has_text=True, has_sizes=has_sizes)
    source: Any = type("Given", (SimpleNamespace,), {"__len__": lambda self: 10})(
        channels=4, num_classes=None, has_captions=False, buckets=None, latents=made
    )
    data = {"source": "latents", "path": "x", "image_size": 8}
    model = {"class_name": "UNet2DConditionModel", "args": args}
    config = decode(TrainerConfig, {"model": model, "train": TRAIN, "data": data})
    with nullcontext() if has_sizes else pytest.raises(ConfigError, match=r"data\.path=x has no sizes"):
        assert check_fits(build_model(config.model, seed=0), source, config) is None
