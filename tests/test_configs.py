from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainers.build import TrainerConfig
from trainers.data.sources import open_source
from trainers.decode import decode
from trainers.fitting import check_fits
from trainers.models import build_model

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_recipe_is_one_that_can_be_trained(file):
    sections = yaml.safe_load(file.read_text())
    for section in ("run", "storage", "workers", "checkpoint"):
        del sections[section]
    config = decode(TrainerConfig, sections)
    check_fits(build_model(config.model, config.seed), open_source(config.data), config)
    assert config.ema
