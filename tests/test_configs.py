from __future__ import annotations

import json
from pathlib import Path

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


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_recipe_is_one_that_can_be_trained(file, images, tmp_path):
    """With data of its kind and the published architecture in place, whose weights are not needed for that."""
    config = load_config(file)
    overrides = []
    if config.data.path is not None:
        overrides.append(f"data.path={images}")
    if (name := config.model.pretrained) is not None:
        overrides.append(f"model.pretrained={write_architecture(tmp_path / 'model', NAMES.get(name, name))}")
    if config.conditioning.text_encoder is not None:  # all-MiniLM-L6-v2
        (tmp_path / "config.json").write_text('{"hidden_size": 384}')
        overrides.append(f"conditioning.text_encoder={tmp_path}")
    if config.validation.metrics is not None:
        overrides.append(f"validation.metrics.network={tmp_path / 'images/metadata.jsonl'}")  # a file is all it takes
    result = CliRunner().invoke(main, ["config", "validate", str(file), *overrides])
    assert result.exit_code == 0, result.stderr
    assert config.run.name == file.stem
    assert file.read_text().startswith("# ")


def test_a_recipe_says_what_it_needs():
    for file in CONFIGS.glob("*.yaml"):
        if yaml.safe_load(file.read_text())["model"].get("pretrained"):
            head = file.read_text().split("\nrun:")[0]
            assert all(word in head for word in ("GiB", "unbroken train", "Source")), file.name
