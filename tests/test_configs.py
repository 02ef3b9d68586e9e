from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from orchestrator.cli import main
from orchestrator.config import load_config
from tests.architectures import write_architecture

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = {"models/sd2-256": "stabilityai/stable-diffusion-2-base"}
"""What a recipe's own predecessor exports is a pipeline of this kind."""


@pytest.fixture
def images(tmp_path):
    """The least that a recipe's data folder has: a class with images (enough to hold some out), and their captions."""
    (tmp_path / "images/class").mkdir(parents=True)
    names = [f"class/{i}.png" for i in range(100)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    lines = [json.dumps({"file_name": name, "text": "a black square"}) for name in names]
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "images"


def write_latents(folder: Path, image_size: int, has_text: bool) -> Path:
    """What `unbroken data prepare` would make of 5,000 images for an SD 2 or a DiT: all zeros, which take no room."""
    side = image_size // 8
    shapes = {"mean": (5000, 4, side, side), "deviation": (5000, 4, side, side), "labels": (5000,)}
    if has_text:
        shapes |= {"tokens": (5000, 77, 1024)}
    folder.mkdir()
    _write_zeros(folder / "latents-00000-of-00001.safetensors", shapes)
    if has_text:
        _write_zeros(folder / "empty.safetensors", {"tokens": (1, 77, 1024)})
    facts = {"image_size": image_size, "num_classes": 1, "shift": None, "scale": 0.18215, "encoders": {}}
    index = {"format": "unbroken-latents-1", "identity": "zeros", "shards": ["latents-00000-of-00001.safetensors"]}
    (folder / "index.json").write_text(json.dumps({**index, **facts}))
    return folder


def _write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    os.truncate(path, 8 + len(encoded) + end)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_recipe_is_one_that_can_be_trained(file, images, tmp_path):
    """With data of its kind and the published architecture in place, whose weights are not needed for that."""
    config = load_config(file)
    given, data = [], []
    if (name := config.model.pretrained) is not None:
        given.append(f"model.pretrained={write_architecture(tmp_path / 'model', NAMES.get(name, name))}")
    if config.conditioning.text_encoder is not None:  # all-MiniLM-L6-v2
        (tmp_path / "config.json").write_text('{"hidden_size": 384}')
        given.append(f"conditioning.text_encoder={tmp_path}")
    if config.validation.metrics is not None:
        given.append(f"validation.metrics.network={tmp_path / 'images/metadata.jsonl'}")  # a file is all it takes
    if config.data.path is not None:
        data.append(f"data.path={images}")
    if config.data.source == "latents":
        text = file.stem.startswith("sd2")
        # They are made of images as the recipe's head says.
        data += ["data.source=folder", f"data.captions={str(text).lower()}", "validation.num_samples=1"]
        result = CliRunner().invoke(main, ["config", "validate", str(file), *given, *data])
        assert result.exit_code == 0, result.stderr
        data = [f"data.path={write_latents(tmp_path / 'latents', config.data.image_size, text)}"]
    result = CliRunner().invoke(main, ["config", "validate", str(file), *given, *data])
    assert result.exit_code == 0, result.stderr
    assert config.run.name == file.stem
    assert file.read_text().startswith("# ")


def test_a_recipe_says_what_it_needs():
    for file in CONFIGS.glob("*.yaml"):
        if yaml.safe_load(file.read_text())["model"].get("pretrained"):
            head = file.read_text().split("\nrun:")[0]
            assert all(word in head for word in ("GiB", "unbroken train", "Source")), file.name
