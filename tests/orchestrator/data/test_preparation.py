"""`unbroken data prepare`: made by Ray Data, gone on with, trained on, and refused for another model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from orchestrator.checkpoint.store import Store
from orchestrator.config import load_config, to_dict
from orchestrator.data.encoding import Encoder, shard_name
from orchestrator.data.preparation import Preparation
from tests.orchestrator.test_train import ray_folder
from tests.trainers.distributed import run_ranks
from tests.trainers.families import family_config
from tests.trainers.pipelines import write_pipeline
from tests.trainers.tiny import build_tiny
from trainers.data.config import DataConfig
from trainers.data.latents import PREPARING
from trainers.data.sources import open_source
from trainers.errors import ConfigError
from trainers.step import train_step

__all__ = ["ray_folder"]  # a fixture
SHARD_SIZE = 700  # of 1,797 digits: three shards


def losses(*configs: dict[str, Any]) -> list[Any]:
    """Of two steps; or why nothing can be trained. Collective."""
    found: list[Any] = []
    for config in configs:
        try:
            state, task = build_tiny(config)
            found.append([train_step(state, task)["loss"] for _ in range(2)])
        except ConfigError as error:
            found.append(str(error))
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_latents_are_made_gone_on_with_trained_on_and_refused(tmp_path: Path, ray_folder: Path) -> None:
    plain = family_config(write_pipeline(tmp_path / "sdxl", "sdxl"), "sdxl")
    file, out = tmp_path / "config.yaml", tmp_path / "out"
    large = {"num_steps": 1, "global_batch_size": SHARD_SIZE, "microbatch_size": SHARD_SIZE}
    file.write_text(yaml.safe_dump({**plain, "run": {"name": "x"}, "train": large}))
    config = load_config(file)
    Preparation(config, str(out), SHARD_SIZE)
    Encoder(to_dict(config), str(out), SHARD_SIZE).write_shard(1)  # and then it was interrupted
    (made,) = out.glob("*.safetensors")
    before = made.stat().st_mtime_ns
    with pytest.raises(ConfigError, match="is not complete; run `unbroken data prepare` again"):
        open_source(DataConfig(source="latents", path=str(out)))

    command = [sys.executable, "-m", "orchestrator", "data", "prepare", str(file), str(out)]
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--shard-size", str(SHARD_SIZE)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}: 1797 samples in 3 shards, 1 of them found\n"
    assert made.stat().st_mtime_ns == before, "what is there is not made again"
    with pytest.raises(ConfigError, match="made with another shard_size: 700, not 600"):
        Preparation(config, str(out), 600)

    from_latents = {**plain, "data": {"source": "latents", "path": str(out), "image_size": 8}}
    other = {**from_latents, "model": {"pretrained": str(write_pipeline(tmp_path / "other", "sdxl", seed=1))}}
    wrong_size = {**from_latents, "data": {**from_latents["data"], "image_size": 16}}
    first, second, refused, resized = run_ranks(1, losses, plain, from_latents, other, wrong_size)[0]
    # Encoded in other batches, so not bitwise; labels, draws of latents and dropped captions are the same.
    assert np.allclose(first, second, rtol=1e-4)
    assert "was made with another" in refused and "unbroken data prepare" in refused
    assert "set data.image_size=8" in resized


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"data": {"flip": True, "captions": True}}, "data.flip can not be prepared"),
        ({"data": {"source": "latents", "path": "x"}}, "data.source=latents is prepared already"),
        ({"model": {"class_name": "UNet2DModel"}}, "model.pretrained has no VAE"),
    ],
)
def test_what_can_not_be_prepared_is_one_line(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    plain = family_config(write_pipeline(tmp_path / "dit", "dit"), "dit")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**plain, "run": {"name": "x"}, **changes}))
    with pytest.raises(ConfigError, match=word):
        Preparation(load_config(tmp_path / "config.yaml"), str(tmp_path / "out"), 10)


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    plain = family_config(write_pipeline(tmp_path / "dit", "dit"), "dit")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**plain, "run": {"name": "x"}}))
    config, out = load_config(tmp_path / "config.yaml"), tmp_path / "out"
    name = shard_name(0, 2)  # of 1,797 digits
    Preparation(config, str(out), 900)
    (out / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{name} is damaged .*; remove it, and run the same command again"):
        Preparation(config, str(out), 900).run(lambda _: None)
    (out / PREPARING).write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{PREPARING} is damaged"):
        Preparation(config, str(out), 900)


def test_of_two_that_begin_at_once_with_other_settings_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = family_config(write_pipeline(tmp_path / "dit", "dit"), "dit")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**plain, "run": {"name": "x"}}))
    config = load_config(tmp_path / "config.yaml")
    monkeypatch.setattr(Store, "exists", lambda self, key: False)  # as each saw it a moment ago
    Preparation(config, str(tmp_path / "out"), 900)
    with pytest.raises(ConfigError, match="made with another shard_size: 900, not 600"):
        Preparation(config, str(tmp_path / "out"), 600)


def test_how_data_is_read_ahead_makes_no_other_latents(tmp_path: Path) -> None:
    plain = family_config(write_pipeline(tmp_path / "dit", "dit"), "dit")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**plain, "run": {"name": "x"}}))
    for overrides in ([], ["data.num_workers=2", "data.prefetch=9"]):
        Preparation(load_config(tmp_path / "config.yaml", overrides), str(tmp_path / "out"), 900)
