from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.families import text_config
from tests.trainers.pipelines import write_pipeline, write_text_encoder
from tests.trainers.tiny import UNET, tiny_config
from trainers.conditioning import ConditioningConfig
from trainers.config import TrainerConfig
from trainers.data.sources import open_source
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.fitting import check_fits
from trainers.models import build_model, empty_model
from trainers.sampling import draw
from trainers.text_encoder import encoder_facts, open_text_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("encoder"))


def test_a_caption_is_encoded_alone_and_once(folder: Path) -> None:
    encoder = open_text_encoder(ConditioningConfig(text_encoder=str(folder), max_tokens=8), CPU)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    texts = ("a handwritten three", "", "a handwritten seven", "a handwritten three")
    together = encoder.condition(None, texts, None).tokens
    assert together is not None and together.shape == (4, 8, 16) and together.dtype == torch.float32
    assert torch.equal(together[0], together[3]) and not torch.equal(together[0], together[2])
    assert (together[0, 5:] == 0).all() and together[0, :5].all(1).all()  # [CLS] a handwritten three [SEP]
    assert (together[1, 2:] == 0).all() and together[1, :2].any(1).all()  # [CLS] [SEP]
    assert encoder._tokens.cache_info().misses == 3
    alone = encoder._encode("a handwritten seven")
    assert torch.equal(alone, together[2])
    inputs = encoder.tokenizer(["a handwritten seven"], return_tensors="pt")
    states = encoder.model(**inputs).last_hidden_state[0]
    torch.testing.assert_close(alone[:5], states, rtol=1e-4, atol=1e-5)  # without padding it rounds otherwise


def test_how_long_captions_are_cut(folder: Path) -> None:
    def length(max_tokens: int | None) -> int:
        tokens = open_text_encoder(ConditioningConfig(text_encoder=str(folder), max_tokens=max_tokens), CPU)
        found = tokens.condition(None, ("a a a a a a a a a a a a a a a a a a",), None).tokens
        assert found is not None
        return int((found[0] != 0).any(1).sum())

    assert (length(4), length(None)) == (4, 12)  # the model has places for 12, its tokenizer would give 16
    with pytest.raises(ConfigError, match="max_tokens=13"):
        length(13)


def test_facts_are_read_without_loading(folder: Path, tmp_path: Path) -> None:
    config = ConditioningConfig(text_encoder=str(folder))
    width, count = encoder_facts(config)
    loaded = open_text_encoder(config, CPU).model
    assert width == 16 and count == sum(tensor.numel() for tensor in loaded.parameters())
    with pytest.raises(ConfigError, match="is no folder of a text encoder"):
        encoder_facts(ConditioningConfig(text_encoder=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16}))
    with pytest.raises(ConfigError, match="can not be loaded"):
        open_text_encoder(ConditioningConfig(text_encoder=str(tmp_path)), CPU)


def test_weights_that_are_cut_short_are_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    config = ConditioningConfig(text_encoder=str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read .*; copy it anew"):
        encoder_facts(config)
    with pytest.raises(ConfigError, match="can not be loaded"):
        open_text_encoder(config, CPU)


def check(plain: dict[str, Any]) -> None:
    config = decode(TrainerConfig, plain)
    check_fits(empty_model(config.model, 0), open_source(config.data), config)


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    config = text_config(folder)
    check(config)
    args = config["model"]["args"]
    wide = {**config, "model": {**config["model"], "args": {**args, "cross_attention_dim": 24}}}
    with pytest.raises(ConfigError, match=r"cross_attention_dim=24, but .* makes tokens of 16"):
        check(wide)
    with pytest.raises(ConfigError, match="needs text encoders"):
        check({**config, "conditioning": {}})
    with pytest.raises(ConfigError, match="a UNet2DModel takes other things"):
        check(tiny_config(UNET, data={"captions": True}, conditioning=config["conditioning"]))
    with pytest.raises(ConfigError, match="guidance=2"):
        ConditioningConfig(text_encoder=str(folder), guidance=2.0)
    pipeline = {"pretrained": str(write_pipeline(tmp_path / "sd15", "sd15"))}
    with pytest.raises(ConfigError, match="does not go with the frozen parts"):
        check({**config, "model": pipeline})


def test_images_follow_their_texts(folder: Path) -> None:
    config = decode(TrainerConfig, text_config(folder))
    model = build_model(config.model, 0)
    wanted = ["a handwritten three", "a handwritten seven"]
    first = draw(model, config, wanted, seed=3, num_steps=2, guidance=1.5)
    assert first.shape == (2, 1, 8, 8) and torch.equal(
        first, draw(model, config, wanted, seed=3, num_steps=2, guidance=1.5)
    )
    other = draw(model, config, wanted[::-1], seed=3, num_steps=2, guidance=1.5)
    assert not torch.equal(first, other) and not torch.equal(first, draw(model, config, wanted, seed=3, num_steps=2))
