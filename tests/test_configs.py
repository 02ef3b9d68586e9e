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
    """The least that a recipe's data folder has: a class with an image, and its caption."""
    (tmp_path / "images/class").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/class/a.png")
    line = json.dumps({"file_name": "class/a.png", "text": "a black square"})
    (tmp_path / "images/metadata.jsonl").write_text(line)
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
    result = CliRunner().invoke(main, ["config", "validate", str(file), *overrides])
    assert result.exit_code == 0, result.stderr
    assert config.run.name == file.stem
    assert file.read_text().startswith("# ")


def test_a_recipe_says_what_it_needs():
    for file in CONFIGS.glob("*.yaml"):
        if yaml.safe_load(file.read_text())["model"].get("pretrained"):
            head = file.read_text().split("\nrun:")[0]
            assert all(word in head for word in ("GiB", "unbroken train", "Source")), file.name
